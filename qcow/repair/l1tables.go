package repair

import (
	"bytes"
	"context"
	"fmt"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// correctL1Tables makes new L1 tables in the place of those that name what has moved, are wrong or lie in a wrong place.
func (r *repairer) correctL1Tables(ctx context.Context) error {
	to, err := r.correctL1(L1Table, &r.active)
	if err != nil {
		return err
	}
	r.next.L1Offset = to
	if r.active.bytes == 0 && !r.h.Aligned(to) {
		r.next.L1Offset = 0
		r.changed(Change{Kind: EntryCorrected, Table: Header, Offset: 40, Old: uint64(to), Detail: "an empty L1 table"})
	}
	for i := range r.snapshots {
		s := &r.snapshots[i]
		if to, err = r.correctL1(SnapshotL1Table, &s.l1); err != nil {
			return err
		}
		if s.L1Offset != to {
			s.L1Offset, r.badSnapshots = to, true
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	}
	return nil
}

// correctL1 returns where the corrected table is.
func (r *repairer) correctL1(t Table, g *region) (format.HostOffset, error) {
	old := make([]byte, g.bytes)
	if err := r.read(t, old, g.off); err != nil {
		return 0, err
	}
	b := bytes.Clone(old)
	for i := range g.bytes / format.EntrySize {
		e := format.L1Entry(format.Entry(b, i))
		if e == 0 {
			continue
		}
		to, err := r.correctL1Entry(t, g.off+format.HostOffset(i*format.EntrySize), e, uint32(i))
		if err != nil {
			return 0, err
		}
		format.PutEntry(b, i, uint64(to))
	}
	moves := !r.owns(table, g)
	if moves {
		r.changed(Change{Kind: TableMoved, Table: t, Offset: g.off, Detail: "another structure lies there, or the file ends there"})
	}
	if !moves && bytes.Equal(b, old) {
		return g.off, nil
	}
	return r.replaceTable(t, g, b)
}

// replaceTable writes a table that takes the place of the one in g.
func (r *repairer) replaceTable(t Table, g *region, b []byte) (format.HostOffset, error) {
	if err := r.leave(table, g); err != nil {
		return 0, err
	}
	n := r.h.ClustersFor(uint64(len(b)))
	off, err := r.allocate(table, n)
	if err != nil {
		return 0, err
	}
	return off, r.write(t, append(b, make([]byte, n<<r.h.ClusterBits-uint64(len(b)))...), off)
}

// correctL1Entry returns what takes the place of entry e at the offset `at`.
func (r *repairer) correctL1Entry(t Table, at format.HostOffset, e format.L1Entry, slot uint32) (format.L1Entry, error) {
	c := Change{Kind: EntryCorrected, Table: t, Offset: at, Old: uint64(e)}
	off, problem := r.l2Target(e)
	switch {
	case problem != "":
		to, err := r.lostTable(slot)
		if err != nil {
			return 0, err
		}
		c.Kind, c.New = TableLost, uint64(to)
		if r.rawFile() {
			c.Kind = EntryCorrected
		}
		c.Detail = fmt.Sprintf("guest offsets from %#x: %s", uint64(r.guestOffset(slot, 0)), problem)
		r.changed(c)
		return to, nil
	case off == 0:
		c.Detail = "flags without an L2 table"
		r.changed(c)
		return 0, nil
	}

	entry := e &^ format.L1Entry(e.Reserved())
	if entry != e {
		c.New, c.Detail = uint64(entry), fmt.Sprintf("reserved bits %#x", e.Reserved())
		r.changed(c)
	}
	target, to := r.l2Table(off), off
	switch {
	case target == nil:
		return 0, fmt.Errorf("%v at %#x has changed meanwhile", t, uint64(at))
	case t == L1Table && target.seen, target.taken == target.times:
		var err error
		if to, err = r.copyL2(target, slot); err != nil {
			return 0, err
		}
	default:
		target.taken++
		target.seen = true
		if target.to != 0 {
			to = target.to
		}
	}
	if t == SnapshotL1Table { // there COPIED means nothing
		if to != off {
			entry = format.NewL1Entry(to, false)
		}
		return entry, nil
	}
	entry = format.NewL1Entry(to, entry.Copied())
	count := r.clusters.word(uint64(r.h.ClusterOf(to))).count()
	if copied := count == 1; entry.Copied() != copied {
		c.Kind, c.Old, c.New = CopiedCleared, uint64(e), uint64(entry.WithCopied(copied))
		if copied {
			c.Kind = CopiedSet
		}
		c.Detail = fmt.Sprintf("refcount %d", count)
		r.changed(c)
		entry = entry.WithCopied(copied)
	}
	return entry, nil
}

// lostTable returns what takes the place of an L1 entry that cannot be followed: a table of zeroes where there is something
// behind the image that would show through else, one of everything in a raw data file.
func (r *repairer) lostTable(slot uint32) (format.L1Entry, error) {
	b := make([]byte, r.h.ClusterSize())
	switch {
	case r.rawFile():
		for i := range r.h.L2Entries() {
			r.h.PutMappingEntry(b, i, r.dataFileEntry(r.guestOffset(slot, i)))
		}
	case r.h.BackingFile != "" && r.h.Version > 2:
		e := format.MappingEntry{L2Entry: format.ZeroPlain}
		if r.h.ExtendedL2 {
			e = format.MappingEntry{Subclusters: format.AllZero}
		}
		for i := range r.h.L2Entries() {
			r.h.PutMappingEntry(b, i, e)
		}
	default:
		return 0, nil
	}
	off, err := r.placeL2(b)
	return format.NewL1Entry(off, true), err
}
