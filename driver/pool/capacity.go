package pool

import (
	"context"
	"fmt"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// Capacity is the space of the pool, in bytes.
type Capacity struct {
	Total     int64 // of the filesystem
	Free      int64 // of the filesystem, for its users
	Promised  int64 // to volumes, and not taken by them yet
	Available int64 // for new promises: Free - Promised, at least 0
}

// Capacity measures the space.
func (p *Pool) Capacity(ctx context.Context) (Capacity, error) {
	if err := p.begin(ctx); err != nil {
		return Capacity{}, err
	}
	defer p.running.Done()
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.measure()
}

// measure is Capacity with the mutex held. What volumes have taken is read before what is free, so that a write in
// between makes the result too small rather than too large.
func (p *Pool) measure() (c Capacity, err error) {
	c.Promised = p.pending
	for _, v := range p.volumes {
		if v.promised == 0 {
			continue // never read: what it takes is taken, what it was promised is unknown
		}
		c.Promised += max(0, v.promised-p.dir.allocated(v.head()))
	}
	c.Total, c.Free, err = p.dir.space()
	c.Available = max(0, c.Free-c.Promised)
	return c, err
}

// promise adds n bytes to *account, which is guarded by mu, unless they are not available.
func (p *Pool) promise(account *int64, n int64) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	c, err := p.measure()
	if err != nil {
		return err
	}
	if n > c.Available {
		return fmt.Errorf("%w: %d bytes are needed, of %d free ones %d are promised to volumes",
			ErrNoSpace, n, c.Free, c.Promised)
	}
	*account += n
	return nil
}

// LargestVolume returns the size of the largest volume with clusters of clusterSize bytes (0: the default) for which
// available bytes are enough; 0 when there is none.
func LargestVolume(available int64, clusterSize int) (int64, error) {
	s := Spec{Name: "largest", ClusterSize: clusterSize}
	if err := s.validate(); err != nil {
		return 0, err
	}
	g := s.geometry()
	lo, hi := int64(0), min(available, maxSize(g))/Granule // footprint(lo) fits, in granules
	for lo < hi {
		mid := (lo + hi + 1) / 2
		if footprint(mid*Granule, g) <= available {
			lo = mid
		} else {
			hi = mid - 1
		}
	}
	return lo * Granule, nil
}

const (
	reserve   = 16 << 20 // bytes for which the engine counts clusters before anybody writes to them
	diskBlock = 4096     // bytes that anything written into a hole takes, however short it is
)

// footprint returns the space that an image of size bytes takes when every guest byte is written: data, tables,
// refcounts, room for the tables that are replaced when it grows, old and new standing side by side, and the refcounts
// of the reserve, which lie scattered in holes. What a crash leaks comes on top.
func footprint(size int64, g format.Geometry) int64 {
	l2Tables := g.L1EntriesFor(uint64(size))
	l1 := g.ClustersFor(l2Tables * format.EntrySize)
	counted := 1 + g.ClustersFor(uint64(size)) + l2Tables + 2*l1
	scattered := (g.ClustersFor(reserve)/g.BlockEntries() + 1) * max(g.ClusterSize(), diskBlock)
	var blocks, table uint64
	for { // the refcount structures count themselves
		n := (counted + blocks + 2*table + g.BlockEntries() - 1) / g.BlockEntries()
		t := g.ClustersFor(n * format.EntrySize)
		if n == blocks && t == table {
			return int64((counted+blocks+2*table)<<g.ClusterBits + scattered)
		}
		blocks, table = n, t
	}
}
