package repair

import (
	"bytes"
	"context"
	"fmt"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// correctL2Tables makes new L2 tables in the place of those that are wrong, lie in a wrong place, or are needed twice.
func (r *repairer) correctL2Tables(ctx context.Context) error {
	for i := range r.tables {
		if err := r.correctL2(&r.tables[i]); err != nil {
			return err
		}
		if err := r.progress(ctx); err != nil {
			return err
		}
	}
	return nil
}

func (r *repairer) correctL2(t *l2Table) error {
	old, err := r.readL2(t.off)
	if err != nil {
		return err
	}
	b := r.freshL2(old)
	if err := r.correctEntries(t, b, t.slot, uint64(t.times)); err != nil {
		return err
	}
	place := region{off: t.off, bytes: r.h.ClusterSize(), owned: 1}
	moves := t.moves || !r.owns(l2, &place)
	if moves {
		r.changed(Change{Kind: TableMoved, Table: L2Table, Offset: t.off, Detail: "another structure lies there"})
	}
	if !moves && bytes.Equal(b, old) {
		return nil
	}
	if err := r.leave(l2, &place); err != nil {
		return err
	}
	if t.to, err = r.placeL2(b); err != nil {
		return err
	}
	return r.refer(t.to, uint64(t.times)-1)
}

// copyL2 returns the place of a copy of t for a further L1 entry, the one of the slot.
func (r *repairer) copyL2(t *l2Table, slot uint32) (format.HostOffset, error) {
	old, err := r.readL2(t.off)
	if err != nil {
		return 0, err
	}
	b := r.freshL2(old)
	if err := r.correctEntries(t, b, slot, 1); err != nil {
		return 0, err
	}
	to, err := r.placeL2(b)
	if err == nil {
		r.changed(Change{Kind: TableCopied, Table: L2Table, Offset: t.off, Old: uint64(t.off), New: uint64(to)})
	}
	return to, err
}

// freshL2 returns a copy of an L2 table, valid until the next call.
func (r *repairer) freshL2(old []byte) []byte {
	r.fresh = append(r.fresh[:0], old...)
	return r.fresh
}

// placeL2 writes a new L2 table.
func (r *repairer) placeL2(b []byte) (format.HostOffset, error) {
	off, err := r.allocate(l2, 1)
	if err != nil {
		return 0, err
	}
	return off, r.write(L2Table, b, off)
}

// refer adds n references to the cluster at off.
func (r *repairer) refer(off format.HostOffset, n uint64) error {
	cl := uint64(r.h.ClusterOf(off))
	w, _, err := r.clusters.at(cl)
	if err != nil {
		return err
	}
	return r.count(w, cl, n)
}

// correctEntries corrects the entries of the L2 table of the slot in b, to which times L1 entries refer.
func (r *repairer) correctEntries(t *l2Table, b []byte, slot uint32, times uint64) error {
	for i := range r.h.L2Entries() {
		old := r.h.MappingEntry(b, i)
		if old == (format.MappingEntry{}) {
			continue
		}
		at := r.guestOffset(slot, i)
		v := r.judgeEntry(old, at)
		c := Change{Kind: EntryCorrected, Table: L2Table, Offset: t.off + format.HostOffset(i*r.h.L2EntrySize()), Old: uint64(old.L2Entry), Detail: v.problem}
		if v.lost && v.hadData {
			c.Kind = ClusterLost
			c.Detail = fmt.Sprintf("guest offset %#x: %s", uint64(at), v.problem)
		}
		if v.problem != "" {
			c.New = uint64(v.entry.L2Entry)
			r.changed(c)
		}
		if !v.lost && v.flagged {
			e, err := r.correctFlagged(t, v, c, times)
			if err != nil {
				return err
			}
			v.entry.L2Entry = e
		}
		r.h.PutMappingEntry(b, i, v.entry)
	}
	return nil
}

// correctFlagged gives an entry a cluster of its own where it shares one that has too many references, and sets its COPIED
// flag, which in snapshots means nothing.
func (r *repairer) correctFlagged(t *l2Table, v verdict, c Change, times uint64) (format.L2Entry, error) {
	e, count := v.entry.L2Entry, uint64(1)
	if v.n > 0 {
		count = r.clusters.word(v.first).count()
	}
	if count > r.h.MaxRefcount() && r.h.CryptMethod != luks {
		to, err := r.copyData(v.first, times)
		if err != nil {
			return 0, err
		}
		e, count = format.NewL2Entry(to, false)|e&format.ZeroPlain, times
		r.changed(Change{Kind: DataCopied, Table: c.Table, Offset: c.Offset, Old: c.Old, New: uint64(e)})
	}
	copied := count == 1
	if !t.active || e.Copied() == copied {
		return e, nil
	}
	c.Kind, c.Old, c.New = CopiedCleared, uint64(e), uint64(e.WithCopied(copied))
	if copied {
		c.Kind = CopiedSet
	}
	c.Detail = fmt.Sprintf("refcount %d", count)
	r.changed(c)
	return e.WithCopied(copied), nil
}

// luks is the encryption method in which the place of a cluster is part of its key: only who has the key can move one.
const luks = 2

// copyData gives n of the references to a guest cluster a copy.
func (r *repairer) copyData(cl, n uint64) (format.HostOffset, error) {
	to, err := r.allocate(data, 1)
	if err != nil {
		return 0, err
	}
	w, _, err := r.clusters.at(cl)
	if err != nil {
		return 0, err
	}
	*w -= word(n) // references
	if err := r.refer(to, n-1); err != nil {
		return 0, err
	}
	b := make([]byte, r.h.ClusterSize())
	if err := r.read(Cluster, b, r.h.OffsetOf(format.Cluster(cl))); err != nil {
		return 0, err
	}
	return to, r.write(Cluster, b, to)
}
