package pool

import (
	"errors"
	"fmt"
	"syscall"

	"github.com/qcow-csi/qcow-csi/qcow"
)

// Error classes. ErrBusy, ErrNoSpace, ErrCorrupt, ErrUnsupported and ErrInvalid are the engine's.
var (
	// ErrNotFound: there is no such volume.
	ErrNotFound = errors.New("volume not found")
	// ErrExists: a volume of that name exists with other properties.
	ErrExists = errors.New("volume exists with other properties")
	// ErrOutOfRange: no size within the limits fits what was asked for.
	ErrOutOfRange = errors.New("size out of range")
	// ErrBusy: the volume, or the whole directory, is in use.
	ErrBusy = qcow.ErrBusy
	// ErrNoSpace: the filesystem is full, or what is free is promised to other volumes.
	ErrNoSpace = qcow.ErrNoSpace
	// ErrCorrupt: a record or an image is damaged.
	ErrCorrupt = qcow.ErrCorrupt
	// ErrUnsupported: a record or an image was written by a newer version, or uses a feature that is not implemented.
	ErrUnsupported = qcow.ErrUnsupported
	// ErrInvalid: the request makes no sense.
	ErrInvalid = qcow.ErrInvalid
	// ErrClosed: the pool is closed.
	ErrClosed = errors.New("pool is closed")
)

// classify gives err the class ErrNoSpace where that is what it means.
func classify(err error) error {
	if (errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)) && !errors.Is(err, ErrNoSpace) {
		return fmt.Errorf("%w: %w", ErrNoSpace, err)
	}
	return err
}
