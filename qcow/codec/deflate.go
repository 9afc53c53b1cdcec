package codec

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/klauspost/compress/flate"
)

// window is how far back a stream made here refers, in bytes. Readers that inflate piece by piece with QEMU's window
// cannot follow farther.
const window = 4096

// inflater reads streams, one after the other. It decodes at most 32 KiB more than it is asked for.
type inflater struct {
	src  bytes.Reader
	r    io.ReadCloser
	more [1]byte
}

var inflaters = sync.Pool{New: func() any {
	f := &inflater{}
	f.r = flate.NewReader(&f.src)
	return f
}}

func inflate(dst, src []byte) error {
	f := inflaters.Get().(*inflater)
	defer func() {
		f.src.Reset(nil)
		inflaters.Put(f)
	}()
	f.src.Reset(src)
	if err := f.r.(flate.Resetter).Reset(&f.src, nil); err != nil {
		return err
	}
	n, err := io.ReadFull(f.r, dst)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("it ends after %d of %d bytes", n, len(dst))
	}
	if err != nil {
		return err
	}
	// The stream may end here, or go on, or be cut off, but not in nonsense: that would be damage after all.
	if _, err = f.r.Read(f.more[:]); errors.As(err, new(flate.CorruptInputError)) {
		return err
	}
	return nil
}

// deflater writes streams, one after the other.
type deflater struct {
	out bounded
	w   *flate.Writer
}

var deflaters = sync.Pool{New: func() any {
	w, err := flate.NewWriterWindow(nil, window)
	if err != nil {
		panic(err) // only for a window that is no window
	}
	return &deflater{w: w}
}}

func deflate(dst, src []byte) (out []byte, ok bool, err error) {
	d := deflaters.Get().(*deflater)
	defer func() {
		d.out = bounded{}
		deflaters.Put(d)
	}()
	d.out = bounded{b: dst, room: len(src) - 1}
	d.w.Reset(&d.out)
	if _, err = d.w.Write(src); err == nil {
		err = d.w.Close()
	}
	if errors.Is(err, errFull) {
		return dst, false, nil
	}
	if err != nil {
		return dst, false, err
	}
	return d.out.b, true, nil
}

// bounded is a buffer that takes room bytes more, and then ends the compression.
type bounded struct {
	b    []byte
	room int
}

var errFull = errors.New("no room for the compressed cluster")

func (o *bounded) Write(p []byte) (int, error) {
	if len(p) > o.room {
		return 0, errFull
	}
	o.b = append(o.b, p...)
	o.room -= len(p)
	return len(p), nil
}
