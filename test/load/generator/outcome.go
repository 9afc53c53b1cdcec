package generator

import "time"

// outcome is what one worker counts.
type outcome struct {
	latencies  histogram
	reads      int64
	writes     int64
	errors     int64 // requests that failed
	mismatches int64 // reads of something else than what was written
	first      error // of the failed ones
	elapsed    time.Duration
}

// count notes a request that was answered.
func (o *outcome) count(write bool, latency time.Duration) {
	if write {
		o.writes++
	} else {
		o.reads++
	}
	o.latencies.add(latency)
}

// fail notes a request that failed.
func (o *outcome) fail(err error) {
	o.errors++
	if o.first == nil {
		o.first = err
	}
}

// mismatch notes that something else was read than what was written.
func (o *outcome) mismatch(err error) {
	o.mismatches++
	if o.first == nil {
		o.first = err
	}
}

// merge adds what another worker has counted.
func (o *outcome) merge(other *outcome) {
	o.latencies.merge(&other.latencies)
	o.reads += other.reads
	o.writes += other.writes
	o.errors += other.errors
	o.mismatches += other.mismatches
	o.elapsed = max(o.elapsed, other.elapsed)
	if o.first == nil {
		o.first = other.first
	}
}

// clock measures the time since the beginning of a job.
type clock struct {
	begin   time.Time
	runtime time.Duration
}

func (c clock) now() time.Duration { return time.Since(c.begin) }
