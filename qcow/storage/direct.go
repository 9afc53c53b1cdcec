package storage

import (
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// direct is a second way to a file, past the page cache. Requests take it or the first one by their alignment alone, so the two mix
// freely, on neighbouring bytes and on the same ones. That is safe because the kernel makes them agree: a direct request first
// writes back what the page cache holds dirty of its range, and a direct write drops the cached pages of its range before
// and after. A buffered write to another part of a page that is being written directly would bring the old page back with it;
// file systems keep the two apart, by the lock of the inode or of the range. What none of this covers is memory mapped files,
// and nothing maps an image. It costs time where requests of both kinds meet, but in an image those are tables and data, which
// lie in different clusters.
//
// The locks of the image belong to the first descriptor. Locks of an open file description are not touched when another one of the
// same file is closed.
type direct struct {
	f      *os.File
	memory int // alignment of buffers
	offset int // alignment of offsets and lengths
}

// takes reports whether a request can be made directly.
func (d *direct) takes(p []byte, off int64) bool {
	return d != nil && len(p) > 0 && off%int64(d.offset) == 0 && len(p)%d.offset == 0 && address(p)%uintptr(d.memory) == 0
}

func address(p []byte) uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(p))) }

// AlignedBuffer returns n zero bytes at an address that is a multiple of align, a power of two.
func AlignedBuffer(n, align int) []byte {
	b := make([]byte, n+align-1)
	skip := -int(address(b)) & (align - 1)
	return b[skip : skip+n : skip+n]
}

// DirectAlignment returns what offset, length and address of a request must be multiples of to be made directly, in
// bytes; 0 when none is, because the file was not opened so.
func (o *OSFile) DirectAlignment() int {
	if o.direct == nil {
		return 0
	}
	return max(o.direct.memory, o.direct.offset)
}

// openDirect opens the file at path, which must still be o, a second time.
func (o *OSFile) openDirect(path string, flags int) (err error) {
	f, id, err := openRegular(path, flags|unix.O_DIRECT, false)
	if errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("direct I/O on %s: %w: %w", path, ErrUnsupported, err)
	}
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close())
		}
	}()
	if id != o.id {
		return fmt.Errorf("open %s: replaced by another file meanwhile", path)
	}
	d := &direct{f: f}
	if d.memory, d.offset, err = alignmentByStat(f); errors.Is(err, errNotSaid) {
		d.memory, d.offset, err = alignmentByTrial(f)
	}
	if err != nil {
		return fmt.Errorf("direct I/O on %s: %w", path, err)
	}
	o.direct = d
	return nil
}

// errNotSaid: the file system does not tell the alignment of direct requests.
var errNotSaid = errors.New("unknown alignment")

// alignmentByStat asks the file system.
func alignmentByStat(f *os.File) (memory, offset int, err error) {
	var st unix.Statx_t
	err = control(f, func(fd int) error { return unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_DIOALIGN, &st) })
	switch {
	case lacking(err), err == nil && st.Mask&unix.STATX_DIOALIGN == 0:
		return 0, 0, errNotSaid
	case err != nil:
		return 0, 0, err
	case st.Dio_mem_align == 0 || st.Dio_offset_align == 0:
		return 0, 0, ErrUnsupported
	}
	return int(st.Dio_mem_align), int(st.Dio_offset_align), nil
}

// The alignments that disks have in practice.
const (
	smallAlignment = 512
	largeAlignment = 4096
)

// alignmentByTrial reads a little. A file too short for that gets the large alignment, which suits nearly all; where it
// does not, requests are refused with EINVAL and made through the page cache.
func alignmentByTrial(f *os.File) (memory, offset int, err error) {
	info, err := f.Stat()
	if err != nil {
		return 0, 0, err
	}
	for _, a := range []int{smallAlignment, largeAlignment} {
		if info.Size() < int64(2*a) {
			return largeAlignment, largeAlignment, nil
		}
		p := AlignedBuffer(2*a, 2*a)[a:] // aligned to a, and to no more
		if _, err = f.ReadAt(p, int64(a)); err == nil {
			return a, a, nil
		}
		if !errors.Is(err, unix.EINVAL) {
			return 0, 0, err
		}
	}
	return 0, 0, fmt.Errorf("%w: %w", ErrUnsupported, err)
}
