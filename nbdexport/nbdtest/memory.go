package nbdtest

import (
	"fmt"
	"io"
	"iter"
	"sync"

	"github.com/qcow-csi/qcow-csi/nbdexport"
)

// Kind is the kind of an operation of a backend.
type Kind string

// The operations of a backend.
const (
	Read        Kind = "read"
	Write       Kind = "write"
	WriteSync   Kind = "durable write"
	WriteZeroes Kind = "write zeroes"
	Discard     Kind = "discard"
	Flush       Kind = "flush"
	Describe    Kind = "describe"
)

// Operation is a call that a backend has received.
type Operation struct {
	Kind           Kind
	Offset, Length int64
	How            nbdexport.Zeroing // of WriteZeroes
	Context        string            // of Describe
}

// sector is the unit in bytes in which Memory knows what is a hole.
const sector = 512

// Memory is a backend in memory. It begins as one hole. Writing fills holes, and what may give space back makes
// new ones; the metadata contexts that its Info lists all say what base:allocation does.
type Memory struct {
	// Before, if set, is called with every operation, before it is carried out and outside all locks. An error from
	// it becomes that of the operation, which then changes nothing. It is set before the backend is used.
	Before func(Operation) error

	mu    sync.RWMutex
	info  nbdexport.Info
	bytes []byte
	holes []bool // by sector
}

var _ nbdexport.Backend = (*Memory)(nil)

// NewMemory returns a backend that describes itself as info, and holds info.Size zero bytes.
func NewMemory(info nbdexport.Info) *Memory {
	m := &Memory{info: info, bytes: make([]byte, info.Size)}
	m.addHoles()
	return m
}

// addHoles makes holes of the sectors that are new.
func (m *Memory) addHoles() {
	for int64(len(m.holes))*sector < m.info.Size {
		m.holes = append(m.holes, true)
	}
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
	m.addHoles()
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

// ReadExtent implements nbdexport.Backend.
func (m *Memory) ReadExtent(p []byte, off int64) (int, bool, error) {
	if err := m.before(Operation{Kind: Read, Offset: off, Length: int64(len(p))}); err != nil {
		return 0, false, err
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	n, hole := m.run(off, int64(len(p)))
	if !hole {
		copy(p[:n], m.bytes[off:])
	}
	return int(n), hole, nil
}

// run returns how many of n bytes at off are in holes, or are not.
func (m *Memory) run(off, n int64) (int64, bool) {
	hole, end := m.holes[off/sector], (off/sector+1)*sector
	for end < off+n && m.holes[end/sector] == hole {
		end += sector
	}
	return min(end-off, n), hole
}

// Splice implements nbdexport.Backend. It moves nothing.
func (m *Memory) Splice(int, int64, int) (int, error) { return 0, nil }

// WatchSplices implements nbdexport.Backend. There is nothing to watch.
func (m *Memory) WatchSplices(func() bool) (forget func()) { return func() {} }

// WriteAt implements nbdexport.Backend.
func (m *Memory) WriteAt(p []byte, off int64) (int, error) { return m.write(Write, p, off) }

// WriteSync implements nbdexport.Backend.
func (m *Memory) WriteSync(p []byte, off int64) (int, error) { return m.write(WriteSync, p, off) }

func (m *Memory) write(kind Kind, p []byte, off int64) (int, error) {
	if err := m.before(Operation{Kind: kind, Offset: off, Length: int64(len(p))}); err != nil {
		return 0, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if off+int64(len(p)) > m.info.Size {
		return 0, fmt.Errorf("write of %d bytes at %d is past the end", len(p), off)
	}
	for s := off / sector; s*sector < off+int64(len(p)); s++ {
		m.holes[s] = false
	}
	return copy(m.bytes[off:], p), nil
}

// WriteZeroes implements nbdexport.Backend.
func (m *Memory) WriteZeroes(off, n int64, how nbdexport.Zeroing) error {
	return m.zero(Operation{Kind: WriteZeroes, Offset: off, Length: n, How: how}, how.MayUnmap)
}

// Discard implements nbdexport.Backend. It zeroes the whole range.
func (m *Memory) Discard(off, n int64) error {
	return m.zero(Operation{Kind: Discard, Offset: off, Length: n}, true)
}

func (m *Memory) zero(op Operation, mayUnmap bool) error {
	if err := m.before(op); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.bytes[op.Offset:][:op.Length])
	for s := (op.Offset + sector - 1) / sector; mayUnmap && (s+1)*sector <= op.Offset+op.Length; s++ {
		m.holes[s] = true
	}
	return nil
}

// Extents implements nbdexport.Backend.
func (m *Memory) Extents(context string, off, n int64) iter.Seq2[nbdexport.Extent, error] {
	return func(yield func(nbdexport.Extent, error) bool) {
		if err := m.before(Operation{Kind: Describe, Offset: off, Length: n, Context: context}); err != nil {
			yield(nbdexport.Extent{}, err)
			return
		}
		for n > 0 {
			m.mu.RLock()
			length, hole := m.run(off, n)
			m.mu.RUnlock()
			e := nbdexport.Extent{Length: length}
			if hole {
				e.Flags = nbdexport.StateHole | nbdexport.StateZero
			}
			if !yield(e, nil) {
				return
			}
			off, n = off+length, n-length
		}
	}
}

// Flush implements nbdexport.Backend.
func (m *Memory) Flush() error { return m.before(Operation{Kind: Flush}) }

func (m *Memory) before(op Operation) error {
	if m.Before == nil {
		return nil
	}
	return m.Before(op)
}
