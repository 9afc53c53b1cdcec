package attach

import (
	"context"

	"github.com/qcow-csi/qcow-csi/nbdexport"
)

// Attacher turns an export into a block device of this node's kernel. Implementations are safe for concurrent use.
//
// What is attached is read back from the kernel, not remembered: List and Detach see the devices that an earlier process
// with the same owner left behind.
type Attacher interface {
	// Name is "nbd" or "fuse".
	Name() string
	// Probe returns nil where this kernel has what the attacher needs, else an error that matches ErrUnavailable and says
	// what is missing and how to get it. It loads kernel modules where it may.
	Probe(ctx context.Context) error
	// Attach makes a device that serves r.Backend. It fails with ErrBusy when r.VolumeID is attached already, by an
	// earlier process too, and with ErrInvalid when r breaks the rules of Request. When it fails nothing is left
	// behind, and the backend is no longer used.
	Attach(ctx context.Context, r Request) (Device, error)
	// Detach removes the device of the volume, if there is one: absent is success. Everything that was written to the
	// device is in the backend, and the backend is no longer used, when it returns nil; of a device that no process
	// serves, what its server did not take is lost, as it was before. It fails with ErrBusy while the device is in
	// use elsewhere: mounted, or part of another device, or, where the attacher can see that, merely open.
	Detach(ctx context.Context, volumeID string) error
	// Resize tells the kernel that the volume's backend, which has grown already, is size bytes long. A volume that
	// is not attached by this process is ErrNotAttached; a size that is smaller than the device, or no multiple of
	// its blocks, is ErrInvalid.
	Resize(ctx context.Context, volumeID string, size int64) error
	// List returns the devices of this owner, those of earlier processes included, in no order.
	List(ctx context.Context) ([]Device, error)
	// Close ends what the attacher runs itself; every later Attach, Detach and Resize fails. Devices that are still
	// attached lose their server, and their backends are no longer used when Close returns. Requests that were
	// answered are in the backend.
	Close() error
}

// Request says what to attach.
type Request struct {
	VolumeID string // the CSI volume handle, unique on the node; 1 to 128 bytes without control characters
	Backend  nbdexport.Backend
	ReadOnly bool // the device refuses writes, whatever the backend says
}

// Device is a block device that serves a volume.
type Device struct {
	VolumeID string
	Path     string // of the device node, such as /dev/nbd0 or /dev/loop3
	Size     int64  // bytes, as the kernel sees it
	Served   bool   // this process serves it; false for one that an earlier process left behind
}
