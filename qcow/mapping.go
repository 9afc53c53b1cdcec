package qcow

import (
	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// mapping says where the guest bytes from some offset on are.
type mapping struct {
	kind   format.Kind
	copied bool                // every cluster may be written in place, as far as the entries say
	host   format.HostOffset   // of the first byte, where hosted; the clusters are neighbours in the file
	length uint64              // guest bytes, at least 1
	entry  format.MappingEntry // of the first cluster
	table  format.HostOffset   // the L2 table; 0: there is none
}

// hosted reports whether the first byte has a place in a host cluster, be it in use or not.
func (m *mapping) hosted() bool {
	return m.kind == format.Data || m.kind == format.ZeroAllocated || m.kind == format.UnallocatedHost
}

// absent reports whether the bytes are what the backing file says, zeroes where there is none.
func (m *mapping) absent() bool {
	return m.kind == format.Unallocated || m.kind == format.UnallocatedHost
}

// zero reports whether the entry says that the bytes read as zeroes.
func (m *mapping) zero() bool {
	return m.kind == format.ZeroedPlain || m.kind == format.ZeroAllocated
}

// lookup returns the mapping of the bytes from off on, at most n of them and as many as are mapped alike and found in one slice
// of a table. off lies inside the virtual disk.
func (img *Image) lookup(off format.GuestOffset, n uint64) (mapping, error) {
	g := img.geometry
	table := img.l1Entry(g.L1Index(off)).Offset()
	if table == 0 {
		return mapping{kind: format.Unallocated, length: min(n, img.l2Gap(off, n))}, nil
	}
	index := g.L2Index(off)
	s, err := img.tables.pin(img.entryOffset(table, index))
	if err != nil {
		return mapping{}, err
	}
	defer s.unpin()
	s.mu.RLock()
	defer s.mu.RUnlock()

	perSlice := img.entriesPerSlice()
	i, end := index%perSlice, perSlice
	first, err := img.entryAt(s.b, i, table, index)
	if err != nil {
		return mapping{}, err
	}
	sub, subs := g.SubclusterIndex(off), g.Subclusters()
	m := mapping{kind: g.Kind(first, sub), copied: first.Copied(), entry: first, table: table}
	if m.hosted() {
		m.host = first.Offset() + format.HostOffset(g.InCluster(off))
	}
	m.length = g.SubclusterSize() - g.InSubcluster(off)
	if m.kind == format.Compressed {
		m.length = min(n, g.ClusterSize()-g.InCluster(off))
		return m, nil
	}
	for e, like := first, uint64(0); m.length < n; m.length += g.SubclusterSize() {
		if sub++; sub == subs {
			sub = 0
			like++
			if i++; i == end {
				break
			}
			if e, err = img.entryAt(s.b, i, table, index+like); err != nil {
				break // whoever goes on from here meets the error
			}
			if e.Copied() != m.copied && m.hosted() {
				break
			}
			if m.hosted() && e.Offset() != first.Offset()+format.HostOffset(like<<g.ClusterBits) {
				break
			}
		}
		if g.Kind(e, sub) != m.kind {
			break
		}
	}
	m.length = min(n, m.length)
	return m, nil
}

// entryAt decodes and checks entry i of a slice of table, which is entry index of the table.
func (img *Image) entryAt(slice []byte, i uint64, table format.HostOffset, index uint64) (format.MappingEntry, error) {
	e := img.geometry.MappingEntry(slice, i)
	return e, img.checkEntry(e, img.entryOffset(table, index))
}

func (img *Image) entryOffset(table format.HostOffset, index uint64) format.HostOffset {
	return table + format.HostOffset(index*img.geometry.L2EntrySize())
}

// entriesPerSlice returns how many L2 entries a cached slice holds.
func (img *Image) entriesPerSlice() uint64 { return img.tables.sliceSize / img.geometry.L2EntrySize() }

// checkEntry checks an L2 entry, found at at, against the format and the length of the file.
func (img *Image) checkEntry(e format.MappingEntry, at format.HostOffset) error {
	if e.L2Entry == 0 && e.Subclusters == 0 {
		return nil
	}
	g := img.geometry
	if e.Kind() == format.Compressed {
		off, n := e.CompressedRange(g)
		if img.external() {
			return format.Corruptf("L2 table", at, "compressed cluster in an image with an external data file")
		}
		if uint64(off) >= img.alloc.end.Load()<<g.ClusterBits {
			return format.Corruptf("L2 table", at, "points to %d compressed bytes at %#x, past the end of the file: it is truncated or damaged", n, uint64(off))
		}
		return nil
	}
	host := e.Offset()
	switch problem := g.CheckEntry(e); {
	case problem != "":
		return format.Corruptf("L2 table", at, "%s", problem)
	case img.version < 3 && e.Kind() != format.Data && e.Kind() != format.Unallocated:
		return format.Corruptf("L2 table", at, "a zero cluster in an image of version 2")
	case img.external():
		if host >= format.MaxHostOffset-format.HostOffset(g.ClusterSize()) {
			return format.Corruptf("L2 table", at, "points to %#x in the data file, past the limit of the format", uint64(host))
		}
	case uint64(g.ClusterOf(host)) >= img.alloc.end.Load() && host != 0:
		return format.Corruptf("L2 table", at, "points to %#x, past the end of the file: it is truncated or damaged", uint64(host))
	}
	return nil
}

// l1Entry returns entry i of the active L1 table. Behind its end, where a reader may look while the disk shrinks, there is nothing.
func (img *Image) l1Entry(i uint64) format.L1Entry {
	img.l1mu.RLock()
	defer img.l1mu.RUnlock()
	if i >= uint64(len(img.l1))/format.EntrySize {
		return 0
	}
	return format.L1Entry(format.Entry(img.l1, i))
}

// l2Gap returns how many bytes from off on have no L2 table, at least those of the first one that is missing and not many more than n.
func (img *Image) l2Gap(off format.GuestOffset, n uint64) uint64 {
	g := img.geometry
	gap := g.L2Span() - uint64(off)&(g.L2Span()-1)
	img.l1mu.RLock()
	defer img.l1mu.RUnlock()
	entries := uint64(len(img.l1)) / format.EntrySize
	for i := g.L1Index(off) + 1; gap < n && i < entries && format.L1Entry(format.Entry(img.l1, i)).Offset() == 0; i++ {
		gap += g.L2Span()
	}
	return max(gap, 1)
}

// sliceSpan returns how many guest bytes from off on have their L2 entries in one slice.
func (img *Image) sliceSpan(off format.GuestOffset) uint64 {
	g := img.geometry
	perSlice := img.entriesPerSlice()
	return (perSlice-g.L2Index(off)%perSlice)<<g.ClusterBits - g.InCluster(off)
}

// setEntries replaces the L2 entries of n neighbouring guest clusters, which lie in one slice of table. The caller has claimed them, and
// the table is the active L1 table's own.
func (img *Image) setEntries(table format.HostOffset, off format.GuestOffset, n uint64, entry func(i uint64, old format.MappingEntry) format.MappingEntry) error {
	g := img.geometry
	at := img.entryOffset(table, g.L2Index(off))
	if img.links.holds(at, n) {
		if err := img.settleLinks(); err != nil {
			return err
		}
	}
	return img.tables.update(at, n*g.L2EntrySize(), func(b []byte) {
		for i := range n {
			g.PutMappingEntry(b, i, entry(i, g.MappingEntry(b, i)))
		}
	})
}
