package luks

import (
	"errors"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// The error classes of this package; test with errors.Is.
var (
	ErrCorrupt     = format.ErrCorrupt     // the header contradicts the specification or itself
	ErrUnsupported = format.ErrUnsupported // the header is valid, but asks for a cipher, mode or hash that this package does not have
	ErrInvalid     = format.ErrInvalid     // no header can do what was asked

	// ErrPassphrase: no active key slot opens with the passphrase.
	ErrPassphrase = errors.New("wrong passphrase: it opens none of the key slots")
)

const table = "LUKS header" // in errors

func corruptf(off uint64, msg string, args ...any) error {
	return format.Corruptf(table, format.HostOffset(off), msg, args...)
}

func unsupportedf(off uint64, msg string, args ...any) error {
	return format.Unsupportedf(table, format.HostOffset(off), msg, args...)
}
