package attachtest

import (
	"errors"
	"fmt"
	"iter"
	"sync"
	"testing"

	"github.com/qcow-csi/qcow-csi/nbdexport"
)

// Backend is an export in memory that counts what it is asked for. It reports to the test whatever no attacher may do:
// use it after Retire, reach past its end, write although it is read-only. Methods may be called concurrently.
type Backend struct {
	t testing.TB

	mu      sync.Mutex
	data    []byte
	info    nbdexport.Info
	calls   map[Op]int
	fail    func(Op, int64) error
	retired bool
}

var _ nbdexport.Backend = (*Backend)(nil)

// Op is a method of the backend.
type Op string

// The methods.
const (
	Read        Op = "read"
	Write       Op = "write"
	WriteZeroes Op = "write zeroes"
	Discard     Op = "discard"
	Flush       Op = "flush"
)

// NewBackend returns a backend of size bytes, all zeroes.
func NewBackend(t testing.TB, size int64) *Backend {
	return &Backend{t: t, data: make([]byte, size), info: nbdexport.Info{Size: size}, calls: make(map[Op]int)}
}

// Describe changes what the backend says of itself, but for the size. It is for before it is attached.
func (b *Backend) Describe(info nbdexport.Info) {
	b.mu.Lock()
	defer b.mu.Unlock()
	info.Size = b.info.Size
	b.info = info
}

// Grow makes the backend size bytes long.
func (b *Backend) Grow(size int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.data = append(b.data, make([]byte, size-int64(len(b.data)))...)
	b.info.Size = size
}

// Fail makes f decide, from the method and the offset, whether a call fails, and how. nil lets all succeed. It is called
// one at a time.
func (b *Backend) Fail(f func(Op, int64) error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.fail = f
}

// Retire says that the backend must not be used from now on.
func (b *Backend) Retire() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.retired = true
}

// Calls says how often the method was called.
func (b *Backend) Calls(op Op) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.calls[op]
}

// Bytes returns a copy of n bytes at off.
func (b *Backend) Bytes(off, n int64) []byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	return append([]byte(nil), b.data[off:off+n]...)
}

// Info implements [nbdexport.Backend].
func (b *Backend) Info() nbdexport.Info {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.info
}

// ReadAt implements [nbdexport.Backend].
func (b *Backend) ReadAt(p []byte, off int64) (int, error) {
	return b.transfer(Read, p, off, func(data []byte) { copy(p, data) })
}

// WriteAt implements [nbdexport.Backend].
func (b *Backend) WriteAt(p []byte, off int64) (int, error) {
	return b.transfer(Write, p, off, func(data []byte) { copy(data, p) })
}

// ReadExtent implements [nbdexport.Backend].
func (b *Backend) ReadExtent(p []byte, off int64) (int, bool, error) {
	n, err := b.ReadAt(p, off)
	return n, false, err
}

// Splice implements [nbdexport.Backend]. It moves nothing.
func (b *Backend) Splice(int, int64, int) (int, error) { return 0, nil }

// WatchSplices implements [nbdexport.Backend]. There is nothing to watch.
func (b *Backend) WatchSplices(func() bool) (forget func()) { return func() {} }

// WriteSync implements [nbdexport.Backend].
func (b *Backend) WriteSync(p []byte, off int64) (int, error) {
	n, err := b.WriteAt(p, off)
	if err == nil {
		err = b.Flush()
	}
	return n, err
}

// Extents implements [nbdexport.Backend]. No attacher asks for it.
func (b *Backend) Extents(string, int64, int64) iter.Seq2[nbdexport.Extent, error] {
	return func(yield func(nbdexport.Extent, error) bool) { yield(nbdexport.Extent{}, errors.ErrUnsupported) }
}

// WriteZeroes implements [nbdexport.Backend].
func (b *Backend) WriteZeroes(off, n int64, _ nbdexport.Zeroing) error {
	return b.do(WriteZeroes, off, n, func(data []byte) { clear(data) })
}

// Discard implements [nbdexport.Backend].
func (b *Backend) Discard(off, n int64) error {
	return b.do(Discard, off, n, func(data []byte) { clear(data) })
}

// Flush implements [nbdexport.Backend].
func (b *Backend) Flush() error {
	return b.do(Flush, 0, 0, func([]byte) {})
}

func (b *Backend) transfer(op Op, p []byte, off int64, apply func(data []byte)) (int, error) {
	if err := b.do(op, off, int64(len(p)), apply); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (b *Backend) do(op Op, off, n int64, apply func(data []byte)) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.calls[op]++
	var broken error
	switch {
	case b.retired:
		broken = errors.New("used after it was let go")
	case off < 0 || n < 0 || off+n > int64(len(b.data)):
		broken = fmt.Errorf("past the end, %d", len(b.data))
	case b.info.ReadOnly && op != Read && op != Flush:
		broken = errors.New("read-only")
	}
	if broken != nil {
		b.t.Errorf("backend: %s of %d bytes at %d: %v", op, n, off, broken)
		return broken
	}
	if b.fail != nil {
		if err := b.fail(op, off); err != nil {
			return err
		}
	}
	apply(b.data[off : off+n])
	return nil
}
