package nbdexport

import (
	"sync/atomic"
	"time"
)

// handover is about what it costs to wake a worker and to send its reply on its own, instead of with others.
const handover = 25 * time.Microsecond

// slow is what longer times count as: it takes a quarter of all requests to be slow for the others to be given away with them, not one that
// had to wait for a sync.
const slow = 4 * handover

// pace is the time that small requests have taken lately: an exponential mean.
type pace struct{ mean atomic.Int64 }

// add takes d into account. Additions at the same moment may get lost, which does no harm.
func (p *pace) add(d time.Duration) {
	const weight = 32
	mean := p.mean.Load()
	p.mean.Store(mean + (int64(min(d, slow))-mean)/weight)
}

// fast says whether a request is likely done before a worker would have begun with it.
func (p *pace) fast() bool { return p.mean.Load() < int64(handover) }

var started = time.Now()

// monotonic is the time since some moment. It reads one clock, where time.Now reads two.
func monotonic() time.Duration { return time.Since(started) }
