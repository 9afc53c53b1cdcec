package qcow

import (
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"testing"
	"testing/synctest"
)

func TestClaims(t *testing.T) {
	for _, c := range []struct {
		first, end uint64
		waits      bool
	}{
		{0, 10, false}, // ends where the other begins
		{20, 30, false},
		{0, 11, true},
		{10, 20, true},
		{12, 13, true},
		{19, 30, true},
		{0, 100, true},
	} {
		t.Run(fmt.Sprintf("%d to %d", c.first, c.end), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var cl claims
				held := cl.acquire(10, 20)
				ended := background(func() { cl.release(cl.acquire(c.first, c.end)) })
				if ended() == c.waits {
					t.Errorf("the second claim waits: %v", !c.waits)
				}
				cl.release(held)
				if !ended() {
					t.Error("the second claim was never granted")
				}
				if len(cl.held) != 0 {
					t.Errorf("%d claims remain", len(cl.held))
				}
			})
		})
	}
}

// Counters are changed under claims only, so the race detector watches too.
func TestClaimsExclude(t *testing.T) {
	const clusters, workers, rounds = 20, 6, 400
	var cl claims
	counters := make([]int, clusters)
	claimed := make([]int, workers)
	var wg sync.WaitGroup
	for w := range workers {
		rng := rand.New(rand.NewPCG(1, uint64(w)))
		wg.Go(func() {
			for range rounds {
				first := rng.Uint64N(clusters)
				end := first + 1 + rng.Uint64N(clusters-first)
				c := cl.acquire(first, end)
				for i := first; i < end; i++ {
					n := counters[i]
					runtime.Gosched()
					counters[i] = n + 1
					claimed[w]++
				}
				cl.release(c)
			}
		})
	}
	wg.Wait()
	total := 0
	for _, n := range claimed {
		total += n
	}
	for _, n := range counters {
		total -= n
	}
	if total != 0 {
		t.Errorf("%d changes got lost", total)
	}
}
