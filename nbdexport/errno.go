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

// failure is errnoOf for what has certainly failed.
func failure(err error) errno {
	if err == nil {
		return errnoIO // the backend has done less than it promises
	}
	return errnoOf(err)
}

// text returns what the user of a client is told, at most 64 bytes. It says nothing of the server's files.
func (e errno) text() string {
	switch e {
	case errnoPerm:
		return "the export is read-only"
	case errnoInval:
		return "invalid request"
	case errnoNoSpc:
		return "past the end of the export, or no space left for it"
	case errnoOverflow:
		return "the request is too long"
	case errnoNotSup:
		return "writing zeroes would not take longer"
	default:
		return "I/O error"
	}
}
