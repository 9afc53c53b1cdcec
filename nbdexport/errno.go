package nbdexport

import (
	"errors"
	"syscall"
)

// errnoOf returns what a client is told of err, as Backend documents it.
func errnoOf(err error) errno {
	is := func(numbers ...syscall.Errno) bool {
		for _, n := range numbers {
			if errors.Is(err, n) {
				return true
			}
		}
		return false
	}
	switch {
	case err == nil:
		return errnoNone
	case is(syscall.ENOSPC, syscall.EDQUOT, syscall.EFBIG):
		return errnoNoSpc
	case is(syscall.EINVAL):
		return errnoInval
	case is(syscall.EPERM, syscall.EROFS):
		return errnoPerm
	default:
		return errnoIO
	}
}
