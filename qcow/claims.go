package qcow

import (
	"slices"
	"sync"
)

// claims give one request at a time the right to change the L2 entries of a range of guest clusters. Requests
// that only use the clusters which the entries point to need no claim.
type claims struct {
	mu   sync.Mutex
	held []claim
}

type claim struct {
	first, end uint64        // guest clusters, end excluded
	done       chan struct{} // closed when the claim is released, made by the first who waits for that
}

// acquire waits until no claim overlaps the guest clusters first to end-1, and claims them.
func (c *claims) acquire(first, end uint64) claim {
	for {
		c.mu.Lock()
		other := c.overlapping(first, end)
		if other == nil {
			mine := claim{first: first, end: end}
			c.held = append(c.held, mine)
			c.mu.Unlock()
			return mine
		}
		if other.done == nil {
			other.done = make(chan struct{})
		}
		done := other.done
		c.mu.Unlock()
		<-done
	}
}

func (c *claims) overlapping(first, end uint64) *claim {
	for i := range c.held {
		if h := &c.held[i]; h.first < end && first < h.end {
			return h
		}
	}
	return nil
}

func (c *claims) release(mine claim) {
	c.mu.Lock()
	defer c.mu.Unlock()
	i := slices.IndexFunc(c.held, func(h claim) bool { return h.first == mine.first && h.end == mine.end })
	if done := c.held[i].done; done != nil {
		close(done)
	}
	last := len(c.held) - 1
	c.held[i], c.held[last] = c.held[last], claim{}
	c.held = c.held[:last]
}
