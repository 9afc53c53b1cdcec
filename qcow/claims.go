package qcow

import "sync"

// claims give one request at a time the right to change the L2 entries of a range of guest clusters. Requests
// that only use the clusters which the entries point to need no claim.
type claims struct {
	mu   sync.Mutex
	held []*claim
}

type claim struct {
	first, end uint64 // guest clusters, end excluded
	done       chan struct{}
}

// acquire waits until no claim overlaps the guest clusters first to end-1, and claims them.
func (c *claims) acquire(first, end uint64) *claim {
	for {
		c.mu.Lock()
		other := c.overlapping(first, end)
		if other == nil {
			mine := &claim{first: first, end: end, done: make(chan struct{})}
			c.held = append(c.held, mine)
			c.mu.Unlock()
			return mine
		}
		c.mu.Unlock()
		<-other.done
	}
}

func (c *claims) overlapping(first, end uint64) *claim {
	for _, h := range c.held {
		if h.first < end && first < h.end {
			return h
		}
	}
	return nil
}

func (c *claims) release(mine *claim) {
	c.mu.Lock()
	for i, h := range c.held {
		if h == mine {
			last := len(c.held) - 1
			c.held[i] = c.held[last]
			c.held[last] = nil
			c.held = c.held[:last]
			break
		}
	}
	c.mu.Unlock()
	close(mine.done)
}
