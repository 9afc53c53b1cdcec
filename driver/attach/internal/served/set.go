// Package served keeps the devices that one process serves, and keeps operations on the same volume apart.
package served

import (
	"fmt"
	"maps"
	"slices"
	"sync"

	"github.com/qcow-csi/qcow-csi/driver/attach"
)

// Set is the devices that a process serves, by volume. D is what the attacher knows of one. The zero value is an
// empty set. Methods may be called concurrently.
type Set[D any] struct {
	mu      sync.Mutex
	idle    sync.Cond // signalled, with mu, when claimed becomes empty
	devices map[string]D
	claimed map[string]struct{}
	closed  bool
}

// Claim begins an operation on the volume. It fails with attach.ErrBusy while another one is under way, and with
// attach.ErrClosed once the set has been closed.
func (s *Set[D]) Claim(volumeID string) (release func(), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, attach.ErrClosed
	}
	if _, taken := s.claimed[volumeID]; taken {
		return nil, fmt.Errorf("%w: another operation on volume %q is under way", attach.ErrBusy, volumeID)
	}
	if s.claimed == nil {
		s.claimed = make(map[string]struct{})
	}
	s.claimed[volumeID] = struct{}{}
	return func() { s.release(volumeID) }, nil
}

func (s *Set[D]) release(volumeID string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.claimed, volumeID)
	if len(s.claimed) == 0 && s.idle.L != nil {
		s.idle.Broadcast()
	}
}

// Get returns the device of the volume, if this process serves one.
func (s *Set[D]) Get(volumeID string) (D, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	d, ok := s.devices[volumeID]
	return d, ok
}

// Put adds a device. The caller has claimed the volume.
func (s *Set[D]) Put(volumeID string, d D) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.devices == nil {
		s.devices = make(map[string]D)
	}
	s.devices[volumeID] = d
}

// Delete removes a device. The caller has claimed the volume.
func (s *Set[D]) Delete(volumeID string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.devices, volumeID)
}

// Close makes every later Claim fail, waits until the operations that are under way have ended, and takes all
// devices out of the set.
func (s *Set[D]) Close() []D {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	s.idle.L = &s.mu
	for len(s.claimed) > 0 {
		s.idle.Wait()
	}
	devices := slices.Collect(maps.Values(s.devices))
	s.devices = nil
	return devices
}
