package storage

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// QEMU locks single bytes of an image with shared locks of the open file description (block/file-posix.c). A lock
// on byte usesBase+p says "I use permission p", one on unsharedBase+p "nobody else may". Whoever has taken its locks then
// asks whether another holds what conflicts with them; the locks themselves never conflict.
const (
	usesBase     = 100
	unsharedBase = 200

	permRead      = 0 // consistent read
	permWrite     = 1
	permUnchanged = 2 // write without changing what is read
	permResize    = 3
)

// role is what a user of a file locks, and what nobody else may have locked then.
type role struct{ holds, free []int64 }

// A writer needs everything and shares nothing but permUnchanged, a reader reads and lets others only read; who shares reads
// and lets others do anything, like QEMU's --force-share.
var roles = map[Mode]role{
	ReadWrite: {
		holds: []int64{usesBase + permRead, usesBase + permWrite, usesBase + permResize, unsharedBase + permWrite, unsharedBase + permResize},
		free:  []int64{unsharedBase + permRead, unsharedBase + permWrite, unsharedBase + permResize, usesBase + permWrite, usesBase + permResize},
	},
	ReadOnly: {
		holds: []int64{usesBase + permRead, unsharedBase + permWrite, unsharedBase + permResize},
		free:  []int64{unsharedBase + permRead, usesBase + permWrite, usesBase + permResize},
	},
	Shared: {
		holds: []int64{usesBase + permRead},
		free:  []int64{unsharedBase + permRead},
	},
}

// lock takes the locks of the role and fails with ErrBusy if another open file description holds a conflicting one. They
// end with the last descriptor of f.
func lock(f *os.File, mode Mode) error {
	r := roles[mode]
	for _, b := range r.holds {
		if err := fcntl(f, unix.F_OFD_SETLK, unix.F_RDLCK, b, nil); err != nil {
			if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
				return fmt.Errorf("%w: byte %d is locked exclusively", ErrBusy, b)
			}
			return fmt.Errorf("image lock on byte %d: %w", b, err)
		}
	}
	for _, b := range r.free {
		var found unix.Flock_t
		if err := fcntl(f, unix.F_OFD_GETLK, unix.F_WRLCK, b, &found); err != nil {
			return fmt.Errorf("image lock test of byte %d: %w", b, err)
		}
		if found.Type != unix.F_UNLCK {
			return fmt.Errorf("%w: %s", ErrBusy, conflict(b))
		}
	}
	return nil
}

func conflict(b int64) string {
	names := map[int64]string{permRead: "read", permWrite: "write", permUnchanged: "write unchanged", permResize: "resize"}
	if b >= unsharedBase {
		return fmt.Sprintf("another process does not share %q", names[b-unsharedBase])
	}
	return fmt.Sprintf("another process may %q", names[b-usesBase])
}

// fcntl works on one byte at off. With a non-nil result it stores there what the kernel answered.
func fcntl(f *os.File, cmd int, kind int16, off int64, result *unix.Flock_t) error {
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	l := unix.Flock_t{Type: kind, Start: off, Len: 1}
	var callErr error
	if err := conn.Control(func(fd uintptr) { callErr = unix.FcntlFlock(fd, cmd, &l) }); err != nil {
		return err
	}
	if result != nil {
		*result = l
	}
	return callErr
}
