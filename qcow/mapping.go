package qcow

import (
	"fmt"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// mapping says where the guest bytes from some offset on are.
type mapping struct {
	kind   format.Kind
	copied bool              // Data: every cluster may be written in place
	host   format.HostOffset // of the first byte, for Data and ZeroAllocated; the clusters are neighbours in the file
	length uint64            // guest bytes, at least 1
	table  format.HostOffset // the L2 table; 0: there is none
}

// lookup returns the mapping of the bytes from off on, at most n of them and as many as are mapped alike and found in one slice
// of a table. off lies inside the virtual disk.
func (img *Image) lookup(off format.GuestOffset, n uint64) (mapping, error) {
	g := img.geometry
	table := img.l2Table(off)
	if table == 0 {
		return mapping{kind: format.Unallocated, length: min(n, img.l2Gap(off, n))}, nil
	}
	perSlice := img.tables.sliceSize / format.EntrySize
	index := g.L2Index(off)
	s, err := img.tables.pin(entryOffset(table, index))
	if err != nil {
		return mapping{}, err
	}
	defer s.unpin()
	s.mu.RLock()
	defer s.mu.RUnlock()

	skip := g.InCluster(off)
	clusters := min(g.ClustersFor(skip+n), perSlice-index%perSlice)
	first := format.L2Entry(format.Entry(s.b, index%perSlice))
	if err := img.checkEntry(first, entryOffset(table, index)); err != nil {
		return mapping{}, err
	}
	m := mapping{kind: first.Kind(), copied: first.Copied(), table: table}
	if m.kind == format.Data || m.kind == format.ZeroAllocated {
		m.host = first.Offset() + format.HostOffset(skip)
	}
	like := uint64(1)
	for ; like < clusters; like++ {
		e := format.L2Entry(format.Entry(s.b, index%perSlice+like))
		if !m.continuedBy(e, first.Offset()+format.HostOffset(like<<g.ClusterBits)) || img.checkEntry(e, 0) != nil {
			break // whoever goes on from here meets the error
		}
	}
	m.length = min(n, like<<g.ClusterBits-skip)
	return m, nil
}

func (m *mapping) continuedBy(e format.L2Entry, host format.HostOffset) bool {
	if e.Kind() != m.kind {
		return false
	}
	if m.host == 0 {
		return m.kind != format.Compressed
	}
	return e.Copied() == m.copied && e.Offset() == host
}

func entryOffset(table format.HostOffset, index uint64) format.HostOffset {
	return table + format.HostOffset(index*format.EntrySize)
}

// checkEntry checks an L2 entry, found at at, against the format and the length of the file.
func (img *Image) checkEntry(e format.L2Entry, at format.HostOffset) error {
	host := e.Offset()
	switch kind := e.Kind(); {
	case kind == format.Compressed:
		return format.Unsupportedf("L2 table", at, "compressed cluster")
	case e.Reserved() != 0:
		return format.Corruptf("L2 table", at, "reserved bits %#x are set", e.Reserved())
	case !img.geometry.Aligned(host):
		return format.Corruptf("L2 table", at, "points to %#x, which is not the start of a cluster", uint64(host))
	case uint64(img.geometry.ClusterOf(host)) >= img.alloc.end.Load() && host != 0:
		return format.Corruptf("L2 table", at, "points to %#x, past the end of the file: it is truncated or damaged", uint64(host))
	}
	return nil
}

// l2Table returns where the L2 table for off is, 0 where there is none.
func (img *Image) l2Table(off format.GuestOffset) format.HostOffset {
	i := img.geometry.L1Index(off)
	img.l1mu.RLock()
	defer img.l1mu.RUnlock()
	return format.L1Entry(format.Entry(img.l1, i)).Offset()
}

// l2Gap returns how many bytes from off on have no L2 table, at least those of the first one that is missing and not many more than n.
func (img *Image) l2Gap(off format.GuestOffset, n uint64) uint64 {
	g := img.geometry
	gap := g.L2Span() - uint64(off)&(g.L2Span()-1)
	img.l1mu.RLock()
	defer img.l1mu.RUnlock()
	for i := g.L1Index(off) + 1; gap < n && format.L1Entry(format.Entry(img.l1, i)).Offset() == 0; i++ {
		gap += g.L2Span()
	}
	return gap
}

// makeL2Table returns the L2 table for off, making it if there is none. Clusters of the reserve read as zeroes durably, so the table is
// valid the moment the L1 entry is (rule 4); it is written out all the same, so that a full disk is met here and not when a
// data cluster is to be linked.
func (img *Image) makeL2Table(off format.GuestOffset) (format.HostOffset, error) {
	img.newTable.Lock()
	defer img.newTable.Unlock()
	g := img.geometry
	if table := img.l2Table(off); table != 0 {
		return table, nil
	}
	x, err := img.alloc.take(1)
	if err != nil {
		return 0, err
	}
	table := g.OffsetOf(x.first)
	if _, err := img.file.WriteAt(make([]byte, g.ClusterSize()), int64(table)); err != nil {
		img.alloc.giveBack(x)
		return 0, fmt.Errorf("write L2 table at %#x: %w", uint64(table), err)
	}
	img.metadata.add(x)
	i := g.L1Index(off)
	entry := make([]byte, format.EntrySize)
	format.PutEntry(entry, 0, uint64(format.NewL1Entry(table, true)))
	if err := img.overwrite(entryOffset(img.l1offset, i), img.l1[i*format.EntrySize:][:format.EntrySize], entry); err != nil {
		img.metadata.remove(x)
		img.alloc.giveBack(x)
		return 0, fmt.Errorf("write L1 entry %d: %w", i, err)
	}
	img.l1mu.Lock()
	defer img.l1mu.Unlock()
	copy(img.l1[i*format.EntrySize:], entry)
	return table, nil
}

// setEntries replaces the L2 entries of n neighbouring guest clusters, which lie in one slice of table. The caller has claimed them.
func (img *Image) setEntries(table format.HostOffset, off format.GuestOffset, n uint64, entry func(i uint64) format.L2Entry) error {
	at := entryOffset(table, img.geometry.L2Index(off))
	return img.tables.update(at, n*format.EntrySize, func(b []byte) {
		for i := range n {
			format.PutEntry(b, i, uint64(entry(i)))
		}
	})
}
