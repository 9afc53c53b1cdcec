package qcow

import (
	"fmt"
	"sync"
)

// groupSync lets callers that want the file synced at the same time share one sync. A sync that began before
// a caller's write ended does not count for that caller.
type groupSync struct {
	mu      sync.Mutex
	changed *sync.Cond
	started uint64 // syncs begun
	done    uint64 // syncs ended
	busy    bool
}

func newGroupSync() *groupSync {
	s := &groupSync{}
	s.changed = sync.NewCond(&s.mu)
	return s
}

// do returns when a call of fn that began after do was called has ended, with its error. The error of a sync is
// remembered elsewhere (see Image.poison), so that callers which shared it meet it there.
func (s *groupSync) do(fn func() error) error {
	s.mu.Lock()
	want := s.started + 1
	for s.done < want && s.busy {
		s.changed.Wait()
	}
	if s.done >= want {
		s.mu.Unlock()
		return nil
	}
	s.busy = true
	s.started++
	mine := s.started
	s.mu.Unlock()

	err := fn()

	s.mu.Lock()
	s.busy = false
	s.done = mine
	s.changed.Broadcast()
	s.mu.Unlock()
	return err
}

// sync makes everything written so far durable. A sync that failed once poisons the image: what is on disk is unknown, and
// asking again would only hide that.
func (img *Image) sync() error {
	if err := img.poisoned(); err != nil {
		return err
	}
	err := img.syncs.do(func() error {
		if err := img.file.Sync(); err != nil {
			return img.poison(fmt.Errorf("sync image: %w", err))
		}
		return nil
	})
	if err != nil {
		return err
	}
	return img.poisoned() // a sync that this call shared may have failed
}

// poison makes every later change of the image fail: its tables on disk are in an unknown state, or contradict each other.
// The first reason stays. It returns the error to report.
func (img *Image) poison(err error) error {
	err = fmt.Errorf("image is read-only from now on: %w", err)
	img.poisonedBy.CompareAndSwap(nil, &err)
	return err
}

func (img *Image) poisoned() error {
	if err := img.poisonedBy.Load(); err != nil {
		return *err
	}
	return nil
}
