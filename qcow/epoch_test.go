package qcow

import (
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
)

// background starts fn in a goroutine and returns when that has ended or waits for something; ended says which.
func background(fn func()) (ended func() bool) {
	var done atomic.Bool
	go func() {
		fn()
		done.Store(true)
	}()
	synctest.Wait()
	return func() bool {
		synctest.Wait()
		return done.Load()
	}
}

func TestEpochsWaitForThoseInside(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEpochs()
		e.wait() // nobody inside: at once
		for range 4 {
			first, second := e.enter(), e.enter()
			ended := background(e.wait)
			later := e.enter()
			if ended() {
				t.Error("wait returned with two requests inside")
			}
			e.leave(first)
			if ended() {
				t.Error("wait returned with one request inside")
			}
			e.leave(second)
			if !ended() {
				t.Error("a request that entered later holds up wait")
			}
			e.leave(later)
		}
	})
}

// Each waiter waits for those that had entered before it, also those which another waiter need not wait for.
func TestEpochsWithSeveralWaiters(t *testing.T) {
	e := newEpochs()
	wait := func() <-chan struct{} {
		done := make(chan struct{})
		go func() {
			e.wait()
			close(done)
		}()
		return done
	}
	a, before := e.enter(), e.current.Load()
	first := wait()
	for e.current.Load() == before {
		runtime.Gosched()
	}
	b := e.enter() // after the first wait, before the second
	second := wait()
	e.leave(a)
	<-first
	select {
	case <-second:
		t.Error("the second waiter returned with a request inside that had entered before")
	default:
	}
	e.leave(b)
	<-second
}

// What was replaced before wait is used by nobody behind it, however requests and waiters interleave.
func TestEpochsProtectWhatIsUnlinked(t *testing.T) {
	type cluster struct{ freed atomic.Bool }
	var current atomic.Pointer[cluster]
	current.Store(new(cluster))
	e := newEpochs()
	var users, freers sync.WaitGroup
	var stop atomic.Bool
	for range 4 {
		users.Go(func() {
			for !stop.Load() {
				i := e.enter()
				c := current.Load()
				runtime.Gosched()
				if c.freed.Load() {
					t.Error("a cluster was freed while in use")
					stop.Store(true)
				}
				e.leave(i)
			}
		})
	}
	for range 2 {
		freers.Go(func() {
			for range 2000 {
				old := current.Swap(new(cluster))
				e.wait()
				old.freed.Store(true)
			}
		})
	}
	freers.Wait()
	stop.Store(true)
	users.Wait()
}
