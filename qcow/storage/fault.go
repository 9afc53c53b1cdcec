package storage

import "sync"

// Fault says which operation fails, and how.
type Fault struct {
	At      int   // the At-th operation counted, from 0
	Forever bool  // and every one after it
	Err     error // what it returns
	Short   bool  // a write first writes half of its bytes
}

// Faults is a [File] that counts the operations which change the file, and lets the ones that its fault names
// fail without reaching it.
type Faults struct {
	File

	mu       sync.Mutex
	fault    *Fault
	count    int
	injected int
}

// NewFaults wraps f. With a nil fault it only counts.
func NewFaults(f File, fault *Fault) *Faults { return &Faults{File: f, fault: fault} }

// Count returns how many operations were counted, and how many of them were made to fail.
func (f *Faults) Count() (total, injected int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.count, f.injected
}

// next counts an operation and returns the fault it meets, or nil.
func (f *Faults) next() *Fault {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := f.count
	f.count++
	if f.fault == nil || n < f.fault.At || n > f.fault.At && !f.fault.Forever {
		return nil
	}
	f.injected++
	return f.fault
}

// WriteAt implements [File].
func (f *Faults) WriteAt(p []byte, off int64) (int, error) { return f.write(p, off, f.File.WriteAt) }

// WriteSync implements [File]. What a short one leaves is not durable.
func (f *Faults) WriteSync(p []byte, off int64) (int, error) {
	return f.write(p, off, f.File.WriteSync)
}

func (f *Faults) write(p []byte, off int64, do func([]byte, int64) (int, error)) (int, error) {
	x := f.next()
	if x == nil {
		return do(p, off)
	}
	n := 0
	if x.Short && len(p) > 1 {
		var err error
		if n, err = f.File.WriteAt(p[:len(p)/2], off); err != nil {
			return n, err
		}
	}
	return n, x.Err
}

// PunchHole implements [File].
func (f *Faults) PunchHole(off, n int64) error {
	if x := f.next(); x != nil {
		return x.Err
	}
	return f.File.PunchHole(off, n)
}

// Allocate implements [File].
func (f *Faults) Allocate(off, n int64) error {
	if x := f.next(); x != nil {
		return x.Err
	}
	return f.File.Allocate(off, n)
}

// Truncate implements [File].
func (f *Faults) Truncate(size int64) error {
	if x := f.next(); x != nil {
		return x.Err
	}
	return f.File.Truncate(size)
}

// Sync implements [File].
func (f *Faults) Sync() error {
	if x := f.next(); x != nil {
		return x.Err
	}
	return f.File.Sync()
}
