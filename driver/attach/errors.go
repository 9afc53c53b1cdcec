package attach

import "errors"

var (
	// ErrBusy: the volume is attached already, its device is in use, or another operation on it is under way.
	ErrBusy = errors.New("device is busy")
	// ErrNotAttached: this process serves no device of the volume.
	ErrNotAttached = errors.New("volume is not attached")
	// ErrUnavailable: the kernel lacks what the attacher needs.
	ErrUnavailable = errors.New("attacher is unavailable")
	// ErrInvalid: the request is one that no attacher can carry out.
	ErrInvalid = errors.New("invalid request")
	// ErrClosed: the attacher has been closed.
	ErrClosed = errors.New("attacher is closed")
)
