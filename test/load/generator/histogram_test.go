package generator

import (
	"math"
	"testing"
	"time"
)

func TestHistogram(t *testing.T) {
	var a, b histogram
	for i := 1; i <= 50_000; i++ {
		a.add(time.Duration(i) * time.Microsecond)
		b.add(time.Duration(i+50_000) * time.Microsecond)
	}
	a.merge(&b)
	for q, want := range map[float64]float64{.001: 100, .5: 50_000, .9: 90_000, .99: 99_000, 1: 100_000} {
		if got := microseconds(a.quantile(q)); math.Abs(got-want) > .017*want {
			t.Errorf("quantile %g is %g µs, want about %g", q, got, want)
		}
	}
	if a.min != time.Microsecond || a.max != 100*time.Millisecond || a.total != 100_000 {
		t.Errorf("%v to %v, %d durations", a.min, a.max, a.total)
	}
}

// TestBuckets makes sure that buckets have no gaps, and that a duration is near the middle of its own.
func TestBuckets(t *testing.T) {
	last := -1
	for v := uint64(0); v < 1<<62; v = v + v/100 + 1 {
		i := bucket(v)
		if i < last || i >= len(histogram{}.counts) || v < 10_000 && i > last+1 {
			t.Fatalf("bucket %d of %d follows bucket %d", i, v, last)
		}
		last = i
		if m := float64(middle(i)); math.Abs(m-float64(v)) > .017*float64(v)+.5 {
			t.Fatalf("the middle of the bucket of %d is %g", v, m)
		}
	}
}
