package storage

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Mode says how a file is opened and locked.
type Mode uint8

const (
	ReadOnly  Mode = iota // other readers may have it open too, writers may not
	ReadWrite             // nobody else may have it open, except Shared
	Shared                // for reading; others may do anything, writers too, so that what is read may change at any time
)

// Options say how [OpenWith] opens a file.
type Options struct {
	Mode   Mode
	Create bool // make a new file, which is open ReadWrite whatever Mode says; it is an error if path exists

	// Direct moves data between the disk and the caller's memory without a copy in the kernel's page cache (O_DIRECT), where
	// a request allows it: its offset, its length and the address of its buffer must be multiples of [OSFile.DirectAlignment]
	// (see [AlignedBuffer]). All other requests work as without it. On a file system that cannot do it the error is
	// ErrUnsupported.
	Direct bool
}

// Open opens an existing regular file and takes the locks that QEMU takes for such a use. It fails with ErrBusy when
// another process, or another Open in this one, has the file open in a way that excludes mode. It never follows a symbolic
// link in the last element of path, and never blocks on anything that is not a regular file.
func Open(path string, mode Mode) (*OSFile, error) {
	return OpenWith(path, Options{Mode: mode})
}

// Create makes a new file, open for reading and writing, and locks it. It fails when path exists.
func Create(path string) (*OSFile, error) {
	return OpenWith(path, Options{Create: true})
}

// OpenWith opens a file as o says, else like [Open] and [Create]. What it created does not outlive a failure.
func OpenWith(path string, o Options) (_ *OSFile, err error) {
	flags := os.O_RDONLY
	if o.Create {
		o.Mode = ReadWrite
	}
	if o.Mode == ReadWrite {
		flags = os.O_RDWR
	}
	f, id, err := openRegular(path, flags, o.Create)
	if err != nil {
		return nil, err
	}
	file := &OSFile{f: f, fd: int(f.Fd()), id: id}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close())
			if o.Create {
				err = errors.Join(err, os.Remove(path))
			}
		}
	}()
	if err := lock(f, o.Mode); err != nil {
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	if o.Direct {
		if err := file.openDirect(path, flags); err != nil {
			return nil, err
		}
	}
	return file, nil
}

// openRegular opens path, which must be a regular file.
func openRegular(path string, flags int, create bool) (_ *os.File, id identity, err error) {
	if create {
		flags |= os.O_CREATE | os.O_EXCL
	}
	f, err := os.OpenFile(path, flags|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
	if err != nil {
		return nil, id, classify(err)
	}
	var st unix.Stat_t
	if err := control(f, func(fd int) error { return unix.Fstat(fd, &st) }); err != nil {
		return nil, id, errors.Join(fmt.Errorf("stat %s: %w", path, err), f.Close())
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, id, errors.Join(fmt.Errorf("open %s: not a regular file", path), f.Close())
	}
	return f, identity{dev: uint64(st.Dev), ino: st.Ino}, nil //nolint:unconvert // the width of Dev depends on the architecture
}

// identity tells files apart, whatever their names.
type identity struct{ dev, ino uint64 }
