package nbdexport

import (
	"errors"
	"fmt"
	"iter"
	"strings"
	"syscall"

	"github.com/qcow-csi/qcow-csi/qcow"
)

// ImageOptions say how an image is served.
type ImageOptions struct {
	// IgnoreDiscard makes Discard do nothing, and WriteZeroes keep the space of what it zeroes.
	IgnoreDiscard bool
	// Direct says that the image's file was opened to pass the page cache by, which takes buffers that are aligned to pages.
	Direct bool
	// AllocationDepth offers the metadata context qemu:allocation-depth.
	AllocationDepth bool
	// Bitmaps are the names of dirty bitmaps of the image that metadata contexts are offered for.
	Bitmaps []string
	// Failed, if set, is told of every operation that has failed, and why, which clients are not: it is called concurrently.
	Failed func(operation string, off, n int64, err error)
}

// NewImageBackend returns a backend that serves img. Closing the image stays with the caller, after every Serve,
// ServeConn and ServeTransmission that uses the backend has returned.
func NewImageBackend(img *qcow.Image, o ImageOptions) Backend {
	info := img.Info()
	b := &imageBackend{img: img, options: o, cluster: int64(info.ClusterSize), marksZeroes: info.Version >= 3}
	b.contexts = []string{ContextAllocation}
	if o.AllocationDepth {
		b.contexts = append(b.contexts, ContextAllocationDepth)
	}
	for _, name := range o.Bitmaps {
		b.contexts = append(b.contexts, ContextDirtyBitmap+name)
	}
	return b
}

// imageBackend is an image that describes itself as an export.
type imageBackend struct {
	img         *qcow.Image
	options     ImageOptions
	contexts    []string
	cluster     int64 // bytes
	marksZeroes bool  // the image's tables can say of a cluster that it is zeroes
}

// Info implements Backend. Requests of any length are efficient, but only whole clusters are given back, so a cluster
// is what clients should prefer. The caches of an image are shared by all connections: one Flush covers them all.
func (b *imageBackend) Info() Info {
	return Info{
		Size:           b.img.Size(),
		ReadOnly:       b.img.ReadOnly(),
		MinimumBlock:   uint32(b.img.Alignment()),
		PreferredBlock: max(4096, uint32(b.cluster)),
		MultiConn:      true,
		FastZero:       true,
		Direct:         b.options.Direct,
		Contexts:       b.contexts,
	}
}

func (b *imageBackend) ReadAt(p []byte, off int64) (int, error) {
	n, err := b.img.ReadAt(p, off)
	if n < len(p) {
		err = b.failed("read", off, len(p), err)
	}
	return n, err
}

func (b *imageBackend) ReadExtent(p []byte, off int64) (int, bool, error) {
	n, zero, err := b.img.ReadExtent(p, off)
	return n, zero, b.failed("read", off, len(p), err)
}

func (b *imageBackend) Splice(pipe int, off int64, n int) (int, error) {
	moved, err := b.img.Splice(pipe, off, n)
	return moved, b.failed("read", off, n, err)
}

func (b *imageBackend) WatchSplices(unread func() bool) (forget func()) {
	return b.img.WatchSplices(unread)
}

func (b *imageBackend) WriteAt(p []byte, off int64) (int, error) {
	n, err := b.img.WriteAt(p, off)
	return n, b.failed("write", off, len(p), err)
}

func (b *imageBackend) WriteSync(p []byte, off int64) (int, error) {
	n, err := b.img.WriteSync(p, off)
	return n, b.failed("durable write", off, len(p), err)
}

// WriteZeroes implements Backend. It is fast where it changes nothing but tables.
func (b *imageBackend) WriteZeroes(off, n int64, how Zeroing) error {
	if end := off + n; how.Fast && (!how.MayUnmap || !b.marksZeroes || off%b.cluster != 0 || end%b.cluster != 0 && end != b.img.Size()) {
		return syscall.ENOTSUP
	}
	return b.failed("write of zeroes", off, int(n), b.img.WriteZeroes(off, n, how.MayUnmap && !b.options.IgnoreDiscard))
}

func (b *imageBackend) Discard(off, n int64) error {
	if b.options.IgnoreDiscard {
		return nil
	}
	return b.failed("discard", off, int(n), b.img.Discard(off, n))
}

func (b *imageBackend) Flush() error { return b.failed("flush", 0, 0, b.img.Flush()) }

// Extents implements Backend.
func (b *imageBackend) Extents(context string, off, n int64) iter.Seq2[Extent, error] {
	if bitmap, ok := strings.CutPrefix(context, ContextDirtyBitmap); ok {
		return b.dirty(bitmap, off, n)
	}
	describe := allocation
	if context == ContextAllocationDepth {
		describe = allocationDepth
	}
	return func(yield func(Extent, error) bool) {
		for e, err := range b.img.Extents(off, n) {
			if err = b.failed("description", off, int(n), err); !yield(Extent{e.Length, describe(e)}, err) || err != nil {
				return
			}
		}
	}
}

// allocation is what base:allocation says of an extent. One that is zero and keeps its clusters is no hole.
func allocation(e qcow.Extent) uint64 {
	switch {
	case e.Kind == qcow.ExtentData, e.Kind == qcow.ExtentCompressed:
		return 0
	case e.Host != 0:
		return StateZero
	default:
		return StateHole | StateZero
	}
}

// allocationDepth is what qemu:allocation-depth says of an extent.
func allocationDepth(e qcow.Extent) uint64 {
	if e.Kind == qcow.ExtentUnallocated {
		return 0
	}
	return uint64(e.Depth) + 1
}

// dirty describes n bytes at off by a bitmap, which lists only what is dirty.
func (b *imageBackend) dirty(bitmap string, off, n int64) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		at, end := off, off+n
		for e, err := range b.img.DirtyExtents(bitmap, off, n) {
			switch {
			case err != nil:
				yield(Extent{}, b.failed("description", off, int(n), err))
				return
			case e.Offset > at && !yield(Extent{e.Offset - at, 0}, nil), !yield(Extent{e.Length, StateDirty}, nil):
				return
			}
			at = e.Offset + e.Length
		}
		if at < end {
			yield(Extent{end - at, 0}, nil)
		}
	}
}

// failed gives an error of the image the number that clients are to see, and tells of it.
func (b *imageBackend) failed(operation string, off int64, n int, err error) error {
	if err == nil {
		return nil
	}
	if b.options.Failed != nil {
		b.options.Failed(operation, off, int64(n), err)
	}
	for class, number := range map[error]syscall.Errno{
		qcow.ErrNoSpace: syscall.ENOSPC, qcow.ErrInvalid: syscall.EINVAL, qcow.ErrReadOnly: syscall.EROFS,
	} {
		if errors.Is(err, class) {
			return fmt.Errorf("%w: %w", number, err)
		}
	}
	return err
}
