package repair

import (
	"cmp"
	"context"
	"slices"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// l2Table is an L2 table that L1 entries name.
type l2Table struct {
	off    format.HostOffset
	to     format.HostOffset // where the corrected one is; 0: it stays as it is
	slot   uint32            // of an L1 entry that names it: which part of a disk it maps
	times  uint32            // L1 entries that share it, at most one of them in the active L1 table
	others uint32            // further L1 entries that name it: each gets a copy
	taken  uint32            // of times, while L1 tables are corrected
	active bool              // the active L1 table names it
	moves  bool              // its cluster belongs to another structure
	seen   bool              // in the active L1 table, while that is corrected
}

const l2TableMemory = 40

// uses returns how often what the table names is referred to through it and its copies.
func (t *l2Table) uses() uint64 { return uint64(t.times) + uint64(t.others) }

// claimL2Table counts an L1 entry that names the table at off.
func (r *repairer) claimL2Table(t Table, e format.L1Entry, slot uint64) error {
	off := e.Offset()
	active := t == L1Table
	cl := uint64(r.h.ClusterOf(off))
	w, stored, err := r.clusters.at(cl)
	if err != nil {
		return err
	}
	if active && e.Copied() != (stored == 1) {
		r.fault()
	}
	switch w.use() {
	case unused, refcounts:
		if w.use() == refcounts {
			r.displaceRefcounts(cl, l2)
			*w = reached
		}
		*w |= newWord(l2, 1)
		return r.addL2Table(l2Table{off: off, slot: uint32(slot), active: active})
	case l2:
	default: // the table is read there, but it moves
		x := r.foreign[off]
		named := x != nil
		if !named {
			r.fault()
			x = &l2Table{off: off, slot: uint32(slot), active: active, moves: true}
			r.foreign[off] = x
			if err := r.budget.take(4 * l2TableMemory); err != nil {
				return err
			}
		}
		if (!active || !named) && uint64(x.times) < r.h.MaxRefcount() {
			x.times++
			return nil
		}
		return r.claimCopy(off)
	}
	// The active L1 table comes first, so that what one of its entries finds named another one has named.
	if active || w.count() >= r.h.MaxRefcount() {
		return r.claimCopy(off)
	}
	return r.count(w, cl, 1)
}

// claimCopy notes that an L1 entry needs a copy of the table at off.
func (r *repairer) claimCopy(off format.HostOffset) error {
	r.fault()
	r.others = append(r.others, off)
	if err := r.budget.take(format.EntrySize); err != nil {
		return err
	}
	return r.alloc.promise(1)
}

// count adds references to a cluster.
func (r *repairer) count(w *word, cl, n uint64) error {
	if n > maxReferences-w.count() {
		return format.Corruptf("cluster", r.h.OffsetOf(format.Cluster(cl)), "more than %d references", maxReferences)
	}
	*w += word(n)
	return nil
}

func (r *repairer) addL2Table(t l2Table) error {
	r.tables = append(r.tables, t)
	return r.budget.take(l2TableMemory)
}

// listL2Tables sorts the tables and counts how often each is named.
func (r *repairer) listL2Tables(context.Context) error {
	for i := range r.tables {
		t := &r.tables[i]
		t.times = uint32(r.clusters.word(uint64(r.h.ClusterOf(t.off))).count())
	}
	for _, t := range r.foreign {
		r.tables = append(r.tables, *t)
	}
	slices.SortFunc(r.tables, func(a, b l2Table) int { return cmp.Compare(a.off, b.off) })
	for _, off := range r.others {
		r.l2Table(off).others++
	}
	return nil
}

// l2Table returns the table at off, which an L1 entry has named.
func (r *repairer) l2Table(off format.HostOffset) *l2Table {
	i, ok := slices.BinarySearchFunc(r.tables, off, func(t l2Table, off format.HostOffset) int { return cmp.Compare(t.off, off) })
	if !ok {
		return nil
	}
	return &r.tables[i]
}

// readL2 reads an L2 table. The result is valid until the next call.
func (r *repairer) readL2(off format.HostOffset) ([]byte, error) {
	if r.l2buf == nil {
		r.l2buf = make([]byte, r.h.ClusterSize())
	}
	return r.l2buf, r.read(L2Table, r.l2buf, off)
}

// walkL2Tables counts what the L2 tables name, as often as they are named themselves.
func (r *repairer) walkL2Tables(ctx context.Context) error {
	for i := range r.tables {
		t := &r.tables[i]
		b, err := r.readL2(t.off)
		if err != nil {
			return err
		}
		for i := range r.h.L2Entries() {
			if e := r.h.MappingEntry(b, i); e != (format.MappingEntry{}) {
				if err := r.walkL2Entry(t, e, r.guestOffset(t.slot, i)); err != nil {
					return err
				}
			}
		}
		if err := r.progress(ctx); err != nil {
			return err
		}
	}
	return nil
}

func (r *repairer) walkL2Entry(t *l2Table, e format.MappingEntry, guest format.GuestOffset) error {
	v := r.judgeEntry(e, guest)
	if v.problem != "" {
		r.fault()
	}
	if v.misplaced {
		r.misplaced++
	}
	if v.lost {
		r.cannotFollow()
		if v.first >= r.end {
			return r.reach(v.first, v.n)
		}
		return nil
	}
	for cl := v.first; cl < v.first+v.n; cl++ {
		w, stored, err := r.clusters.at(cl)
		if err != nil {
			return err
		}
		switch w.use() {
		case unused:
			*w |= newWord(data, 0)
		case data:
		case bitmap:
			r.fault()
			return r.bitmapsUnusable("guest data lies where they lie, at %#x", uint64(r.h.OffsetOf(format.Cluster(cl))))
		case refcounts:
			r.displaceRefcounts(cl, data)
			*w = newWord(data, 0) | reached
		default: // a table, which moves
			r.fault()
			*w = newWord(data, 0) | reached
		}
		if err := r.count(w, cl, t.uses()); err != nil {
			return err
		}
		if t.active && v.flagged && e.Copied() != (stored == 1) {
			r.fault()
		}
	}
	if t.active && v.flagged && v.n == 0 && !e.Copied() { // in a data file every cluster has one reference
		r.fault()
	}
	return nil
}
