package nbdexport

import "sync"

const (
	maxWorkers = 16         // requests of one connection that workers carry out at a time
	maxHeld    = MaxPayload // bytes of the buffers that they need for payloads, together
	keepRoom   = 256 << 10  // bytes of the largest buffer that a worker keeps from one request to the next
)

// crew are the workers of one connection: goroutines that carry out one request each, so that a slow one holds up no
// other. They are started as they are needed and stay until the end of the connection. The one that became idle last
// is taken first: a client with few requests in flight has few workers, whose buffers stay in the processor's caches.
//
// Workers are taken by one goroutine, the receiver.
type crew struct {
	carryOut func(*worker)
	running  sync.WaitGroup

	mu     sync.Mutex
	change sync.Cond // of mu: a worker became idle
	idle   []*worker
	number int // of workers
	held   int // bytes of the buffers that requests at work need
}

// worker carries out one request at a time.
type worker struct {
	request
	size   int // bytes of the buffer that carrying it out needs
	buffer *buffer
	start  chan struct{} // an element: carry out the request; closed: end
}

func newCrew(carryOut func(*worker)) *crew {
	c := &crew{carryOut: carryOut}
	c.change.L = &c.mu
	return c
}

// tryTake returns an idle worker with a buffer for n bytes of payload, or nil when the limits are reached.
func (c *crew) tryTake(n int) *worker {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.full(n) {
		return nil
	}
	return c.assign(n)
}

// take is tryTake that waits.
func (c *crew) take(n int) *worker {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.full(n) {
		c.change.Wait()
	}
	return c.assign(n)
}

func (c *crew) full(n int) bool {
	return len(c.idle) == 0 && c.number == maxWorkers || c.held+roomFor(n) > maxHeld
}

// assign takes the worker that full has promised.
func (c *crew) assign(n int) *worker {
	var w *worker
	if last := len(c.idle) - 1; last >= 0 {
		w = c.idle[last]
		c.idle = c.idle[:last]
	} else {
		w = &worker{start: make(chan struct{}, 1)}
		c.number++
		c.running.Go(func() { c.run(w) })
	}
	w.size = roomFor(n)
	c.held += w.size
	if w.buffer == nil || w.buffer.room() < n {
		w.drop()
		w.buffer = newBuffer(n)
	}
	return w
}

// run is the life of a worker.
func (c *crew) run(w *worker) {
	for range w.start {
		c.carryOut(w)
		c.release(w)
	}
	w.drop()
}

// drop gives the worker's buffer back, if it has one.
func (w *worker) drop() {
	if w.buffer != nil {
		w.buffer.recycle()
		w.buffer = nil
	}
}

// release makes w idle again.
func (c *crew) release(w *worker) {
	if w.buffer.room() > keepRoom {
		w.drop()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.held -= w.size
	c.idle = append(c.idle, w)
	c.change.Signal()
}

// atWork says whether a request is being carried out.
func (c *crew) atWork() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.idle) < c.number
}

// dismiss ends the workers when they have carried out what they were given.
func (c *crew) dismiss() {
	c.mu.Lock()
	for len(c.idle) < c.number {
		c.change.Wait()
	}
	for _, w := range c.idle {
		close(w.start)
	}
	c.mu.Unlock()
	c.running.Wait()
}
