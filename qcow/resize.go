package qcow

import (
	"context"
	"fmt"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// Resize makes the virtual disk size bytes long, a multiple of 512. The bytes gained read as zeroes. It is durable when Resize returns
// nil, and requests go on meanwhile. The size it has already is success; a smaller one is ErrUnsupported, one that the
// format can't express ErrInvalid.
func (img *Image) Resize(ctx context.Context, size int64) error {
	img.maintenance.RLock()
	defer img.maintenance.RUnlock()
	if err := img.usable(); err != nil {
		return err
	}
	if err := img.writable(); err != nil {
		return err
	}
	img.resizing.Lock()
	defer img.resizing.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	old := img.Size()
	switch {
	case size == old:
		return nil
	case size < old:
		return fmt.Errorf("%w: shrinking the disk from %d to %d bytes", ErrUnsupported, old, size)
	case size%format.SectorSize != 0 || uint64(size) > img.geometry.MaxVirtualSize():
		return format.Invalidf("size %d is not a multiple of %d or exceeds the limit of %d for clusters of %d bytes", size, format.SectorSize, img.geometry.MaxVirtualSize(), img.geometry.ClusterSize())
	}
	if img.geometry.InCluster(format.GuestOffset(old)) != 0 {
		// While the last cluster is claimed, nobody unlinks it believing that the disk ends inside it.
		last := uint64(old) >> img.geometry.ClusterBits
		claim := img.claims.acquire(last, last+1)
		defer img.claims.release(claim)
	}
	if err := img.clearBehind(old, size); err != nil {
		return err
	}
	if entries := img.geometry.L1EntriesFor(uint64(size)); entries > uint64(len(img.l1))/format.EntrySize {
		if err := img.growL1(entries, size); err != nil {
			return err
		}
	} else if err := img.switchHeader(func(h *format.Header) { h.Size = uint64(size) }); err != nil {
		return err
	}
	img.size.Store(size)
	return nil
}

// clearBehind makes the bytes between the end of the disk and its new end read as zeroes: the rest of its last cluster, and clusters
// behind that which the tables of an image from elsewhere may map.
func (img *Image) clearBehind(old, size int64) error {
	epoch := img.epochs.enter()
	defer img.epochs.leave(epoch)
	cluster := int64(img.geometry.ClusterSize())
	boundary := old + (-old & (cluster - 1))
	if err := img.zeroInPlace(old, min(boundary, size)); err != nil {
		return err
	}
	mapped := uint64(len(img.l1)) / format.EntrySize * img.geometry.L2Span()
	return img.unmap(boundary, int64(min(uint64(size+(-size&(cluster-1))), mapped)))
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
	err = img.switchHeader(func(h *format.Header) {
		h.Size, h.L1Entries, h.L1Offset = uint64(size), uint32(entries), g.OffsetOf(x.first)
	})
	if err != nil {
		// The header on disk may name the new table all the same, until a later sync says otherwise.
		img.metadata.remove(x)
		img.quarantine.add(x)
		return err
	}
	old := run{g.ClusterOf(img.l1offset), g.ClustersFor(uint64(len(img.l1)))}
	img.l1mu.Lock()
	img.l1, img.l1offset = table[:n], g.OffsetOf(x.first)
	img.l1mu.Unlock()
	img.metadata.remove(old)
	img.quarantine.add(old)
	return nil
}
