package mount

import "errors"

var (
	// ErrInvalid: an unknown filesystem type, a mount option that is not allowed, an impossible path, a device too
	// small.
	ErrInvalid = errors.New("invalid")
	// ErrBusy: the target carries another mount, or the mount or the device is in use.
	ErrBusy = errors.New("busy")
	// ErrNotMounted: what should be mounted on the target is not.
	ErrNotMounted = errors.New("not mounted")
	// ErrReadOnly: something would have to be written, and the request or the mount is read-only.
	ErrReadOnly = errors.New("read-only")

	// ErrUnreadable: the device, or a part of it, cannot be read, or what it shows is ambivalent. It may pass.
	ErrUnreadable = errors.New("device cannot be read")
	// ErrNotBlank: no filesystem is there, but the volume was written to, so none is made.
	ErrNotBlank = errors.New("volume has no filesystem but is not blank")
	// ErrWrongFilesystem: the volume holds another filesystem than the one that is asked for.
	ErrWrongFilesystem = errors.New("volume holds another filesystem")
	// ErrInconsistent: the device does not show what the records say of its volume. Nothing is written until somebody
	// has looked.
	ErrInconsistent = errors.New("device and records contradict each other")
)
