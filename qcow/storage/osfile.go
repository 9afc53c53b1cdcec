package storage

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// Mode says how a file is opened and locked.
type Mode uint8

const (
	ReadOnly  Mode = iota // other readers may have it open too, writers may not
	ReadWrite             // nobody else may have it open
)

// OSFile is a regular file, locked against other users of the image (see [Open]).
type OSFile struct {
	f *os.File
}

var _ File = (*OSFile)(nil)

// Open opens an existing regular file and takes the locks that QEMU takes for such a use. It fails with ErrBusy when
// another process, or another Open in this one, has the file open in a way that excludes mode. It never follows a symbolic
// link in the last element of path, and never blocks on anything that is not a regular file.
func Open(path string, mode Mode) (*OSFile, error) {
	flags := os.O_RDONLY
	if mode == ReadWrite {
		flags = os.O_RDWR
	}
	return open(path, flags, mode)
}

// Create makes a new file, open for reading and writing, and locks it. It fails when path exists.
func Create(path string) (*OSFile, error) {
	return open(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, ReadWrite)
}

func open(path string, flags int, mode Mode) (_ *OSFile, err error) {
	f, err := os.OpenFile(path, flags|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
	if err != nil {
		return nil, classify(err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close())
		}
	}()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("open %s: not a regular file", path)
	}
	if err := lock(f, mode); err != nil {
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return &OSFile{f: f}, nil
}

// ReadAt implements [File].
func (o *OSFile) ReadAt(p []byte, off int64) (int, error) { return o.f.ReadAt(p, off) }

// WriteAt implements [File].
func (o *OSFile) WriteAt(p []byte, off int64) (int, error) {
	n, err := o.f.WriteAt(p, off)
	return n, classify(err)
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
	if err := o.control(func(fd int) error { return unix.Fstat(fd, &st) }); err != nil {
		return 0, fmt.Errorf("stat %s: %w", o.f.Name(), err)
	}
	return st.Blocks * 512, nil // st_blocks counts 512-byte units whatever the file system's block size
}

// Truncate implements [File].
func (o *OSFile) Truncate(size int64) error { return classify(o.f.Truncate(size)) }

// PunchHole implements [File]. Where the file system has no holes it writes zeroes.
func (o *OSFile) PunchHole(off, n int64) error {
	size, err := o.Size()
	if err != nil {
		return err
	}
	if off >= size || n == 0 {
		return nil
	}
	err = o.control(func(fd int) error {
		return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	})
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EOPNOTSUPP):
		return writeZeroes(o, off, min(n, size-off))
	}
	return fmt.Errorf("punch hole in %s: %w", o.f.Name(), classify(err))
}

// Sync implements [File].
func (o *OSFile) Sync() error {
	if err := o.control(unix.Fdatasync); err != nil {
		return fmt.Errorf("fdatasync %s: %w", o.f.Name(), classify(err))
	}
	return nil
}

// Close closes the file, which releases its locks.
func (o *OSFile) Close() error { return o.f.Close() }

// control calls fn with the descriptor, again after an interrupted call.
func (o *OSFile) control(fn func(fd int) error) error {
	conn, err := o.f.SyscallConn()
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
