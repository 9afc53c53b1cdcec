package qcow

import (
	"slices"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// contents is what L2 entries say that version 2 may have no word for.
type contents struct{ zeroes, compressed bool }

// survey looks at every entry of the disk and its snapshots.
func (a *amendment) survey(img *Image) (found contents, err error) {
	e := a.expansion(&shadow{img: img, stop: a.ctx.Err})
	err = e.eachTable(func(_ *l2Fate, at format.HostOffset, table []byte) error {
		return e.eachEntry(table, at, func(_ uint64, kind format.Kind, _ format.MappingEntry) error {
			found.zeroes = found.zeroes || isZeroKind(kind)
			found.compressed = found.compressed || kind == format.Compressed
			return nil
		})
	})
	return found, err
}

func isZeroKind(k format.Kind) bool { return k == format.ZeroedPlain || k == format.ZeroAllocated }

// expandZeroes gets rid of clusters that are marked to read as zeroes, which version 2 has not, in the disk and its snapshots: without a
// backing file they are just unlinked, with one they get clusters that hold zeroes. All tables change at once.
func (a *amendment) expandZeroes(img *Image) error {
	if !a.downgrades() {
		return nil
	}
	return img.underShadow(func(s *shadow) (func(*format.Header), func(), error) {
		s.stop = a.ctx.Err
		e := a.expansion(s)
		if found, err := e.prepare(); err != nil || !found {
			return nil, nil, err
		}
		return e.rewrite()
	})
}

// expansion is the making of tables without zero clusters. It goes over the L2 tables twice, as COPIED can be told only when all
// references are counted.
type expansion struct {
	a      *amendment
	s      *shadow
	backed bool
	tables map[format.HostOffset]*l2Fate
	made   int
}

// l2Fate is what becomes of an L2 table.
type l2Fate struct {
	references uint64 // from L1 tables
	seen       bool   // in this pass
	fresh      run    // clusters for its zero clusters, in the order of the entries; none without a backing file
	moved      run    // where it is in the end; none: where it was
}

func (a *amendment) expansion(s *shadow) *expansion {
	return &expansion{a: a, s: s, backed: s.img.header.BackingFile != ""}
}

// eachL1 calls fn for every L1 table: the active one with the index -1, then those of the snapshots.
func (e *expansion) eachL1(fn func(snapshot int, l1 []byte, at format.HostOffset) error) error {
	img := e.s.img
	if err := fn(-1, img.l1, img.l1offset); err != nil {
		return err
	}
	for i := range img.snapshots {
		l1, err := img.readSnapshotL1(&img.snapshots[i])
		if err != nil {
			return err
		}
		if err := fn(i, l1, img.snapshots[i].L1Offset); err != nil {
			return err
		}
	}
	return nil
}

// count counts the references to L2 tables.
func (e *expansion) count() error {
	e.tables = map[format.HostOffset]*l2Fate{}
	return e.eachL1(func(_ int, l1 []byte, _ format.HostOffset) error {
		for i := range uint64(len(l1)) / format.EntrySize {
			at := format.L1Entry(format.Entry(l1, i)).Offset()
			switch t := e.tables[at]; {
			case at == 0:
			case t != nil:
				t.references++
			default:
				e.tables[at] = &l2Fate{references: 1}
			}
		}
		return nil
	})
}

// eachTable calls fn for every L2 table once.
func (e *expansion) eachTable(fn func(t *l2Fate, at format.HostOffset, table []byte) error) error {
	if err := e.count(); err != nil {
		return err
	}
	return e.eachL1(func(_ int, l1 []byte, at format.HostOffset) error {
		return e.s.eachTable(l1, at, func(_ uint64, entry format.L1Entry, table []byte) error {
			t := e.tables[entry.Offset()]
			if t.seen {
				return nil
			}
			t.seen = true
			return fn(t, entry.Offset(), table)
		})
	})
}

func (e *expansion) eachEntry(table []byte, at format.HostOffset, fn func(i uint64, kind format.Kind, entry format.MappingEntry) error) error {
	img, g := e.s.img, e.s.img.geometry
	for i := range g.L2Entries() {
		entry, err := img.entryAt(table, i, at, i)
		if err != nil {
			return err
		}
		if err := fn(i, g.Kind(entry, 0), entry); err != nil {
			return err
		}
	}
	return nil
}

// prepare takes away the clusters that zero clusters have, and allocates those that they need. It returns whether there are any.
func (e *expansion) prepare() (found bool, err error) {
	err = e.eachTable(func(t *l2Fate, at format.HostOffset, table []byte) error {
		zeroes := uint64(0)
		err := e.eachEntry(table, at, func(_ uint64, kind format.Kind, entry format.MappingEntry) error {
			if !isZeroKind(kind) {
				return nil
			}
			zeroes++
			return e.take(e.s.img.entryRun(entry), t.references)
		})
		found = found || zeroes > 0
		if err != nil || zeroes == 0 || !e.backed {
			return err
		}
		t.fresh, err = e.allocateZeroes(zeroes, t.references)
		return err
	})
	return found, err
}

// take takes n references from the clusters of x.
func (e *expansion) take(x run, n uint64) error {
	s, g := e.s, e.s.img.geometry
	if x.n == 0 {
		return nil
	}
	if err := s.img.mustBeData(g.OffsetOf(x.first), x.n<<g.ClusterBits); err != nil {
		return err
	}
	return s.recount(x, func(c format.Cluster, count uint64) (uint64, error) {
		switch {
		case count < n:
			return 0, s.usedButFree(c)
		case count == n:
			s.freed = appendRun(s.freed, run{c, 1})
		}
		return count - n, nil
	})
}

// add gives n references to the clusters of x, which have one.
func (e *expansion) add(x run, n uint64) error {
	g := e.s.img.geometry
	return e.s.recount(x, func(c format.Cluster, count uint64) (uint64, error) {
		if n > g.MaxRefcount()-count {
			return 0, format.Invalidf("the cluster at %#x would have %d references, more than refcounts of %d bits can say", uint64(g.OffsetOf(c)), count+n, g.RefcountBits())
		}
		return count + n, nil
	})
}

// allocateZeroes allocates n clusters from which the guest reads zeroes.
func (e *expansion) allocateZeroes(n, references uint64) (run, error) {
	img, g := e.s.img, e.s.img.geometry
	x, err := e.s.allocate(n)
	if err != nil {
		return run{}, err
	}
	if err := e.add(x, references-1); err != nil {
		return run{}, err
	}
	area := dataArea{to: img.file, at: g.OffsetOf(x.first), n: n << g.ClusterBits, cipher: e.a.cipher}
	if err := img.file.PunchHole(int64(area.at), int64(area.n)); err != nil {
		return run{}, err
	}
	return x, makeParts(e.a.ctx, area.appendTo(nil, PreallocationMetadata), nil)
}

// rewrite writes the tables that change, and prepares the switch to them.
func (e *expansion) rewrite() (func(*format.Header), func(), error) {
	s, img := e.s, e.s.img
	for _, t := range e.tables {
		t.seen = false
	}
	var active run // the new L1 table
	list, moved := slices.Clone(img.snapshots), false
	err := e.eachL1(func(snapshot int, l1 []byte, at format.HostOffset) error {
		x, err := e.rewriteL1(snapshot < 0, l1, at)
		switch {
		case err != nil || x.n == 0:
		case snapshot < 0:
			active = x
		default:
			list[snapshot].L1Offset, moved = img.geometry.OffsetOf(x.first), true
		}
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	change, done := func(*format.Header) {}, func() {}
	if moved {
		if change, done, err = s.replaceSnapshots(list); err != nil {
			return nil, nil, err
		}
	}
	return func(h *format.Header) {
		change(h)
		if active.n > 0 {
			h.L1Offset = img.geometry.OffsetOf(active.first)
		}
	}, done, nil
}

// rewriteL1 returns where the L1 table is that replaces l1; none when that stays as it is.
func (e *expansion) rewriteL1(active bool, l1 []byte, at format.HostOffset) (run, error) {
	s, g := e.s, e.s.img.geometry
	now, changed := slices.Clone(l1), false
	err := s.eachTable(l1, at, func(i uint64, entry format.L1Entry, table []byte) error {
		t := e.tables[entry.Offset()]
		if !t.seen {
			t.seen = true
			if err := e.rewriteTable(t, active, entry.Offset(), table); err != nil {
				return err
			}
		}
		place := g.ClusterOf(entry.Offset())
		if t.moved.n > 0 {
			place = t.moved.first
			if err := s.retire(entry.Offset(), g.ClusterSize()); err != nil {
				return err
			}
		}
		count, err := s.count(place)
		replaced := format.NewL1Entry(g.OffsetOf(place), active && count == 1)
		changed = changed || replaced.Offset() != entry.Offset() || active && replaced != entry
		format.PutEntry(now, i, uint64(replaced))
		return err
	})
	if err != nil || !changed {
		return run{}, err
	}
	if err := s.retire(at, uint64(len(l1))); err != nil {
		return run{}, err
	}
	return s.write(now)
}

// rewriteTable writes the table t as it will be, if it changes.
func (e *expansion) rewriteTable(t *l2Fate, active bool, at format.HostOffset, table []byte) error {
	s, g := e.s, e.s.img.geometry
	changed, next := false, t.fresh.first
	err := e.eachEntry(table, at, func(i uint64, kind format.Kind, _ format.MappingEntry) error {
		if !isZeroKind(kind) {
			return nil
		}
		changed = true
		var entry format.MappingEntry
		if e.backed {
			entry.L2Entry = format.NewL2Entry(g.OffsetOf(next), t.references == 1)
			next++
		}
		g.PutMappingEntry(table, i, entry)
		return nil
	})
	if err != nil {
		return err
	}
	if active {
		flagged, err := s.flag(table, at)
		if err != nil {
			return err
		}
		changed = changed || flagged
	}
	if !changed {
		return nil
	}
	if t.moved, err = s.write(table); err != nil {
		return err
	}
	if e.a.o.Progress != nil {
		e.made++
		e.a.o.Progress(int64(e.made), int64(len(e.tables)))
	}
	return e.add(t.moved, t.references-1)
}
