package storage

import (
	"fmt"
	"io"
	"slices"
	"sync"
	"syscall"
)

// Memory is a [File] in memory. Its content starts empty.
type Memory struct {
	mu    sync.RWMutex
	b     []byte
	limit int64 // 0: none
}

var _ File = (*Memory)(nil)

// NewMemory returns an empty file.
func NewMemory() *Memory { return &Memory{} }

// NewMemoryFrom returns a file that holds b, which belongs to it from now on.
func NewMemoryFrom(b []byte) *Memory { return &Memory{b: slices.Clip(b)} }

// Limit makes every write and truncate past size bytes fail with ErrNoSpace; 0 lifts the limit.
func (m *Memory) Limit(size int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.limit = size
}

// Bytes returns a copy of the content.
func (m *Memory) Bytes() []byte {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return append([]byte(nil), m.b...)
}

// ReadAt implements [File].
func (m *Memory) ReadAt(p []byte, off int64) (int, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if off >= int64(len(m.b)) {
		return 0, io.EOF
	}
	n := copy(p, m.b[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// WriteAt implements [File].
func (m *Memory) WriteAt(p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(p) == 0 {
		return 0, nil
	}
	if err := m.resize(max(int64(len(m.b)), off+int64(len(p)))); err != nil {
		return 0, err
	}
	return copy(m.b[off:], p), nil
}

// Splice implements [File]. It moves nothing.
func (m *Memory) Splice(int, int64, int) (int, error) { return 0, nil }

// WriteSync implements [File]. Memory is as durable as it gets at once.
func (m *Memory) WriteSync(p []byte, off int64) (int, error) { return m.WriteAt(p, off) }

// Size implements [File].
func (m *Memory) Size() (int64, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return int64(len(m.b)), nil
}

// Truncate implements [File].
func (m *Memory) Truncate(size int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.resize(size)
}

// Allocate implements [File].
func (m *Memory) Allocate(off, n int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if n == 0 {
		return nil
	}
	return m.resize(max(int64(len(m.b)), off+n))
}

// PunchHole implements [File].
func (m *Memory) PunchHole(off, n int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if off < int64(len(m.b)) {
		clear(m.b[off:min(off+n, int64(len(m.b)))])
	}
	return nil
}

// page is the granularity of holes in a Memory.
const page = 4096

// NextData implements [File]. Of a Memory every page of zeroes is a hole, however they came there.
func (m *Memory) NextData(off int64) (start, end int64, err error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	size := int64(len(m.b))
	data := func(at int64) bool { // whether the page of at, from there on, holds any
		return slices.ContainsFunc(m.b[at:min(at/page*page+page, size)], func(b byte) bool { return b != 0 })
	}
	next := func(at int64) int64 { return min(at/page*page+page, size) }
	for start = off; start < size && !data(start); start = next(start) {
	}
	if start >= size {
		return 0, 0, io.EOF
	}
	for end = next(start); end < size && data(end); end = next(end) {
	}
	return start, end, nil
}

// Sync implements [File].
func (m *Memory) Sync() error { return nil }

// Close implements [File]. The content stays, so that a test can open it again.
func (m *Memory) Close() error { return nil }

func (m *Memory) resize(size int64) error {
	old := int64(len(m.b))
	switch {
	case size < old:
		clear(m.b[size:]) // what is gained again later reads as zeroes
		m.b = m.b[:size]
	case m.limit > 0 && size > max(m.limit, old):
		return fmt.Errorf("%w: %w", ErrNoSpace, syscall.ENOSPC)
	case size <= int64(cap(m.b)):
		m.b = m.b[:size]
	case size > old:
		b := make([]byte, size, size+size/2)
		copy(b, m.b)
		m.b = b
	}
	return nil
}
