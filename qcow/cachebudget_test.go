package qcow

import (
	"runtime"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

func touch(t *testing.T, c *tableCache, slices int) {
	t.Helper()
	for i := range slices {
		s, err := c.pin(format.HostOffset(i * testSlice))
		if err != nil {
			t.Fatal(err)
		}
		s.unpin()
	}
}

// Caches that share a budget stay within it, but each may have a few slices; what is not used goes back.
func TestCacheBudget(t *testing.T) {
	const slices = 100
	budget := NewCacheBudget(slices * testSlice)
	f := storage.NewMemoryFrom(make([]byte, 1000*testSlice))
	caches := make([]*tableCache, 3)
	for i := range caches {
		caches[i] = newTestCache(f, 80)
		caches[i].share = budget.join(caches[i])
	}
	first, second, third := caches[0], caches[1], caches[2]
	touch(t, first, 200)
	if n := len(first.clock); n != 80 {
		t.Errorf("a cache alone holds %d slices, its own limit is 80", n)
	}
	touch(t, second, 200)
	if n := len(second.clock); n != slices-80 {
		t.Errorf("the second cache holds %d slices, the budget has room for %d", n, slices-80)
	}
	touch(t, third, 200)
	if n := len(third.clock); n != minSlices {
		t.Errorf("the third cache holds %d slices instead of %d", n, minSlices)
	}
	if used := budget.Used(); used != (slices+minSlices)*testSlice {
		t.Errorf("%d bytes in use", used)
	}
	// Whoever is busy gets what the idle ones have.
	for range 3 {
		touch(t, third, 200)
		budget.sweep()
	}
	touch(t, third, 200)
	if n := len(third.clock); n != 80 {
		t.Errorf("the busy cache holds %d slices after the idle ones were swept", n)
	}
	for range sweepsToIdle + 1 {
		budget.sweep()
	}
	if used := budget.Used(); used != 0 {
		t.Errorf("%d bytes in use after everybody was idle", used)
	}
	touch(t, third, 10)
	for _, c := range caches {
		expectConsistent(t, c)
		c.share.leave(c)
	}
	if used := budget.Used(); used != 0 || budget.timer != nil {
		t.Errorf("%d bytes in use without caches", used)
	}
}

// An image that nobody closed does not stay in memory, nor on the account.
func TestCacheBudgetForgotten(t *testing.T) {
	budget := NewCacheBudget(1 << 20)
	func() {
		c := newTestCache(storage.NewMemoryFrom(make([]byte, 100*testSlice)), 80)
		c.share = budget.join(c)
		touch(t, c, 50)
	}()
	if budget.Used() == 0 {
		t.Fatal("nothing was cached")
	}
	runtime.GC()
	budget.sweep()
	if used := budget.Used(); used != 0 || len(budget.caches) != 0 {
		t.Errorf("%d bytes, %d caches", used, len(budget.caches))
	}
}
