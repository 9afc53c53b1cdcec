package qcow

import (
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"
	"weak"
)

const (
	defaultBudget = 128 << 20 // bytes: the L2 entries of 1 TiB in clusters of 64 KiB
	minSlices     = 16        // every image may cache, whatever the budget says
	sweepInterval = time.Minute
	sweepsToIdle  = 10 // a slice that was not used for so many sweeps is dropped; for one, when memory is short
)

// CacheBudget bounds the memory that the table caches of several images take together. Slices that nobody uses for some minutes
// are dropped, sooner when another image wants to grow.
type CacheBudget struct {
	limit   int64
	used    atomic.Int64 // bytes
	pressed atomic.Bool  // somebody was refused since the last sweep

	mu     sync.Mutex
	caches map[*share]struct{}
	timer  *time.Timer
}

// share is what one cache has of a budget. The cache refers to it and not the reverse: an image that is dropped without Close is
// collected all the same.
type share struct {
	budget *CacheBudget
	cache  weak.Pointer[tableCache]
	used   atomic.Int64 // bytes
}

// NewCacheBudget returns a budget of so many bytes.
func NewCacheBudget(bytes int64) *CacheBudget {
	return &CacheBudget{limit: bytes, caches: map[*share]struct{}{}}
}

// processBudget is for images that are opened without a budget of their own.
var processBudget = NewCacheBudget(defaultBudget)

// Used returns how many bytes the caches hold now.
func (b *CacheBudget) Used() int64 { return b.used.Load() }

// take asks for n bytes more; with force it gets them in any case.
func (s *share) take(n int64, force bool) bool {
	if s.budget.used.Add(n) <= s.budget.limit || force {
		s.used.Add(n)
		return true
	}
	s.budget.used.Add(-n)
	s.budget.pressed.Store(true)
	return false
}

func (s *share) giveBack(n int64) {
	s.used.Add(-n)
	s.budget.used.Add(-n)
}

// join gives c a share.
func (b *CacheBudget) join(c *tableCache) *share {
	s := &share{budget: b, cache: weak.Make(c)}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.caches[s] = struct{}{}
	if len(b.caches) == 1 {
		b.timer = time.AfterFunc(sweepInterval, b.tick)
	}
	return s
}

// leave gives the share of c, which is not used any more, back.
func (s *share) leave(c *tableCache) {
	s.budget.remove(s)
	c.sweep(0)
}

func (b *CacheBudget) remove(s *share) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.caches, s)
	if len(b.caches) == 0 && b.timer != nil {
		b.timer.Stop()
		b.timer = nil
	}
}

func (b *CacheBudget) tick() {
	b.sweep()
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.timer != nil {
		b.timer.Reset(sweepInterval)
	}
}

// sweep drops idle slices.
func (b *CacheBudget) sweep() {
	idle := uint8(sweepsToIdle)
	if b.pressed.Swap(false) {
		idle = 1
	}
	b.mu.Lock()
	shares := slices.Collect(maps.Keys(b.caches))
	b.mu.Unlock()
	for _, s := range shares {
		if c := s.cache.Value(); c != nil {
			c.sweep(idle)
			continue
		}
		b.remove(s)
		s.giveBack(s.used.Load())
	}
}

// sweep drops the slices that were not used since so many sweeps; with 0 every one that is not pinned.
func (c *tableCache) sweep(idle uint8) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range slices.Backward(c.clock) { // remove puts the last one in the place of the removed one
		if s.pins.Load() != 0 || s.used.Swap(false) && idle > 0 {
			s.idle = 0
			continue
		}
		if s.idle++; s.idle >= idle {
			c.remove(s.off)
		}
	}
}
