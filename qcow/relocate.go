package qcow

import (
	"errors"
	"slices"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// moveShared moves what is behind the limit and not the active L2 tables' alone: clusters and tables of snapshots, the L1 tables, the
// snapshot table, the refcounts. Clusters of a snapshot are never written, so they are copied while requests go on. Then all tables that
// refer to something in its old place are replaced at once.
func (c *compaction) moveShared() error {
	places, err := c.copyShared()
	if err != nil {
		return err
	}
	taken := sortRuns(placesOf(places))
	err = c.img.underShadow(func(s *shadow) (func(*format.Header), func(), error) {
		s.stop = c.ctx.Err
		s.end = c.end // tables that find no place in the file stay, or it would get longer
		r := &relocation{shadow: s, limit: c.limit, places: places}
		return r.build()
	})
	if err != nil {
		for _, x := range taken {
			c.img.alloc.giveBack(x)
		}
		if errors.Is(err, errNoPlace) {
			return nil
		}
		return err
	}
	c.done(uint64(len(places)))
	return nil
}

func placesOf(places map[format.Cluster]format.Cluster) []run {
	var runs []run
	for _, to := range places {
		runs = append(runs, run{to, 1})
	}
	return runs
}

// copyShared copies the guest clusters of snapshots that are behind the limit, as far as there are free ones before it, and returns
// where to.
func (c *compaction) copyShared() (map[format.Cluster]format.Cluster, error) {
	img := c.img
	places := map[format.Cluster]format.Cluster{}
	var copied error
	for i := range img.snapshots {
		l1, err := img.readSnapshotL1(&img.snapshots[i])
		if err != nil {
			return nil, err
		}
		walk := &shadow{img: img}
		err = walk.eachTable(l1, img.snapshots[i].L1Offset, func(_ uint64, e format.L1Entry, table []byte) error {
			if err := c.ctx.Err(); err != nil {
				return err
			}
			return walk.eachCluster(table, e.Offset(), func(x run, entry *format.MappingEntry) error {
				if _, known := places[x.first]; known || c.full || x.first < c.limit || entry.L2Entry.Kind() == format.Compressed {
					return nil
				}
				to, err := img.alloc.takeBelow(1, c.limit)
				if err != nil || to.n == 0 {
					c.full = c.full || err == nil
					return err
				}
				places[x.first] = to.first
				return c.copy(0, &mapping{kind: format.Data, host: img.geometry.OffsetOf(x.first)}, to)
			})
		})
		if copied = err; copied != nil {
			break
		}
	}
	if copied == nil && len(places) > 0 {
		copied = img.syncData()
	}
	if copied != nil {
		for _, x := range placesOf(places) {
			img.alloc.giveBack(x)
		}
		return nil, copied
	}
	return places, nil
}

// relocation replaces tables within a shadow.
type relocation struct {
	*shadow
	limit  format.Cluster
	places map[format.Cluster]format.Cluster // of guest clusters that were copied
	tables map[format.HostOffset]run         // L2 tables that were replaced
}

// build relocates every tree, and what else is behind the limit.
func (r *relocation) build() (func(*format.Header), func(), error) {
	img := r.img
	r.tables = map[format.HostOffset]run{}
	if err := r.moveCounts(); err != nil {
		return nil, nil, err
	}
	l1, changed, err := r.tree(img.l1, img.l1offset)
	if err != nil {
		return nil, nil, err
	}
	list := slices.Clone(img.snapshots)
	listChanged := r.behind(img.header.SnapshotsOffset)
	for i := range list {
		moved, err := r.snapshot(&list[i])
		if err != nil {
			return nil, nil, err
		}
		listChanged = listChanged || moved
	}
	if err := r.moveRefcounts(); err != nil {
		return nil, nil, err
	}
	change, done := func(*format.Header) {}, func() {}
	if listChanged && len(list) > 0 {
		if change, done, err = r.replaceSnapshots(list); err != nil {
			return nil, nil, err
		}
	}
	if changed || r.behind(img.l1offset) {
		changeL1, doneL1, err := r.replaceL1(l1, uint64(img.Size()), img.snapshots)
		return func(h *format.Header) { change(h); changeL1(h) }, func() { done(); doneL1() }, err
	}
	if len(r.blocks) == 0 && !listChanged && !r.behind(img.alloc.counts.offset) {
		return nil, nil, nil
	}
	return change, done, nil
}

func (r *relocation) behind(off format.HostOffset) bool {
	return r.img.geometry.ClusterOf(off) >= r.limit
}

// moveCounts gives the clusters in their new places the references of the old ones.
func (r *relocation) moveCounts() error {
	for from, to := range r.places {
		count, err := r.count(from)
		if err != nil {
			return err
		}
		for range count {
			if err := r.drop(run{from, 1}); err != nil {
				return err
			}
		}
		for range count - 1 { // the first is what it was allocated with
			if err := r.refer(run{to, 1}); err != nil {
				return err
			}
		}
	}
	return nil
}

// snapshot relocates a snapshot's tree, and tells whether its entry has changed.
func (r *relocation) snapshot(s *format.Snapshot) (bool, error) {
	l1, err := r.img.readSnapshotL1(s)
	if err != nil {
		return false, err
	}
	moved, changed, err := r.tree(l1, s.L1Offset)
	if err != nil || !changed && !r.behind(s.L1Offset) || len(l1) == 0 {
		return false, err
	}
	if err := r.retire(s.L1Offset, uint64(len(l1))); err != nil {
		return false, err
	}
	x, err := r.write(moved)
	s.L1Offset = r.img.geometry.OffsetOf(x.first)
	return true, err
}

// tree relocates the L2 tables of a tree, and returns its L1 table then.
func (r *relocation) tree(l1 []byte, at format.HostOffset) (moved []byte, changed bool, err error) {
	moved = append([]byte(nil), l1...)
	err = r.eachTable(l1, at, func(i uint64, e format.L1Entry, table []byte) error {
		x, known := r.tables[e.Offset()]
		if !known {
			if x, err = r.table(e, table); err != nil {
				return err
			}
			r.tables[e.Offset()] = x
		}
		if x.n > 0 {
			changed = true
			format.PutEntry(moved, i, uint64(format.NewL1Entry(r.img.geometry.OffsetOf(x.first), e.Copied())))
		}
		return nil
	})
	return moved, changed, err
}

// table writes an L2 table anew if it is behind the limit or refers to a cluster that has moved; else it returns a run of 0. The new table has
// as many owners as the old one.
func (r *relocation) table(e format.L1Entry, table []byte) (run, error) {
	img := r.img
	changed := r.behind(e.Offset())
	err := r.eachCluster(table, e.Offset(), func(x run, entry *format.MappingEntry) error {
		to, moved := r.places[x.first]
		if moved && entry.L2Entry.Kind() != format.Compressed {
			changed = true
			entry.L2Entry = entry.WithOffset(img.geometry.OffsetOf(to))
		}
		return nil
	})
	if err != nil || !changed {
		return run{}, err
	}
	from := run{img.geometry.ClusterOf(e.Offset()), 1}
	count, err := r.count(from.first)
	if err != nil {
		return run{}, err
	}
	to, err := r.write(table)
	if err != nil {
		return run{}, err
	}
	for n := range count {
		if n > 0 {
			if err := r.refer(to); err != nil {
				return run{}, err
			}
		}
		if err := r.retire(e.Offset(), img.geometry.ClusterSize()); err != nil {
			return run{}, err
		}
	}
	return to, nil
}

// moveRefcounts makes the refcount blocks that are behind the limit change, so that they are written elsewhere.
func (r *relocation) moveRefcounts() error {
	counts, g := &r.img.alloc.counts, r.img.geometry
	for i := range uint64(len(counts.table)) / format.EntrySize {
		if at := counts.block(format.Cluster(i << g.BlockBits())); at != 0 && r.behind(at) {
			if _, err := r.block(i); err != nil {
				return err
			}
		}
	}
	return nil
}
