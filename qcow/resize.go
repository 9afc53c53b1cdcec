package qcow

import (
	"context"
	"fmt"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// Resize makes the virtual disk size bytes long, a multiple of 512. The bytes gained read as zeroes; those lost are lost, their space
// goes back to the file system, and they stay in internal snapshots. It is durable when Resize returns nil, and a crash leaves the one
// size or the other. Requests go on meanwhile; while the disk shrinks, those that change it wait. The size it has already is success, one
// that the format can't express ErrInvalid. What a disk gains whose data file is a raw image gets PreallocationMetadata.
func (img *Image) Resize(ctx context.Context, size int64) error {
	if size > img.Size() && img.rawDataFile() {
		return img.ResizeWith(ctx, size, ResizeOptions{Preallocation: PreallocationMetadata})
	}
	end, err := img.maintain(ctx)
	if err != nil {
		return err
	}
	defer end()
	switch old := img.Size(); {
	case size == old:
		return nil
	case size < 0 || size%format.SectorSize != 0 || uint64(size) > img.geometry.MaxVirtualSize():
		return format.Invalidf("size %d is not a multiple of %d or exceeds the limit of %d for clusters of %d bytes", size, format.SectorSize, img.geometry.MaxVirtualSize(), img.geometry.ClusterSize())
	}
	if err := img.completeSnapshots(); err != nil {
		return err
	}
	if err := img.bitmaps.mayResize(uint64(size)); err != nil {
		return err
	}
	if old := img.Size(); size > old {
		if len(img.bitmaps.list) > 0 { // they switch together with the size, for which nobody may wait for a claim held here
			thaw := img.freeze()
			defer thaw()
		}
		return img.grow(old, size)
	}
	return img.shrink(ctx, size)
}

func (img *Image) grow(old, size int64) error {
	if img.geometry.InCluster(format.GuestOffset(old)) != 0 {
		// While the last cluster is claimed, nobody unlinks it believing that the disk ends inside it.
		last := uint64(old) >> img.geometry.ClusterBits
		claim := img.claims.acquire(last, last+1)
		defer img.claims.release(claim)
	}
	entries := img.geometry.L1EntriesFor(uint64(size))
	larger := entries > uint64(len(img.l1))/format.EntrySize
	if larger && (img.under() != nil || len(img.bitmaps.list) > 0) { // what is cleared may need entries that are not there yet
		if err := img.growL1(entries, old); err != nil {
			return err
		}
		larger = false
	}
	if err := img.clearBehind(old, size); err != nil {
		return err
	}
	var err error
	if larger {
		err = img.growL1(entries, size)
	} else {
		err = img.switchSize(old, size)
	}
	if err != nil {
		return err
	}
	img.size.Store(size)
	return nil
}

// clearBehind makes the bytes between the end of the disk and its new end read as zeroes: the rest of its last cluster, clusters
// behind that which the tables of an image from elsewhere may map, and what a backing file that is longer has there.
func (img *Image) clearBehind(old, size int64) error {
	epoch := img.epochs.enter()
	defer img.epochs.leave(epoch)
	cluster := int64(img.geometry.ClusterSize())
	boundary := old + (-old & (cluster - 1))
	if err := img.clearClaimed(old, min(boundary, size)); err != nil {
		return err
	}
	if !img.canMarkZero() {
		return img.overwriteWithZeroes(boundary, size)
	}
	return img.unmap(boundary, size+(-size&(cluster-1)))
}

// clearClaimed zeroes the rest of the disk's last cluster, which the caller has claimed.
func (img *Image) clearClaimed(off, end int64) error {
	return img.eachNonZero(off, end, func(off, n int64, _ bool) (int64, error) {
		done, err := img.writeClaimed(zeroes[:n], format.GuestOffset(off))
		return int64(done), err
	})
}

// growL1 builds a larger L1 table aside and switches to it and to the new size at once (rule 8).
func (img *Image) growL1(entries uint64, size int64) error {
	img.newTable.Lock() // no L2 table comes into the L1 table while it is copied
	defer img.newTable.Unlock()
	g := img.geometry
	n := entries * format.EntrySize
	x, err := img.alloc.contiguous(g.ClustersFor(n))
	if err != nil {
		return fmt.Errorf("allocate an L1 table of %d entries: %w", entries, err)
	}
	table := make([]byte, g.ClustersFor(n)<<g.ClusterBits)
	copy(table, img.l1)
	if _, err := img.file.WriteAt(table, int64(g.OffsetOf(x.first))); err != nil {
		img.alloc.giveBack(x)
		return fmt.Errorf("write L1 table at %#x: %w", uint64(g.OffsetOf(x.first)), err)
	}
	img.metadata.add(x)
	err = img.changeHeader(func(h *format.Header) {
		h.Size, h.L1Entries, h.L1Offset = uint64(size), uint32(entries), g.OffsetOf(x.first)
	})
	if err != nil {
		// The header on disk may name the new table all the same, until a later sync says otherwise.
		img.metadata.remove(x)
		img.quarantine.add(x)
		return err
	}
	old := run{g.ClusterOf(img.l1offset), g.ClustersFor(uint64(len(img.l1)))}
	img.activate(table[:n], x)
	img.metadata.remove(old)
	img.quarantine.add(old)
	return nil
}
