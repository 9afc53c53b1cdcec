package qcow

import (
	"fmt"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// A tree is an L1 table, active or a snapshot's, with what it refers to. Its L2 tables have as many references as trees, and what they
// refer to has one for each of these and each entry.

// eachTable calls fn for every L2 table that an L1 table at at refers to.
func (s *shadow) eachTable(l1 []byte, at format.HostOffset, fn func(i uint64, e format.L1Entry, table []byte) error) error {
	g := s.img.geometry
	table := make([]byte, g.ClusterSize())
	tables, most := uint64(0), s.img.alloc.end.Load()
	for i := range uint64(len(l1)) / format.EntrySize {
		e := format.L1Entry(format.Entry(l1, i))
		if e.Offset() == 0 {
			continue
		}
		// Each is a cluster of the file: a table that mentions one again and again must not take for ever.
		if tables++; !g.Aligned(e.Offset()) || e.Reserved() != 0 || tables > most {
			return format.Corruptf("L1 table", at+format.HostOffset(i*format.EntrySize), "entry %#x is not valid", uint64(e))
		}
		if s.stop != nil {
			if err := s.stop(); err != nil {
				return err
			}
		}
		if err := readFull(s.img.file, table, e.Offset()); err != nil {
			return fmt.Errorf("read L2 table at %#x: %w", uint64(e.Offset()), err)
		}
		if err := fn(i, e, table); err != nil {
			return err
		}
	}
	return nil
}

// eachCluster calls fn for the host clusters of every entry of an L2 table at at. It may change the entry.
func (s *shadow) eachCluster(table []byte, at format.HostOffset, fn func(x run, e *format.MappingEntry) error) error {
	return s.eachClusterFrom(0, table, at, fn)
}

// eachClusterFrom is eachCluster for the entries from first on. It makes sure that no cluster is metadata: a corrupt image
// could have its tables freed otherwise.
func (s *shadow) eachClusterFrom(first uint64, table []byte, at format.HostOffset, fn func(x run, e *format.MappingEntry) error) error {
	g := s.img.geometry
	for i := first; i < g.L2Entries(); i++ {
		e, err := s.img.entryAt(table, i, at, i)
		if err != nil {
			return err
		}
		x := s.img.entryRun(e)
		if x.n == 0 {
			continue
		}
		if err := s.img.mustBeData(g.OffsetOf(x.first), x.n<<g.ClusterBits); err != nil {
			return err
		}
		if err := fn(x, &e); err != nil {
			return err
		}
		g.PutMappingEntry(table, i, e)
	}
	return nil
}

// entryRun returns the clusters of the image file that an entry refers to.
func (img *Image) entryRun(e format.MappingEntry) run {
	kind := e.L2Entry.Kind()
	return img.hostRun(&mapping{kind: kind, host: e.Offset(), entry: e}, 1)
}

// shareTree makes the same content part of another tree: it adds a reference to everything that the L2 tables refer to, writes copies of
// these, and returns an L1 table that refers to the copies. By way of them nothing may be written in place (rule 7).
func (s *shadow) shareTree(l1 []byte, at format.HostOffset) ([]byte, error) {
	g := s.img.geometry
	shared := make([]byte, len(l1))
	err := s.eachTable(l1, at, func(i uint64, e format.L1Entry, table []byte) error {
		if _, err := s.countUsed(g.ClusterOf(e.Offset())); err != nil {
			return err
		}
		err := s.eachCluster(table, e.Offset(), func(x run, entry *format.MappingEntry) error {
			if entry.L2Entry.Kind() != format.Compressed {
				entry.L2Entry = entry.WithCopied(false)
			}
			return s.refer(x)
		})
		if err != nil {
			return err
		}
		x, err := s.write(table)
		if err != nil {
			return err
		}
		format.PutEntry(shared, i, uint64(format.NewL1Entry(g.OffsetOf(x.first), true)))
		return nil
	})
	return shared, err
}

// dropTables takes the references of an L1 table's L2 tables away, and the reference to each of them.
func (s *shadow) dropTables(l1 []byte, at format.HostOffset) error {
	return s.eachTable(l1, at, func(_ uint64, e format.L1Entry, table []byte) error {
		err := s.eachCluster(table, e.Offset(), func(x run, _ *format.MappingEntry) error { return s.drop(x) })
		if err != nil {
			return err
		}
		return s.retire(e.Offset(), s.img.geometry.ClusterSize())
	})
}

// dropTree is dropTables and the reference to the L1 table itself.
func (s *shadow) dropTree(l1 []byte, at format.HostOffset) error {
	if err := s.dropTables(l1, at); err != nil {
		return err
	}
	return s.retire(at, uint64(len(l1)))
}

// flag sets COPIED in an L2 table's entries where the refcount will be 1, and clears it elsewhere. It tells whether that changed any.
func (s *shadow) flag(table []byte, at format.HostOffset) (changed bool, err error) {
	err = s.eachCluster(table, at, func(x run, e *format.MappingEntry) error {
		if e.L2Entry.Kind() == format.Compressed {
			return nil
		}
		count, err := s.countUsed(x.first)
		if err != nil {
			return err
		}
		changed = changed || e.Copied() != (count == 1)
		e.L2Entry = e.WithCopied(count == 1)
		return nil
	})
	return changed, err
}

// flagActive brings COPIED in the active tree in accordance with the refcounts that will be. It returns the L1 table then, and
// whether it differs from the present one.
func (s *shadow) flagActive() (l1 []byte, changed bool, err error) {
	l1 = append([]byte(nil), s.img.l1...)
	err = s.eachTable(s.img.l1, s.img.l1offset, func(i uint64, e format.L1Entry, table []byte) error {
		now, err := s.flagTable(e, table)
		changed = changed || now != e
		format.PutEntry(l1, i, uint64(now))
		return err
	})
	return l1, changed, err
}

// flagTable is flag for a table of the active tree, which is replaced where it changes. It returns the L1 entry then.
func (s *shadow) flagTable(e format.L1Entry, table []byte) (format.L1Entry, error) {
	g := s.img.geometry
	changed, err := s.flag(table, e.Offset())
	if err != nil {
		return e, err
	}
	if !changed {
		count, err := s.countUsed(g.ClusterOf(e.Offset()))
		return e.WithCopied(count == 1), err
	}
	x, err := s.write(table)
	if err != nil {
		return e, err
	}
	return format.NewL1Entry(g.OffsetOf(x.first), true), s.retire(e.Offset(), g.ClusterSize())
}

// activate makes l1, written to x, the active L1 table in memory.
func (img *Image) activate(l1 []byte, x run) {
	img.l1mu.Lock()
	defer img.l1mu.Unlock()
	img.l1, img.l1offset = l1, img.geometry.OffsetOf(x.first)
}
