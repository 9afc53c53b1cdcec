package qcow

import (
	"fmt"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// loadTables reads the refcount table and the L1 table, and checks that both, and all tables that they point to, lie inside the file
// of size bytes, one beside the other. Who only reads the image does so whatever is wrong with refcounts.
func (img *Image) loadTables(size uint64) error {
	h := &img.header
	img.metadata.add(run{0, 1})
	err := img.loadRefcounts(size)
	if err != nil && !img.readOnly {
		return err
	}
	if err != nil {
		img.metadata.set, img.alloc.counts.table = clusterSet{}, nil
		img.metadata.add(run{0, 1})
	}
	if img.l1, err = img.loadTable("L1 table", h.L1Offset, h.L1Bytes(), size); err != nil {
		return err
	}
	for i := range uint64(h.L1Entries) {
		e := format.L1Entry(format.Entry(img.l1, i))
		at := h.L1Offset + format.HostOffset(i*format.EntrySize)
		if err := img.addPointed("L1 table", at, e.Offset(), e.Reserved(), size); err != nil {
			return err
		}
	}
	if err := img.loadSnapshots(size); err != nil {
		return err
	}
	return img.loadEncryptionArea(size)
}

func (img *Image) loadRefcounts(size uint64) (err error) {
	h, counts := &img.header, &img.alloc.counts
	if counts.table, err = img.loadTable("refcount table", h.RefcountTableOffset, h.RefcountTableBytes(), size); err != nil {
		return err
	}
	for i := range uint64(len(counts.table)) / format.EntrySize {
		e := format.RefcountTableEntry(format.Entry(counts.table, i))
		at := h.RefcountTableOffset + format.HostOffset(i*format.EntrySize)
		if err := img.addPointed("refcount table", at, e.Offset(), e.Reserved(), size); err != nil {
			return err
		}
	}
	if counts.block(0) == 0 {
		return format.Corruptf("refcount table", h.RefcountTableOffset, "no refcount block covers the header")
	}
	return nil
}

// loadSnapshots reads the snapshot table, and remembers every table of the snapshots as metadata. Their L2 tables may be shared, with each
// other and with the active L1 table.
func (img *Image) loadSnapshots(size uint64) error {
	h := &img.header
	if h.Snapshots == 0 {
		return nil
	}
	list, used, err := img.readSnapshots(size)
	if err != nil {
		return err
	}
	g := img.geometry
	for i := range list {
		if list[i].Incomplete {
			list[i].DiskSize = h.Size
		}
	}
	img.snapshots, img.snapshotBytes = list, used
	if err := img.metadata.addTable("snapshot table", run{g.ClusterOf(h.SnapshotsOffset), g.ClustersFor(used)}); err != nil {
		return err
	}
	l2 := clusterSet{}
	for i := range uint64(h.L1Entries) {
		if off := format.L1Entry(format.Entry(img.l1, i)).Offset(); off != 0 {
			l2.add(g.ClusterOf(off), 1)
		}
	}
	for i := range list {
		s := &list[i]
		if !g.Aligned(s.L1Offset) || uint64(s.L1Entries)*format.EntrySize > format.MaxL1Bytes {
			return format.Corruptf("snapshot table", h.SnapshotsOffset, "snapshot %q has an L1 table of %d entries at %#x", s.Name, s.L1Entries, uint64(s.L1Offset))
		}
		l1, err := img.loadTable("snapshot L1 table", s.L1Offset, uint64(s.L1Entries)*format.EntrySize, size)
		if err != nil {
			return err
		}
		for i := range uint64(s.L1Entries) {
			e := format.L1Entry(format.Entry(l1, i))
			at := s.L1Offset + format.HostOffset(i*format.EntrySize)
			if _, known := l2.find(g.ClusterOf(e.Offset()), 1); known && e.Reserved() == 0 && g.Aligned(e.Offset()) {
				continue
			}
			if err := img.addPointed("snapshot L1 table", at, e.Offset(), e.Reserved(), size); err != nil {
				return err
			}
			if e.Offset() != 0 {
				l2.add(g.ClusterOf(e.Offset()), 1)
			}
		}
	}
	return nil
}

// firstSnapshotRead is how much of the snapshot table is read at first; the table does not say how long it is.
const firstSnapshotRead = 64 << 10

func (img *Image) readSnapshots(size uint64) (list []format.Snapshot, used uint64, err error) {
	off := img.header.SnapshotsOffset
	if uint64(off) >= size {
		return nil, 0, format.Corruptf("header", 64, "the snapshot table at %#x is past the end of the file at %d", uint64(off), size)
	}
	most := min(size-uint64(off), format.MaxSnapshotTableBytes)
	for n := min(most, firstSnapshotRead); ; n = min(4*n, most) {
		b := make([]byte, n)
		if err := readFull(img.file, b, off); err != nil {
			return nil, 0, fmt.Errorf("read snapshot table: %w", err)
		}
		list, used, err = format.DecodeSnapshots(b, img.header.Snapshots)
		if err == nil || n == most {
			return list, used, err
		}
	}
}

// loadEncryptionArea remembers where the encryption header is.
func (img *Image) loadEncryptionArea(size uint64) error {
	if img.cryptMethod != cryptLUKS {
		return nil
	}
	off, n, err := img.header.Encryption()
	if err != nil {
		return err
	}
	g := img.geometry
	if n == 0 || !g.Aligned(off) || uint64(off) > size || n > size-uint64(off) {
		return format.Corruptf("header", 32, "an encryption header of %d bytes at %#x", n, uint64(off))
	}
	return img.metadata.addTable("encryption header", run{g.ClusterOf(off), g.ClustersFor(n)})
}

func (img *Image) loadTable(name string, off format.HostOffset, n, size uint64) ([]byte, error) {
	if n == 0 {
		return nil, nil // wherever that is
	}
	if uint64(off) > size || n > size-uint64(off) {
		return nil, format.Corruptf(name, off, "%d bytes reach past the end of the file at %d: it is truncated or damaged", n, size)
	}
	if err := img.metadata.addTable(name, run{img.geometry.ClusterOf(off), img.geometry.ClustersFor(n)}); err != nil {
		return nil, err
	}
	b := make([]byte, n)
	if err := readFull(img.file, b, off); err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	return b, nil
}

// addPointed checks the table that the entry at at points to, and remembers it as metadata.
func (img *Image) addPointed(name string, at, target format.HostOffset, reserved, size uint64) error {
	g := img.geometry
	switch {
	case reserved != 0:
		return format.Corruptf(name, at, "reserved bits %#x are set", reserved)
	case target == 0:
		return nil
	case !g.Aligned(target):
		return format.Corruptf(name, at, "points to %#x, which is not the start of a cluster", uint64(target))
	case uint64(target) > size || g.ClusterSize() > size-uint64(target):
		return format.Corruptf(name, at, "points to %#x, past the end of the file at %d: it is truncated or damaged", uint64(target), size)
	}
	return img.metadata.addTable(name, run{g.ClusterOf(target), 1})
}
