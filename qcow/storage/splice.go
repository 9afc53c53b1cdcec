package storage

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Splice implements [File]. It moves pages of the page cache, which a file that is opened for direct I/O does without.
func (o *OSFile) Splice(pipe int, off int64, n int) (int, error) {
	if o.direct != nil {
		return 0, nil
	}
	for {
		moved, err := unix.Splice(o.fd, &off, pipe, nil, n, unix.SPLICE_F_NONBLOCK)
		switch {
		case err == nil:
			return int(moved), nil
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EINVAL), lacking(err):
			return 0, nil // the pipe is full, or the file system can't
		default:
			return 0, fmt.Errorf("read %s: %w", o.f.Name(), err)
		}
	}
}
