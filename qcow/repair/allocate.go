package repair

import "github.com/qcow-csi/qcow-csi/qcow/format"

// allocator finds clusters for what is made: first those of the file that nothing refers to, neither what is made nor
// what was, then those behind its end.
type allocator struct {
	single   uint64 // no cluster before it is free
	run      uint64 // no run is looked for before it
	left     uint64 // how many clusters may still be allocated
	promised uint64 // how many of them it is clear will be
	limit    uint64 // the cluster that the file may not grow to
}

// What a repair makes is at most as large as the image, and this many bytes more. A file that needs more, such as one that names
// one L2 table a million times, is one that nothing but malice has made.
const growthReserve = 64 << 20

func (r *repairer) newAllocator() allocator {
	return allocator{single: 1, run: 1, left: r.end + growthReserve>>r.h.ClusterBits, limit: r.end + window}
}

// promise counts clusters that will be needed because a structure is named more than once.
func (a *allocator) promise(n uint64) error {
	if a.promised += n; a.promised > a.left {
		return a.tooLarge()
	}
	return nil
}

func (a *allocator) tooLarge() error {
	return format.Corruptf("L1 table", 0, "the repaired image would be more than twice as long as the image: its tables name each other again and again")
}

// allocate returns the offset of n clusters in a row, with one reference each.
func (r *repairer) allocate(u use, n uint64) (format.HostOffset, error) {
	from := &r.alloc.run
	if n == 1 {
		from = &r.alloc.single
	}
	if n > r.alloc.left {
		return 0, r.alloc.tooLarge()
	}
	r.alloc.left -= n
	cl, length := *from, uint64(0)
	for ; length < n; cl++ {
		if cl >= r.alloc.limit {
			return 0, r.alloc.tooLarge()
		}
		length++
		if r.clusters.word(cl) != 0 || cl >= r.end && r.outside.has(cl-r.end) {
			length = 0
		}
	}
	*from = cl
	for i := cl - n; i < cl; i++ {
		if err := r.clusters.set(i, newWord(u, 1)); err != nil {
			return 0, err
		}
	}
	return r.h.OffsetOf(format.Cluster(cl - n)), nil
}

// window is how many clusters behind the end of the file are looked at. What is longer than that is not worth a place in it.
const window = 1 << 26

// outside is the set of clusters behind the end of the file, counted from there, that something points to.
type outside map[uint64]*[chunkClusters / 64]uint64

const chunkClusters = 1 << 12

func (o outside) has(cl uint64) bool {
	c := o[cl/chunkClusters]
	return c != nil && c[cl%chunkClusters/64]>>(cl%64)&1 != 0
}

// add adds those of n clusters from cl on that are inside the window.
func (o outside) add(cl, n uint64, memory *budget) error {
	for ; n > 0 && cl < window; cl, n = cl+1, n-1 {
		c := o[cl/chunkClusters]
		if c == nil {
			if err := memory.take(chunkClusters/8 + pageOverhead); err != nil {
				return err
			}
			c = new([chunkClusters / 64]uint64)
			o[cl/chunkClusters] = c
		}
		c[cl%chunkClusters/64] |= 1 << (cl % 64)
	}
	return nil
}
