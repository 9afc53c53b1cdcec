package repair

import (
	"context"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// forgetRefcounts takes the references to the refcount table and the blocks of before away: new ones replace them.
func (r *repairer) forgetRefcounts() {
	for _, p := range r.clusters.pages {
		for i, w := range p.words {
			if w.use() == refcounts {
				p.words[i] = reached
			}
		}
	}
}

// noteRefcounts reports the refcounts that change.
func (r *repairer) noteRefcounts(ctx context.Context) error {
	return r.eachCluster(ctx, func(cl, stored uint64, w word) error {
		c := Change{Table: Cluster, Offset: r.h.OffsetOf(format.Cluster(cl)), Old: stored, New: w.count()}
		switch {
		case stored < c.New && r.keepsTables(), stored == c.New:
			return nil
		case stored < c.New:
			c.Kind = RefcountRaised
		case r.keepsTables() && r.lost > 0:
			c.Kind, c.New = LeakKept, stored
		default:
			c.Kind = LeakRepaired
		}
		r.changed(c)
		return nil
	})
}

// keepRefcounts keeps every refcount that is too low as it is.
func (r *repairer) keepRefcounts(ctx context.Context) error {
	return r.eachKnown(ctx, func(cl, stored uint64, w word) error {
		if stored >= w.count() {
			return nil
		}
		return r.clusters.set(cl, newWord(w.use(), stored)|w&reached)
	})
}

// makeRefcounts makes the refcount table and blocks that describe everything, themselves included.
func (r *repairer) makeRefcounts(ctx context.Context) error {
	if r.badRefcounts != "" {
		r.changed(Change{Kind: RefcountsRebuilt, Table: RefcountTable, Offset: r.h.RefcountTableOffset, Detail: r.badRefcounts})
	}
	blocks, err := r.placeRefcounts(ctx)
	if err != nil {
		return err
	}
	b := make([]byte, r.h.ClusterSize())
	for i, off := range blocks {
		if err := ctx.Err(); err != nil {
			return err
		}
		if off == 0 {
			continue
		}
		if err := r.fillBlock(b, uint64(i)); err != nil {
			return err
		}
		if err := r.write(RefcountBlock, b, off); err != nil {
			return err
		}
	}
	t := make([]byte, r.next.RefcountTableBytes())
	for i, off := range blocks {
		format.PutEntry(t, uint64(i), uint64(off))
	}
	return r.write(RefcountTable, t, r.next.RefcountTableOffset)
}

// placeRefcounts finds a place for the refcount table and every block that it needs. Each place may need another block.
func (r *repairer) placeRefcounts(ctx context.Context) (blocks []format.HostOffset, err error) {
	perPage := r.h.BlockBits() - r.clusters.pageBits
	var t region
	for again := true; again; {
		again = false
		for _, num := range r.clusters.numbers() {
			i := num >> perPage
			if i < uint64(len(blocks)) && blocks[i] != 0 || !anyReferences(r.clusters.pages[num].words) {
				continue
			}
			if i >= format.MaxRefcountTableBytes/format.EntrySize {
				return nil, format.Corruptf("refcount table", 0, "it would exceed %d bytes: the file is too long for its refcount width", format.MaxRefcountTableBytes)
			}
			for uint64(len(blocks)) <= i {
				blocks = append(blocks, 0)
			}
			if blocks[i], err = r.allocate(refcounts, 1); err != nil {
				return nil, err
			}
			again = true
		}
		n := r.h.ClustersFor(uint64(len(blocks)) * format.EntrySize)
		if n<<r.h.ClusterBits != t.bytes {
			if err := r.forget(&t); err != nil {
				return nil, err
			}
			t = region{bytes: n << r.h.ClusterBits, owned: n}
			if t.off, err = r.allocate(refcounts, n); err != nil {
				return nil, err
			}
			again = true
		}
		if err := ctx.Err(); err != nil {
			return nil, err
		}
	}
	r.next.RefcountTableOffset, r.next.RefcountTableClusters = t.off, uint32(t.owned)
	return blocks, nil
}

// forget gives clusters back that were allocated, but not used.
func (r *repairer) forget(g *region) error {
	first := uint64(r.h.ClusterOf(g.off))
	for i := range g.owned {
		if err := r.clusters.set(first+i, 0); err != nil {
			return err
		}
	}
	if g.owned > 0 {
		r.alloc.single = min(r.alloc.single, first)
	}
	return nil
}

func anyReferences(words []word) bool {
	for _, w := range words {
		if w.count() > 0 {
			return true
		}
	}
	return false
}

// fillBlock makes the content of refcount block i.
func (r *repairer) fillBlock(b []byte, i uint64) error {
	clear(b)
	m := &r.clusters
	first := i << m.BlockBits()
	for num := first >> m.pageBits; num < (first+m.BlockEntries())>>m.pageBits; num++ {
		p := m.pages[num]
		if p == nil {
			continue
		}
		for j, w := range p.words {
			cl := num<<m.pageBits + uint64(j)
			n := w.count()
			if n > m.MaxRefcount() {
				return format.Corruptf("cluster", m.OffsetOf(format.Cluster(cl)), "%d references, more than a refcount of %d bits can hold: the image needs wider ones", n, m.RefcountBits())
			}
			if n > 0 {
				format.PutRefcount(b, m.RefcountOrder, cl-first, n)
			}
		}
	}
	return nil
}
