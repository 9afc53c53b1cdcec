package qcow

import (
	"encoding/binary"
	"fmt"
	"sync"

	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
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
func (img *Image) sync() error { return img.syncFile(img.syncs, img.file) }

// syncData makes all guest data written so far durable.
func (img *Image) syncData() error {
	if img.external() {
		return img.syncFile(img.dataSyncs, img.data)
	}
	return img.sync()
}

func (img *Image) syncFile(group *groupSync, f storage.File) error {
	if err := img.poisoned(); err != nil {
		return err
	}
	err := group.do(func() error {
		changed := img.tablesDurable.changed.Load()
		if err := f.Sync(); err != nil {
			return img.poison(fmt.Errorf("sync image: %w", err))
		}
		if f == img.file {
			img.tablesDurable.covered(changed)
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

// markCorrupt says in the header that the image contradicts itself, so that nobody writes to it before it was repaired, and poisons it.
// It returns the error to report. An image of version 2 has no place for the mark.
func (img *Image) markCorrupt(err error) error {
	img.headerMu.Lock()
	defer img.headerMu.Unlock()
	if img.readOnly || img.poisoned() != nil || img.version < 3 {
		return img.poison(err)
	}
	bits := make([]byte, 8)
	binary.BigEndian.PutUint64(bits, img.header.Incompatible|format.IncompatCorrupt)
	if _, failed := img.file.WriteAt(bits, format.IncompatibleOffset); failed == nil {
		img.header.Incompatible |= format.IncompatCorrupt
		_ = img.file.Sync() // the mark is a help for later, the error below is what counts
	}
	return img.poison(err)
}
