package format

import (
	"errors"
	"fmt"
)

// The error classes of everything that decodes an image. Test with errors.Is.
var (
	// ErrCorrupt: the image contradicts the specification or itself.
	ErrCorrupt = errors.New("corrupt image")
	// ErrUnsupported: the image is valid, but uses a feature that is not implemented.
	ErrUnsupported = errors.New("unsupported image feature")
	// ErrInvalid: the caller asked for something no image can do.
	ErrInvalid = errors.New("invalid argument")
)

// Error is an error of a class, at a place in the image.
type Error struct {
	Class  error      // ErrCorrupt, ErrUnsupported or ErrInvalid
	Table  string     // the structure: "header", "L1 table", "refcount block", ...
	Offset HostOffset // where in the file the offending bytes are
	Reason string
}

func (e *Error) Error() string {
	return fmt.Sprintf("%v: %s at offset %#x: %s", e.Class, e.Table, uint64(e.Offset), e.Reason)
}

// Unwrap returns the class, for errors.Is.
func (e *Error) Unwrap() error { return e.Class }

// Corruptf makes an ErrCorrupt for the bytes of table at off.
func Corruptf(table string, off HostOffset, msg string, args ...any) error {
	return &Error{Class: ErrCorrupt, Table: table, Offset: off, Reason: fmt.Sprintf(msg, args...)}
}

// Unsupportedf makes an ErrUnsupported for the bytes of table at off.
func Unsupportedf(table string, off HostOffset, msg string, args ...any) error {
	return &Error{Class: ErrUnsupported, Table: table, Offset: off, Reason: fmt.Sprintf(msg, args...)}
}

// Invalidf makes an error of class ErrInvalid.
func Invalidf(msg string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrInvalid, fmt.Sprintf(msg, args...))
}
