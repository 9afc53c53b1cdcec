package nbdexport_test

import (
	"sync"

	"github.com/qcow-csi/qcow-csi/nbdexport/nbdtest"
)

// journal keeps the operations of a backend.
type journal struct {
	mu  sync.Mutex
	ops []nbdtest.Operation
}

func (j *journal) note(op nbdtest.Operation) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.ops = append(j.ops, op)
	return nil
}

// take returns the operations since the last take.
func (j *journal) take() []nbdtest.Operation {
	j.mu.Lock()
	defer j.mu.Unlock()
	ops := j.ops
	j.ops = nil
	return ops
}
