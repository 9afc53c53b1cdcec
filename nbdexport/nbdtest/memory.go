package nbdtest

import (
	"fmt"
	"io"
	"sync"

	"github.com/qcow-csi/qcow-csi/nbdexport"
)

// Kind is the kind of an operation of a backend.
type Kind string

// The operations of a backend.
const (
	Read        Kind = "read"
	Write       Kind = "write"
	WriteZeroes Kind = "write zeroes"
	Discard     Kind = "discard"
	Flush       Kind = "flush"
)

// Operation is a call that a backend has received.
type Operation struct {
	Kind           Kind
	Offset, Length int64
	MayUnmap       bool // of WriteZeroes
}

// Memory is a backend in memory.
type Memory struct {
	// Before, if set, is called with every operation, before it is carried out and outside all locks. An error from
	// it becomes that of the operation, which then changes nothing. It is set before the backend is used.
	Before func(Operation) error

	mu    sync.RWMutex
	info  nbdexport.Info
	bytes []byte
}

var _ nbdexport.Backend = (*Memory)(nil)

// NewMemory returns a backend that describes itself as info, and holds info.Size zero bytes.
func NewMemory(info nbdexport.Info) *Memory {
	return &Memory{info: info, bytes: make([]byte, info.Size)}
}

// Info describes the backend.
func (m *Memory) Info() nbdexport.Info {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.info
}

// Grow makes the backend size bytes long.
func (m *Memory) Grow(size int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.bytes = append(m.bytes, make([]byte, size-m.info.Size)...)
	m.info.Size = size
}

// Bytes returns a copy of the contents.
func (m *Memory) Bytes() []byte {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return append([]byte(nil), m.bytes...)
}

// ReadAt implements nbdexport.Backend. As io.ReaderAt allows, it reports io.EOF together with the last byte.
func (m *Memory) ReadAt(p []byte, off int64) (int, error) {
	if err := m.before(Operation{Kind: Read, Offset: off, Length: int64(len(p))}); err != nil {
		return 0, err
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	n := copy(p, m.bytes[off:])
	if off+int64(len(p)) >= m.info.Size {
		return n, io.EOF
	}
	return n, nil
}

// WriteAt implements nbdexport.Backend.
func (m *Memory) WriteAt(p []byte, off int64) (int, error) {
	if err := m.before(Operation{Kind: Write, Offset: off, Length: int64(len(p))}); err != nil {
		return 0, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if off+int64(len(p)) > m.info.Size {
		return 0, fmt.Errorf("write of %d bytes at %d is past the end", len(p), off)
	}
	return copy(m.bytes[off:], p), nil
}

// WriteZeroes implements nbdexport.Backend.
func (m *Memory) WriteZeroes(off, n int64, mayUnmap bool) error {
	return m.zero(Operation{Kind: WriteZeroes, Offset: off, Length: n, MayUnmap: mayUnmap})
}

// Discard implements nbdexport.Backend. It zeroes the whole range.
func (m *Memory) Discard(off, n int64) error {
	return m.zero(Operation{Kind: Discard, Offset: off, Length: n})
}

func (m *Memory) zero(op Operation) error {
	if err := m.before(op); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.bytes[op.Offset:][:op.Length])
	return nil
}

// Flush implements nbdexport.Backend.
func (m *Memory) Flush() error { return m.before(Operation{Kind: Flush}) }

func (m *Memory) before(op Operation) error {
	if m.Before == nil {
		return nil
	}
	return m.Before(op)
}
