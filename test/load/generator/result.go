package generator

import "time"

// Result is what a job has measured.
type Result struct {
	Connections int  `json:"connections"` // threads, of a file
	Depth       int  `json:"depth"`
	Structured  bool `json:"structured"` // the server sent structured replies

	Seconds    float64 `json:"seconds"` // from the first request to the last reply
	Reads      int64   `json:"reads"`
	Writes     int64   `json:"writes"`
	Errors     int64   `json:"errors"`          // requests that failed; they count nowhere else
	Mismatches int64   `json:"mismatches"`      // reads of something else than what was written
	First      string  `json:"first,omitempty"` // error or mismatch

	IOPS    float64 `json:"iops"`
	MBs     float64 `json:"mb_per_second"` // 10^6 bytes
	Latency Latency `json:"latency_us"`
	CPU     float64 `json:"cpu_us_per_io"` // processor time of the generator, in microseconds
}

// Latency describes how long requests took, in microseconds.
type Latency struct {
	Min  float64 `json:"min"`
	Mean float64 `json:"mean"`
	P50  float64 `json:"p50"`
	P90  float64 `json:"p90"`
	P99  float64 `json:"p99"`
	P999 float64 `json:"p99.9"`
	Max  float64 `json:"max"`
}

// summarize computes the figures from what the workers have counted with blocks of so many bytes.
func (r *Result) summarize(o *outcome, block int64, cpu time.Duration) {
	r.Seconds = o.elapsed.Seconds()
	r.Reads, r.Writes, r.Errors, r.Mismatches = o.reads, o.writes, o.errors, o.mismatches
	if o.first != nil {
		r.First = o.first.Error()
	}
	done := float64(o.reads + o.writes)
	if done == 0 || o.elapsed <= 0 {
		return
	}
	r.IOPS = done / r.Seconds
	r.MBs = r.IOPS * float64(block) / 1e6
	r.CPU = microseconds(cpu) / done
	h := &o.latencies
	r.Latency = Latency{
		Min:  microseconds(h.min),
		Mean: microseconds(h.sum) / done,
		P50:  microseconds(h.quantile(.5)),
		P90:  microseconds(h.quantile(.9)),
		P99:  microseconds(h.quantile(.99)),
		P999: microseconds(h.quantile(.999)),
		Max:  microseconds(h.max),
	}
}

func microseconds(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1e3 }
