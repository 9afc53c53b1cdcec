package qcow

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// widthChange is how an image gets refcounts of another width: all blocks and their table are made anew behind the end of the
// file, in clusters that are free in the old refcounts, and the header switches to table and width at once. The new refcounts are
// those of the new world: in it the old blocks and their table are free.
type widthChange struct {
	ctx context.Context
	img *Image
	new format.Geometry

	ranges []uint64   // indexes of the blocks that there will be: those with a refcount that is not 0; ascending
	place  run        // of the blocks, in this order, and of the table behind them
	gone   []run      // where the old blocks and their table are
	isGone clusterSet // the same

	block  []byte // the old block that was read last
	blockI uint64 // its index in the old table, plus 1; 0: none
}

// newWidth works out what a change to refcounts of another width has to do. It fails with ErrInvalid when a refcount is too large for
// them, and with ErrNoSpace when the file is too large for what a refcount table of such blocks covers.
func newWidth(ctx context.Context, img *Image, order uint32) (*widthChange, error) {
	w := &widthChange{ctx: ctx, img: img, new: img.geometry, ranges: []uint64{0}, isGone: clusterSet{}}
	w.new.RefcountOrder = order
	counts, g := &img.alloc.counts, img.geometry
	w.gone = []run{{g.ClusterOf(counts.offset), g.ClustersFor(uint64(len(counts.table)))}}
	for i := range uint64(len(counts.table)) / format.EntrySize {
		if at := format.RefcountTableEntry(format.Entry(counts.table, i)).Offset(); at != 0 {
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			w.gone = append(w.gone, run{g.ClusterOf(at), 1})
			if err := w.surveyBlock(i); err != nil {
				return nil, err
			}
		}
	}
	w.gone = sortRuns(w.gone)
	for _, x := range w.gone {
		w.isGone.add(x.first, x.n)
	}
	return w, w.choosePlace()
}

// surveyBlock looks at the refcounts of an old block.
func (w *widthChange) surveyBlock(i uint64) error {
	g := w.img.geometry
	first := format.Cluster(i << g.BlockBits())
	for k := range g.BlockEntries() {
		c := first + format.Cluster(k)
		count, err := w.old(c)
		if err != nil {
			return err
		}
		if count > w.new.MaxRefcount() {
			return format.Invalidf("the cluster at %#x has %d references, more than refcounts of %d bits can say", uint64(g.OffsetOf(c)), count, w.new.RefcountBits())
		}
		if r := uint64(c) >> w.new.BlockBits(); count > 0 && r != w.last() {
			w.ranges = append(w.ranges, r)
		}
	}
	return w.checkLimit()
}

// last returns the index of the last block.
func (w *widthChange) last() uint64 { return w.ranges[len(w.ranges)-1] }

// tableClusters returns how many clusters the new table has.
func (w *widthChange) tableClusters() uint64 {
	return w.new.ClustersFor((w.last() + 1) * format.EntrySize)
}

func (w *widthChange) checkLimit() error {
	if w.tableClusters()<<w.new.ClusterBits > max(format.MaxRefcountTableBytes, w.new.ClusterSize()) {
		return fmt.Errorf("%w: the file is too large for refcounts of %d bits", ErrNoSpace, w.new.RefcountBits())
	}
	return nil
}

// old returns the refcount that a cluster has.
func (w *widthChange) old(c format.Cluster) (uint64, error) {
	g := w.img.geometry
	i := uint64(c) >> g.BlockBits()
	if w.blockI != i+1 {
		at := w.img.alloc.counts.block(c)
		if at == 0 {
			return 0, nil
		}
		if w.block == nil {
			w.block = make([]byte, g.ClusterSize())
		}
		w.blockI = 0
		if err := readFull(w.img.file, w.block, at); err != nil {
			return 0, fmt.Errorf("read refcount block at %#x: %w", uint64(at), err)
		}
		w.blockI = i + 1
	}
	return format.Refcount(w.block, g.RefcountOrder, uint64(c)&(g.BlockEntries()-1)), nil
}

// choosePlace finds clusters for the new blocks and their table, which need refcounts themselves. Each time more of them are looked for, so
// this ends.
func (w *widthChange) choosePlace() error {
	needed := slices.Clone(w.ranges) // without the new ones
	for {
		n := uint64(len(w.ranges)) + w.tableClusters()
		if w.place.n >= n {
			w.place.n = n
			return nil
		}
		first, err := w.freeBehind(n)
		if err != nil {
			return err
		}
		w.place = run{first, n}
		w.ranges = slices.Clone(needed)
		for r := uint64(first) >> w.new.BlockBits(); r <= uint64(w.place.end()-1)>>w.new.BlockBits(); r++ {
			if at, found := slices.BinarySearch(w.ranges, r); !found {
				w.ranges = slices.Insert(w.ranges, at, r)
			}
		}
		if err := w.checkLimit(); err != nil {
			return err
		}
	}
}

// freeBehind returns the first of n neighbouring free clusters behind the end of the file. The refcounts may know of clusters there.
func (w *widthChange) freeBehind(n uint64) (format.Cluster, error) {
	a := &w.img.alloc
	x := run{first: format.Cluster(a.end.Load())}
	for x.n < n {
		free, err := a.counts.freeRun(x.end(), n-x.n)
		if err != nil {
			return 0, err
		}
		if free.first != x.end() {
			x = run{first: free.first}
		}
		x.n += free.n
	}
	return x.first, nil
}

// write makes the new blocks and their table.
func (w *widthChange) write(progress func(done, total int64)) error {
	img, g := w.img, w.new
	if err := img.file.Truncate(int64(g.OffsetOf(w.place.end()))); err != nil {
		return err
	}
	table := make([]byte, w.tableClusters()<<g.ClusterBits)
	block := make([]byte, g.ClusterSize())
	for k, r := range w.ranges {
		if err := w.ctx.Err(); err != nil {
			return err
		}
		clear(block)
		if err := w.fill(block, format.Cluster(r<<g.BlockBits())); err != nil {
			return err
		}
		at := g.OffsetOf(w.place.first + format.Cluster(k))
		if _, err := img.file.WriteAt(block, int64(at)); err != nil {
			return fmt.Errorf("write refcount block at %#x: %w", uint64(at), err)
		}
		format.PutEntry(table, r, uint64(at))
		if progress != nil {
			progress(int64(k+1), int64(len(w.ranges)))
		}
	}
	if _, err := img.file.WriteAt(table, int64(w.tableAt())); err != nil {
		return fmt.Errorf("write refcount table at %#x: %w", uint64(w.tableAt()), err)
	}
	return w.ctx.Err()
}

// tableAt returns where the new table is.
func (w *widthChange) tableAt() format.HostOffset {
	return w.new.OffsetOf(w.place.first + format.Cluster(len(w.ranges)))
}

// fill puts the refcounts of the clusters from first on into a new block.
func (w *widthChange) fill(block []byte, first format.Cluster) error {
	for i := range w.new.BlockEntries() {
		c := first + format.Cluster(i)
		count, err := w.old(c)
		if err != nil {
			return err
		}
		if c >= w.place.first && c < w.place.end() {
			count = 1
		} else if _, gone := w.isGone.find(c, 1); gone {
			count = 0
		}
		if count > 0 {
			format.PutRefcount(block, w.new.RefcountOrder, i, count)
		}
	}
	return nil
}

// changeRefcounts gives the image refcounts of the width that it shall have.
func (a *amendment) changeRefcounts(img *Image) error {
	if img.geometry.RefcountOrder == a.order {
		return nil
	}
	w, err := newWidth(a.ctx, img, a.order)
	if err != nil {
		return err
	}
	size, err := img.file.Size()
	if err != nil {
		return err
	}
	if err := w.write(a.o.Progress); err != nil {
		return errors.Join(err, img.file.Truncate(size)) // nothing refers to what is behind
	}
	err = img.changeHeader(func(h *format.Header) {
		h.RefcountOrder = a.order
		h.RefcountTableOffset, h.RefcountTableClusters = w.tableAt(), uint32(w.tableClusters())
	})
	if err != nil {
		return err
	}
	for _, x := range w.gone {
		// Whoever takes the clusters next punches them again: all that may be missed here is that their space is free until then.
		_ = img.file.PunchHole(int64(img.geometry.OffsetOf(x.first)), int64(x.n<<img.geometry.ClusterBits))
	}
	return nil
}
