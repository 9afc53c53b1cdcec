package generator

import (
	"math/bits"
	"time"
)

// histogram counts durations in buckets whose width grows with them: a percentile is off by 1.6 % at most.
type histogram struct {
	counts [60 * half]int64
	sum    time.Duration
	total  int64
	min    time.Duration
	max    time.Duration
}

const half = 32 // buckets for each doubling

func (h *histogram) add(d time.Duration) {
	d = max(d, 0)
	h.counts[bucket(uint64(d))]++
	h.sum += d
	if h.total == 0 || d < h.min {
		h.min = d
	}
	h.max = max(h.max, d)
	h.total++
}

// merge adds all that o has counted.
func (h *histogram) merge(o *histogram) {
	for i, n := range o.counts {
		h.counts[i] += n
	}
	if o.total > 0 && (h.total == 0 || o.min < h.min) {
		h.min = o.min
	}
	h.sum, h.total, h.max = h.sum+o.sum, h.total+o.total, max(h.max, o.max)
}

// quantile returns the duration that the part q (0 to 1) of all durations does not exceed.
func (h *histogram) quantile(q float64) time.Duration {
	rank := max(1, int64(q*float64(h.total)+0.5))
	for i, n := range h.counts {
		if rank -= n; rank <= 0 {
			return min(max(middle(i), h.min), h.max)
		}
	}
	return h.max
}

// bucket returns the index for v: v itself while that is small, then the five bits after its first one.
func bucket(v uint64) int {
	shift := max(0, bits.Len64(v)-6)
	return shift*half + int(v>>shift)
}

// middle returns the duration in the middle of a bucket.
func middle(bucket int) time.Duration {
	shift := max(0, bucket/half-1)
	low := uint64(bucket-shift*half) << shift
	return time.Duration(low + 1<<shift/2)
}
