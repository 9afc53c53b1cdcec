package main

import (
	"sync"
	"time"

	"k8s.io/klog/v2"
)

// failurePause is how long no more is said of an operation after a line about it.
const failurePause = time.Second

// failures logs why requests have failed, which clients are not told. A guest on a full disk tries the same again a thousand times a second:
// what is left out is counted.
type failures struct {
	logger klog.Logger

	mu   sync.Mutex
	said map[string]*silence // by operation
}

// silence is what is not said after a line about an operation.
type silence struct {
	since time.Time
	count int
}

func newFailures(logger klog.Logger) *failures {
	return &failures{logger: logger, said: map[string]*silence{}}
}

// report has the form of nbdexport.ImageOptions.Failed.
func (f *failures) report(operation string, off, n int64, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := f.said[operation]
	if s == nil {
		s = &silence{}
		f.said[operation] = s
	}
	if time.Since(s.since) < failurePause {
		s.count++
		return
	}
	f.logger.Error(err, "Request failed", "operation", operation, "offset", off, "length", n, "omitted", s.count)
	*s = silence{since: time.Now()}
}

// finish says how many are still to be said.
func (f *failures) finish() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for operation, s := range f.said {
		if s.count > 0 {
			f.logger.Info("More requests failed", "operation", operation, "omitted", s.count)
		}
	}
}
