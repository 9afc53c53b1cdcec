package qcow

import (
	"slices"
	"sync"
	"sync/atomic"
)

// ranges is a set of guest byte ranges, nearly always empty, that requests look at on their way.
type ranges struct {
	n    atomic.Int32
	mu   sync.Mutex
	list [][2]uint64 // start and end
}

func (r *ranges) add(start, end uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.list = append(r.list, [2]uint64{start, end})
	r.n.Store(int32(len(r.list)))
}

func (r *ranges) remove(start, end uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if i := slices.Index(r.list, [2]uint64{start, end}); i >= 0 {
		r.list = slices.Delete(r.list, i, i+1)
	}
	r.n.Store(int32(len(r.list)))
}

// overlaps reports whether a range of the set has bytes in common with n bytes at off.
func (r *ranges) overlaps(off, n uint64) bool {
	if r.n.Load() == 0 {
		return false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.ContainsFunc(r.list, func(x [2]uint64) bool { return x[0] < off+n && off < x[1] })
}
