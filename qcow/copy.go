package qcow

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"slices"
	"sync"

	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// Source is what Copy reads: an image, or a raw file ([Raw]).
type Source interface {
	io.ReaderAt
	// Size returns the length in bytes.
	Size() int64
	// Extents describes n bytes at off; see [Image.Extents].
	Extents(off, n int64) iter.Seq2[Extent, error]
}

// Target is what Copy writes: an image, or a raw file ([Raw]).
type Target interface {
	io.WriterAt
	// Size returns the length in bytes.
	Size() int64
	// WriteZeroes makes n bytes at off read as zeroes.
	WriteZeroes(off, n int64, mayUnmap bool) error
	// Flush makes all of it durable.
	Flush() error
}

var (
	_ Source = (*Image)(nil)
	_ Target = (*Image)(nil)
	_ Source = (*RawDisk)(nil)
	_ Target = (*RawDisk)(nil)
)

// CopyOptions say how Copy copies.
type CopyOptions struct {
	// Compress stores data compressed. The target must be an image that can have compressed clusters.
	Compress bool
	// TargetIsZero says that the target reads as zeroes everywhere, as a new one does: zeroes need not be written.
	TargetIsZero bool
	// SparseSize is the unit in bytes in which data of zeroes is found and left out; 0 means 4096, a negative number that data is
	// copied as it is. What the source's tables call zeroes is left out in any case.
	SparseSize int
	// Progress, unless nil, is told how many bytes of how many are done. Calls are in order, from one goroutine at a time.
	Progress func(done, total int64)
}

// copyChunk is how many bytes are read and written at once, and copyWorkers how many times at the same time.
const (
	copyChunk   = 4 << 20
	copyWorkers = 4
)

// Copy copies the content of src to dst, which must not be shorter, and makes it durable. Holes and zeroes stay such. When ctx is done it
// returns its error; dst holds a part of the content then. What src holds must not change meanwhile.
func Copy(ctx context.Context, dst Target, src Source, o CopyOptions) error {
	total := src.Size()
	if dst.Size() < total {
		return format.Invalidf("%d bytes don't fit into a disk of %d", total, dst.Size())
	}
	if o.SparseSize == 0 {
		o.SparseSize = 4096
	}
	c := &copier{dst: dst, src: src, o: o, total: total}
	if o.Compress {
		img, ok := dst.(*Image)
		if !ok {
			return format.Invalidf("only an image can have compressed clusters")
		}
		c.compressed = img
	}
	if err := c.run(ctx); err != nil {
		return err
	}
	if rest := dst.Size() - total; rest > 0 && !o.TargetIsZero {
		if err := dst.WriteZeroes(total, rest, true); err != nil {
			return err
		}
	}
	return dst.Flush()
}

type copier struct {
	dst        Target
	src        Source
	compressed *Image // nil: plain
	o          CopyOptions
	total      int64

	mu   sync.Mutex
	done int64
}

// span is a part of the disk that is copied at once.
type span struct {
	off, n int64
	zero   bool // as the tables of the source say
}

// run hands the spans of the disk to workers. The first error ends them all.
func (c *copier) run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	spans := make(chan span)
	workers := copyWorkers
	if c.compressed != nil {
		workers = 1 // compressing is parallel in itself, and in order it packs well
	}
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for s := range spans {
				if err := c.copy(s); err != nil {
					cancel(err)
					return
				}
				c.advance(s.n)
			}
		})
	}
	err := c.divide(ctx, spans)
	close(spans)
	wg.Wait()
	return errors.Join(err, nilIfSame(context.Cause(ctx), err))
}

// nilIfSame returns err unless it is other.
func nilIfSame(err, other error) error {
	if errors.Is(other, err) {
		return nil
	}
	return err
}

// divide sends the disk in spans that end at multiples of copyChunk, a multiple of every cluster size.
func (c *copier) divide(ctx context.Context, spans chan<- span) error {
	send := func(s span) error {
		select {
		case spans <- s:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	for off := int64(0); off < c.total; {
		chunk := span{off: off, n: min(copyChunk-off%copyChunk, c.total-off), zero: true}
		for e, err := range c.src.Extents(off, c.total-off) {
			if err != nil {
				return err
			}
			zero := !e.stored()
			if off == e.Offset && zero && e.Length > chunk.n { // a long hole in one piece
				chunk.n = e.Length
				if end := off + e.Length; end < c.total {
					chunk.n -= end % copyChunk
				}
				break
			}
			chunk.zero = chunk.zero && zero
			if e.Offset+e.Length >= off+chunk.n || !chunk.zero {
				break
			}
		}
		if err := send(chunk); err != nil {
			return err
		}
		off += chunk.n
	}
	return nil
}

func (c *copier) copy(s span) error {
	if s.zero {
		return c.zero(s.off, s.n)
	}
	b := buffers.get(int(s.n))
	defer buffers.put(b)
	if n, err := c.src.ReadAt(b, s.off); n < len(b) {
		return fmt.Errorf("read %d bytes at %d: %w", len(b), s.off, err)
	}
	if c.compressed != nil {
		return c.compressed.WriteCompressed(c.wholeClusters(b, s.off), s.off)
	}
	for pos := 0; pos < len(b); {
		n, zero := c.alike(b[pos:])
		var err error
		if zero {
			err = c.zero(s.off+int64(pos), int64(n))
		} else {
			_, err = c.dst.WriteAt(b[pos:pos+n], s.off+int64(pos))
		}
		if err != nil {
			return fmt.Errorf("write %d bytes at %d: %w", n, s.off+int64(pos), err)
		}
		pos += n
	}
	return nil
}

// wholeClusters returns b, or, where that ends within a cluster because the source ends there and the target does not, b with zeroes behind it.
func (c *copier) wholeClusters(b []byte, off int64) []byte {
	size, end := int64(c.compressed.geometry.ClusterSize()), off+int64(len(b))
	missing := min((end+size-1)/size*size, c.compressed.Size()) - end
	if missing == 0 {
		return b
	}
	return append(slices.Clip(b), make([]byte, missing)...)
}

// alike returns how many bytes at the start of b are zeroes, or are not, in units of the sparse size.
func (c *copier) alike(b []byte) (n int, zero bool) {
	unit := c.o.SparseSize
	if unit < 0 {
		return len(b), false
	}
	zero = isZero(b[:min(unit, len(b))])
	for n = unit; n < len(b) && isZero(b[n:min(n+unit, len(b))]) == zero; {
		n += unit
	}
	return min(n, len(b)), zero
}

func (c *copier) zero(off, n int64) error {
	if c.o.TargetIsZero {
		return nil
	}
	return c.dst.WriteZeroes(off, n, true)
}

func (c *copier) advance(n int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.done += n
	if c.o.Progress != nil {
		c.o.Progress(c.done, c.total)
	}
}

// RawDisk is a raw file as a disk of a fixed size.
type RawDisk struct {
	f    storage.File
	size int64
}

// Raw returns the disk that the bytes of f are. Closing f stays with the caller.
func Raw(f storage.File) (*RawDisk, error) {
	size, err := f.Size()
	return &RawDisk{f, size}, err
}

// Size implements [Source] and [Target].
func (r *RawDisk) Size() int64 { return r.size }

// ReadAt implements [Source].
func (r *RawDisk) ReadAt(p []byte, off int64) (int, error) { return r.f.ReadAt(p, off) }

// WriteAt implements [Target]. It does not reach past the end.
func (r *RawDisk) WriteAt(p []byte, off int64) (int, error) {
	if off < 0 || off > r.size || int64(len(p)) > r.size-off {
		return 0, format.Invalidf("%d bytes at %d are outside the raw disk of %d", len(p), off, r.size)
	}
	return r.f.WriteAt(p, off)
}

// WriteZeroes implements [Target].
func (r *RawDisk) WriteZeroes(off, n int64, mayUnmap bool) error {
	if off < 0 || n < 0 || off > r.size || n > r.size-off {
		return format.Invalidf("%d bytes at %d are outside the raw disk of %d", n, off, r.size)
	}
	if mayUnmap {
		return r.f.PunchHole(off, n)
	}
	for n > 0 {
		part := zeroes[:min(n, int64(len(zeroes)))]
		if _, err := r.f.WriteAt(part, off); err != nil {
			return err
		}
		off, n = off+int64(len(part)), n-int64(len(part))
	}
	return nil
}

// Flush implements [Target].
func (r *RawDisk) Flush() error { return r.f.Sync() }

// Extents implements [Source]: holes are zeroes, everything else is data.
func (r *RawDisk) Extents(off, n int64) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		for end := off + n; off < end; {
			e := Extent{Offset: off, Length: end - off, Kind: ExtentZero}
			start, stop, err := r.f.NextData(off)
			switch {
			case errors.Is(err, io.EOF):
				err = nil
			case start > off:
				e.Length = min(e.Length, start-off)
			default:
				e.Kind, e.Length, e.Host = ExtentData, min(e.Length, stop-off), format.HostOffset(off)
			}
			if !yield(e, err) || err != nil {
				return
			}
			off += e.Length
		}
	}
}
