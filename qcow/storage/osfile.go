package storage

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// OSFile is a regular file, locked against other users of the image (see [Open]).
type OSFile struct {
	f      *os.File // holds the locks
	fd     int      // of f
	direct *direct  // nil: every request goes through the page cache
	id     identity
}

var _ File = (*OSFile)(nil)

// Is reports whether both are the same file, under whatever names they were opened.
func (o *OSFile) Is(other *OSFile) bool { return o.id == other.id }

// ReadAt implements [File].
func (o *OSFile) ReadAt(p []byte, off int64) (int, error) {
	n := 0
	if o.direct.takes(p, off) {
		var err error
		// Where a direct request stops short, at the unaligned end of a file for example, the rest of it is not aligned.
		if n, err = o.direct.f.ReadAt(p, off); !errors.Is(err, unix.EINVAL) {
			return n, err
		}
	}
	m, err := o.f.ReadAt(p[n:], off+int64(n))
	return n + m, err
}

// WriteAt implements [File].
func (o *OSFile) WriteAt(p []byte, off int64) (int, error) {
	n := 0
	if o.direct.takes(p, off) {
		var err error
		if n, err = o.direct.f.WriteAt(p, off); !errors.Is(err, unix.EINVAL) {
			return n, classify(err)
		}
	}
	m, err := o.f.WriteAt(p[n:], off+int64(n))
	return n + m, classify(err)
}

// WriteSync implements [File].
func (o *OSFile) WriteSync(p []byte, off int64) (int, error) {
	f := o.f
	if o.direct.takes(p, off) {
		f = o.direct.f
	}
	for done := 0; ; {
		if done == len(p) {
			return done, nil
		}
		n := 0
		err := control(f, func(fd int) (err error) {
			n, err = unix.Pwritev2(fd, [][]byte{p[done:]}, off+int64(done), unix.RWF_DSYNC)
			return err
		})
		done += max(n, 0)
		switch {
		case err == nil && n > 0:
		case lacking(err):
			n, err := o.writeThenSync(p[done:], off+int64(done))
			return done + n, err
		case errors.Is(err, unix.EINVAL) && f != o.f:
			f = o.f
		case err == nil:
			return done, fmt.Errorf("write %s: %w", o.f.Name(), io.ErrShortWrite)
		default:
			return done, fmt.Errorf("write %s: %w", o.f.Name(), classify(err))
		}
	}
}

// writeThenSync is WriteSync where the file system has no synchronous writes.
func (o *OSFile) writeThenSync(p []byte, off int64) (int, error) {
	n, err := o.WriteAt(p, off)
	if err == nil {
		err = o.Sync()
	}
	return n, err
}

// Size implements [File].
func (o *OSFile) Size() (int64, error) {
	info, err := o.f.Stat()
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}

// AllocatedBytes returns the space that the file takes on its file system.
func (o *OSFile) AllocatedBytes() (int64, error) {
	var st unix.Stat_t
	if err := control(o.f, func(fd int) error { return unix.Fstat(fd, &st) }); err != nil {
		return 0, fmt.Errorf("stat %s: %w", o.f.Name(), err)
	}
	return st.Blocks * 512, nil // st_blocks counts 512-byte units whatever the file system's block size
}

// Truncate implements [File].
func (o *OSFile) Truncate(size int64) error { return classify(o.f.Truncate(size)) }

// Allocate implements [File].
func (o *OSFile) Allocate(off, n int64) error {
	if n == 0 {
		return nil
	}
	err := control(o.f, func(fd int) error { return unix.Fallocate(fd, 0, off, n) })
	switch {
	case err == nil:
		return nil
	case lacking(err):
		return fmt.Errorf("allocate space for %s: %w: %w", o.f.Name(), ErrUnsupported, err)
	}
	return fmt.Errorf("allocate space for %s: %w", o.f.Name(), classify(err))
}

// PunchHole implements [File]. Where the file system has no holes it writes zeroes.
func (o *OSFile) PunchHole(off, n int64) error {
	size, err := o.Size()
	if err != nil {
		return err
	}
	if off >= size || n == 0 {
		return nil
	}
	err = control(o.f, func(fd int) error {
		return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	})
	switch {
	case err == nil:
		return nil
	case lacking(err):
		return writeZeroes(o, off, min(n, size-off))
	}
	return fmt.Errorf("punch hole in %s: %w", o.f.Name(), classify(err))
}

// NextData implements [File].
func (o *OSFile) NextData(off int64) (start, end int64, err error) {
	if off < 0 {
		return 0, 0, fmt.Errorf("find data in %s: %w", o.f.Name(), unix.EINVAL)
	}
	for start = off; ; {
		start, err = o.seek(start, unix.SEEK_DATA)
		if err == nil {
			end, err = o.seek(start, unix.SEEK_HOLE)
		}
		switch {
		case errors.Is(err, unix.ENXIO): // nothing but a hole behind start, or the end
			return 0, 0, io.EOF
		case errors.Is(err, unix.EINVAL), lacking(err):
			return o.restOf(off)
		case err != nil:
			return 0, 0, fmt.Errorf("find data in %s: %w", o.f.Name(), err)
		case start < end:
			return start, end, nil
		}
		// The data at start was punched out between the two calls; there may be more behind it.
	}
}

// seek asks for the next data or hole. It moves the file position, which nothing here uses.
func (o *OSFile) seek(off int64, whence int) (at int64, err error) {
	err = control(o.f, func(fd int) (err error) { at, err = unix.Seek(fd, off, whence); return err })
	return at, err
}

func (o *OSFile) restOf(off int64) (start, end int64, err error) {
	size, err := o.Size()
	if err != nil {
		return 0, 0, err
	}
	if off >= size {
		return 0, 0, io.EOF
	}
	return off, size, nil
}

// Sync implements [File]. It is an fdatasync, which writes the length of the file and where its blocks are too, but spares
// the times. It covers what was written directly: that the data passed the page cache by does not mean that it passed
// the disk's own cache.
func (o *OSFile) Sync() error {
	if err := control(o.f, unix.Fdatasync); err != nil {
		return fmt.Errorf("fdatasync %s: %w", o.f.Name(), classify(err))
	}
	return nil
}

// Close closes the file, which releases its locks.
func (o *OSFile) Close() error {
	if o.direct == nil {
		return o.f.Close()
	}
	return errors.Join(o.direct.f.Close(), o.f.Close())
}

// control calls fn with the descriptor of f, again after an interrupted call.
func control(f *os.File, fn func(fd int) error) error {
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var callErr error
	if err := conn.Control(func(fd uintptr) {
		for {
			if callErr = fn(int(fd)); !errors.Is(callErr, unix.EINTR) {
				return
			}
		}
	}); err != nil {
		return err
	}
	return callErr
}

func writeZeroes(w io.WriterAt, off, n int64) error {
	zeroes := make([]byte, min(n, 1<<20))
	for n > 0 {
		k := min(n, int64(len(zeroes)))
		if _, err := w.WriteAt(zeroes[:k], off); err != nil {
			return err
		}
		off, n = off+k, n-k
	}
	return nil
}
