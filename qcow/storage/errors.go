package storage

import (
	"errors"
	"fmt"
	"syscall"
)

var (
	// ErrNoSpace: the file system is full, the quota is used up, or the file is as large as the file system allows. Errors of this
	// class also match the syscall.Errno that says which.
	ErrNoSpace = errors.New("out of space")
	// ErrBusy: another process, QEMU included, holds the image in a way that excludes this use.
	ErrBusy = errors.New("image is in use")
	// ErrUnsupported: the file system has no such operation. Errors of this class also match the syscall.Errno that it gave.
	ErrUnsupported = errors.New("not supported by the file system")
)

// classify gives err the class ErrNoSpace where that is what it means.
func classify(err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) || errors.Is(err, syscall.EFBIG) {
		return fmt.Errorf("%w: %w", ErrNoSpace, err)
	}
	return err
}

// lacking reports whether err says that the file system, or the kernel, does not know the operation.
func lacking(err error) bool {
	return errors.Is(err, syscall.EOPNOTSUPP) || errors.Is(err, syscall.ENOSYS)
}
