package repair

import (
	"context"
	"errors"
	"fmt"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// region is a place of the file that a pointer gives to one structure.
type region struct {
	off   format.HostOffset
	bytes uint64
	owned uint64 // the first so many of its clusters it was the first to claim
}

// errBitmaps ends a walk in which the bitmaps turn out to be unusable. The walk begins again without them.
var errBitmaps = errors.New("the bitmaps are dropped")

// walk counts the references to every cluster. A cluster goes to whoever has no choice: first the structures that cannot
// move, then guest data, then tables in the order in which they are met. A table that does not get its clusters moves. Bitmaps
// that meet anything else are dropped, for one side has been writing to the other.
func (r *repairer) walk(ctx context.Context) error {
	for {
		r.clusters = newClusterMap(r.h.Geometry, &r.budget, r.readStored)
		r.budget.left = r.budget.total - int64(cap(r.blocks))*format.EntrySize - r.snapshotMemory()
		r.tables, r.others, r.foreign = nil, nil, make(map[format.HostOffset]*l2Table)
		r.alloc, r.outside, r.worked = r.newAllocator(), make(outside), 0
		faults, lost, bad := r.faults, r.lost, r.badRefcounts
		err := r.walkOnce(ctx)
		if err == nil && r.lost > lost && r.dropBitmaps == "" && r.hasBitmaps() {
			r.dropBitmaps = "what they cover has changed"
			err = errBitmaps
		}
		if !errors.Is(err, errBitmaps) {
			return err
		}
		r.faults, r.lost, r.badRefcounts = faults+1, lost+1, bad
	}
}

func (r *repairer) walkOnce(ctx context.Context) error {
	for _, step := range []func(context.Context) error{
		r.claimFixed, r.claimRefcounts, r.walkActiveL1, r.walkSnapshots, r.walkBitmaps, r.listL2Tables, r.walkL2Tables,
	} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	return nil
}

func (r *repairer) claimFixed(ctx context.Context) error {
	if err := r.clusters.set(0, newWord(fixed, 1)); err != nil {
		return err
	}
	return r.claim(ctx, fixed, &r.encrypted)
}

// claim claims the clusters of a table up to the first one that another structure has already. The others it only notes: nothing may
// be put there before the pointer is gone, not even past the end of the file.
func (r *repairer) claim(ctx context.Context, u use, g *region) error {
	g.owned = 0
	first := uint64(r.h.ClusterOf(g.off))
	n := r.h.ClustersFor(g.bytes)
	for i := range n {
		if first+i >= r.end {
			r.fault()
			return r.reach(first+i, n-i)
		}
		if i%chunkSize == chunkSize-1 && ctx.Err() != nil {
			return ctx.Err()
		}
		w, _, err := r.clusters.at(first + i)
		if err != nil {
			return err
		}
		switch w.use() {
		case unused:
			*w |= newWord(u, 1)
		case refcounts:
			r.displaceRefcounts(first+i, u)
			*w = newWord(u, 1) | reached
		default:
			r.fault()
			if u == bitmap || w.use() == bitmap {
				return r.bitmapsUnusable("they lie where another structure lies, at %#x", uint64(g.off))
			}
			return r.reach(first+i, n-i)
		}
		g.owned++
	}
	return nil
}

// owns reports whether all clusters of the region are its own, and in the file.
func (r *repairer) owns(u use, g *region) bool {
	if g.owned != r.h.ClustersFor(g.bytes) {
		return false
	}
	first := uint64(r.h.ClusterOf(g.off))
	for i := range g.owned {
		if r.clusters.word(first+i).use() != u {
			return false
		}
	}
	return true
}

// leave takes the references of a region back. Its clusters are free, but not yet: the header still reaches them.
func (r *repairer) leave(u use, g *region) error {
	first := uint64(r.h.ClusterOf(g.off))
	for i := range g.owned {
		w, _, err := r.clusters.at(first + i)
		if err != nil {
			return err
		}
		if w.use() == u {
			*w = reached
		}
	}
	return nil
}

// reach notes that something points to n clusters, which may lie past the end of the file.
func (r *repairer) reach(first, n uint64) error {
	for ; n > 0 && first < r.end; first, n = first+1, n-1 {
		if err := r.clusters.reach(first); err != nil {
			return err
		}
	}
	return r.outside.add(first-r.end, n, &r.budget)
}

// fault counts something that mode Leaks does not repair.
func (r *repairer) fault() { r.faults++ }

// cannotFollow counts a pointer that may have meant clusters which nothing else refers to.
func (r *repairer) cannotFollow() {
	r.faults++
	r.lost++
}

// bitmapsUnusable gives the bitmaps up.
func (r *repairer) bitmapsUnusable(why string, args ...any) error {
	r.dropBitmaps = fmt.Sprintf(why, args...)
	return errBitmaps
}

// walkActiveL1 claims the active L1 table and the L2 tables that it names.
func (r *repairer) walkActiveL1(ctx context.Context) error {
	if err := r.claim(ctx, table, &r.active); err != nil {
		return err
	}
	if r.active.bytes == 0 && !r.h.Aligned(r.active.off) {
		r.fault() // an empty table at an impossible place
	}
	return r.walkL1(ctx, L1Table, &r.active)
}

// walkSnapshots claims the snapshot table, and does for each snapshot what walkActiveL1 does for the disk.
func (r *repairer) walkSnapshots(ctx context.Context) error {
	if err := r.claim(ctx, table, &r.snapTable); err != nil {
		return err
	}
	for i := range r.snapshots {
		l1 := &r.snapshots[i].l1
		if err := r.claim(ctx, table, l1); err != nil {
			return err
		}
		if l1.owned < r.h.ClustersFor(l1.bytes) { // another walk of the same table would cost as much again
			if err := r.alloc.promise(r.h.ClustersFor(l1.bytes)); err != nil {
				return err
			}
		}
		if err := r.walkL1(ctx, SnapshotL1Table, l1); err != nil {
			return err
		}
	}
	return nil
}

func (r *repairer) walkL1(ctx context.Context, t Table, g *region) error {
	slot := uint64(0)
	return r.stream(ctx, t, g.off, g.bytes, func(_ format.HostOffset, b []byte) error {
		for i := range uint64(len(b)) / format.EntrySize {
			if e := format.L1Entry(format.Entry(b, i)); e != 0 {
				if err := r.walkL1Entry(t, e, slot+i); err != nil {
					return err
				}
			}
		}
		slot += uint64(len(b)) / format.EntrySize
		return nil
	})
}

func (r *repairer) walkL1Entry(t Table, e format.L1Entry, slot uint64) error {
	off, problem := r.l2Target(e)
	if problem != "" {
		r.cannotFollow()
		if cl := uint64(r.h.ClusterOf(e.Offset())); cl >= r.end && r.h.Aligned(e.Offset()) {
			return r.reach(cl, 1)
		}
		return nil
	}
	if off == 0 || e.Reserved() != 0 {
		r.fault()
	}
	if off == 0 {
		return nil
	}
	return r.claimL2Table(t, e, slot)
}

// l2Target returns the L2 table of an L1 entry, 0 for none, or what keeps it from being followed.
func (r *repairer) l2Target(e format.L1Entry) (off format.HostOffset, problem string) {
	off = e.Offset()
	switch {
	case off == 0:
		return 0, ""
	case !r.h.Aligned(off):
		return 0, fmt.Sprintf("%#x is not the start of a cluster", uint64(off))
	case uint64(off) >= r.size:
		return 0, fmt.Sprintf("%#x is outside the file of %d bytes", uint64(off), r.size)
	case r.isFixed(uint64(r.h.ClusterOf(off))):
		return 0, fmt.Sprintf("%#x is where the encryption header is", uint64(off))
	}
	return off, ""
}
