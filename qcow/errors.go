package qcow

import (
	"errors"

	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// The error classes of this package; test with errors.Is.
var (
	ErrCorrupt     = format.ErrCorrupt     // the image contradicts the specification or itself
	ErrUnsupported = format.ErrUnsupported // the image uses a feature that is not implemented
	ErrInvalid     = format.ErrInvalid     // no image can do what was asked
	ErrBusy        = storage.ErrBusy       // somebody else has the image open
	ErrNoSpace     = storage.ErrNoSpace    // the file system is full; also matches syscall.ENOSPC where it said so

	ErrNotFound = errors.New("not found") // the image has no snapshot or bitmap of that name
	ErrReadOnly = errors.New("image is open read-only")
	ErrClosed   = errors.New("image is closed")
)
