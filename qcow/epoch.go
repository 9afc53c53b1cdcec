package qcow

import (
	"sync"
	"sync/atomic"
)

// epochs tell when nobody can be using a cluster any more that the tables no longer mention. Every request runs
// inside an epoch: it enters before it looks at the tables and leaves when its I/O has ended. A cluster unlinked before
// [epochs.wait] is called is used by nobody once it has returned, since requests that enter later
// can't find it.
//
// A request must not wait, inside its epoch, for anything that waits for epochs.
type epochs struct {
	current atomic.Uint32 // only its lowest bit counts: which counter new requests use
	active  [2]atomic.Int64

	mu      sync.Mutex // one waiter at a time
	waiting atomic.Bool
	drained chan struct{} // capacity 1: some counter may have reached 0
}

func newEpochs() *epochs { return &epochs{drained: make(chan struct{}, 1)} }

// enter begins a request and returns what leave wants.
func (e *epochs) enter() uint32 {
	for {
		i := e.current.Load() & 1
		e.active[i].Add(1)
		if e.current.Load()&1 == i {
			return i
		}
		e.leave(i) // the waiter may have missed us: it looked before we counted
	}
}

func (e *epochs) leave(i uint32) {
	if e.active[i].Add(-1) == 0 && e.waiting.Load() {
		select {
		case e.drained <- struct{}{}:
		default:
		}
	}
}

// wait returns when every request that had entered before it was called has left.
func (e *epochs) wait() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.waiting.Store(true)
	defer e.waiting.Store(false)
	i := (e.current.Add(1) - 1) & 1
	for e.active[i].Load() != 0 {
		<-e.drained
	}
}
