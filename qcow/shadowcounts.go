package qcow

import (
	"fmt"
	"maps"
	"slices"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// The refcounts of a shadow: copies of the blocks that change.

// block returns the content of a refcount block to be changed; where the image has none, a new one.
func (s *shadow) block(i uint64) ([]byte, error) {
	if b := s.blocks[i]; b != nil {
		return b, nil
	}
	g := s.img.geometry
	b := make([]byte, g.ClusterSize())
	if at := s.img.alloc.counts.block(format.Cluster(i << g.BlockBits())); at != 0 {
		if err := readFull(s.img.file, b, at); err != nil {
			return nil, fmt.Errorf("read refcount block at %#x: %w", uint64(at), err)
		}
	}
	s.blocks[i] = b
	return b, nil
}

// count returns the refcount that a cluster will have.
func (s *shadow) count(c format.Cluster) (uint64, error) {
	g := s.img.geometry
	if b := s.blocks[uint64(c)>>g.BlockBits()]; b != nil {
		return format.Refcount(b, g.RefcountOrder, uint64(c)&(g.BlockEntries()-1)), nil
	}
	return s.img.alloc.counts.get(c)
}

// countUsed is count for a cluster that is in use.
func (s *shadow) countUsed(c format.Cluster) (uint64, error) {
	count, err := s.count(c)
	if err == nil && count == 0 {
		err = s.usedButFree(c)
	}
	return count, err
}

// recount gives every cluster of x the refcount that fn makes of its present one.
func (s *shadow) recount(x run, fn func(c format.Cluster, count uint64) (uint64, error)) error {
	g := s.img.geometry
	for c := x.first; c < x.end(); c++ {
		b, err := s.block(uint64(c) >> g.BlockBits())
		if err != nil {
			return err
		}
		i := uint64(c) & (g.BlockEntries() - 1)
		count, err := fn(c, format.Refcount(b, g.RefcountOrder, i))
		if err != nil {
			return err
		}
		format.PutRefcount(b, g.RefcountOrder, i, count)
	}
	return nil
}

// refer adds a reference to each cluster of x, which are in use.
func (s *shadow) refer(x run) error {
	g := s.img.geometry
	return s.recount(x, func(c format.Cluster, count uint64) (uint64, error) {
		switch count {
		case 0:
			return 0, s.usedButFree(c)
		case g.MaxRefcount():
			return 0, format.Invalidf("the cluster at %#x has %d references, as many as refcounts of %d bits can say", uint64(g.OffsetOf(c)), count, g.RefcountBits())
		}
		return count + 1, nil
	})
}

// drop takes a reference from each cluster of x. Those that have none left are free after the commit.
func (s *shadow) drop(x run) error {
	return s.recount(x, func(c format.Cluster, count uint64) (uint64, error) {
		switch count {
		case 0:
			return 0, s.usedButFree(c)
		case 1:
			s.freed = appendRun(s.freed, run{c, 1})
		}
		return count - 1, nil
	})
}

func (s *shadow) usedButFree(c format.Cluster) error {
	return s.img.markCorrupt(format.Corruptf("refcount block", s.img.geometry.OffsetOf(c), "the refcount of a cluster in use is 0"))
}

// retire drops a table of n bytes at off.
func (s *shadow) retire(off format.HostOffset, n uint64) error {
	return s.drop(run{s.img.geometry.ClusterOf(off), s.img.geometry.ClustersFor(n)})
}

// placeRefcounts finds a place for every changed refcount block and for the refcount table, and returns the table. Each place may
// change a further block, but far fewer than there are clusters in a block, so this ends.
func (s *shadow) placeRefcounts() (table []byte, place run, err error) {
	counts, g := &s.img.alloc.counts, s.img.geometry
	if err := s.retire(counts.offset, uint64(len(counts.table))); err != nil {
		return nil, run{}, err
	}
	for want := uint64(1); place.n < want || len(s.places) < len(s.blocks); {
		if err := s.placeBlocks(); err != nil {
			return nil, run{}, err
		}
		if want, err = s.tableClusters(); err != nil {
			return nil, run{}, err
		}
		if place.n >= want {
			continue
		}
		if err := s.drop(place); err != nil {
			return nil, run{}, err
		}
		if place, err = s.allocate(want); err != nil {
			return nil, run{}, err
		}
	}
	table = make([]byte, place.n<<g.ClusterBits)
	copy(table, counts.table)
	for i, c := range s.places {
		format.PutEntry(table, i, uint64(g.OffsetOf(c)))
	}
	return table, place, s.dropEmptyBlocks(table)
}

// dropEmptyBlocks takes blocks that describe free clusters only out of the refcount table. The place that one would have had becomes free, which
// may leave another one empty.
func (s *shadow) dropEmptyBlocks(table []byte) error {
	for again := true; again; {
		again = false
		for i, b := range s.blocks {
			if !isZero(b) {
				continue
			}
			if err := s.drop(run{s.places[i], 1}); err != nil {
				return err
			}
			delete(s.blocks, i)
			delete(s.places, i)
			format.PutEntry(table, i, 0)
			again = true
		}
	}
	return nil
}

// tableClusters returns how many clusters the refcount table needs for the blocks that have a place.
func (s *shadow) tableClusters() (uint64, error) {
	g := s.img.geometry
	entries := uint64(len(s.img.alloc.counts.table)) / format.EntrySize
	for i := range s.places {
		entries = max(entries, i+1)
	}
	n := g.ClustersFor(entries * format.EntrySize)
	if n<<g.ClusterBits > max(format.MaxRefcountTableBytes, g.ClusterSize()) {
		return 0, fmt.Errorf("%w: the refcount table has reached its limit of %d bytes", ErrNoSpace, format.MaxRefcountTableBytes)
	}
	return n, nil
}

func (s *shadow) placeBlocks() error {
	g := s.img.geometry
	for len(s.places) < len(s.blocks) {
		for _, i := range slices.Sorted(maps.Keys(s.blocks)) {
			if _, placed := s.places[i]; placed {
				continue
			}
			if old := s.img.alloc.counts.block(format.Cluster(i << g.BlockBits())); old != 0 {
				if err := s.retire(old, g.ClusterSize()); err != nil {
					return err
				}
			}
			x, err := s.allocate(1)
			if err != nil {
				return err
			}
			s.places[i] = x.first
		}
	}
	return nil
}
