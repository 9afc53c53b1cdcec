package repair

import (
	"context"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// release gives the clusters back that nothing refers to any more: the space of those inside the file, and those at its end.
func (r *repairer) release(ctx context.Context) error {
	if !r.switched {
		return nil
	}
	end := r.clusters.end()
	p := puncher{r: r}
	// First what was leaked, which the refcount blocks of before tell, then what the header of before reached, those blocks
	// included.
	leaked := func(cl, stored uint64, w word) error {
		if cl >= end || w != 0 || stored == 0 {
			return nil
		}
		return p.add(cl)
	}
	replaced := func(cl, _ uint64, w word) error {
		if cl >= end || w.count() > 0 || w&reached == 0 {
			return nil
		}
		return p.add(cl)
	}
	if err := r.eachCluster(ctx, leaked); err != nil {
		return err
	}
	if err := r.eachKnown(ctx, replaced); err != nil {
		return err
	}
	if err := p.flush(); err != nil {
		return err
	}

	size, err := r.f.Size()
	if err != nil {
		return err
	}
	if length := end << r.h.ClusterBits; uint64(size) > length {
		if err := r.f.Truncate(int64(length)); err != nil {
			return err
		}
		r.report.Freed += max(int64(r.size)-int64(length), 0)
	}
	return r.f.Sync()
}

// puncher gathers clusters in a row.
type puncher struct {
	r        *repairer
	first, n uint64
}

func (p *puncher) add(cl uint64) error {
	if cl != p.first+p.n {
		if err := p.flush(); err != nil {
			return err
		}
		p.first = cl
	}
	p.n++
	return nil
}

func (p *puncher) flush() error {
	if p.n == 0 {
		return nil
	}
	off, n := int64(p.r.h.OffsetOf(format.Cluster(p.first))), int64(p.n<<p.r.h.ClusterBits)
	p.n = 0
	if err := p.r.f.PunchHole(off, n); err != nil {
		return err
	}
	p.r.report.Freed += n
	return nil
}
