package driver

import (
	"fmt"
	"sync"
)

// inflight knows for which volumes a call is running.
type inflight struct {
	mu   sync.Mutex
	runs map[string]string // volume handle, or "name " and the name of a volume to be created -> call
}

func newInflight() *inflight { return &inflight{runs: map[string]string{}} }

// start marks key as busy until done is called. It fails with errPending when it is busy already.
func (f *inflight) start(key, call string) (done func(), err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if other, running := f.runs[key]; running {
		return nil, fmt.Errorf("%w: %s of %s", errPending, other, key)
	}
	f.runs[key] = call
	return func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		delete(f.runs, key)
	}, nil
}
