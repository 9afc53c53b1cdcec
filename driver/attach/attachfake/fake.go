// Package attachfake is an attacher without a kernel, for tests of what uses attachers. It passes the same suite, and
// keeps books: which volume is attached by whom, with which backend and size. Its device nodes do not exist.
//
// A [Kernel] is what outlives a process. Tests make one, and one attacher for every process that they play. What
// a pod would do to a device, a test does to its backend.
package attachfake

import (
	"context"
	"fmt"
	"sync"

	"github.com/qcow-csi/qcow-csi/driver/attach"
	"github.com/qcow-csi/qcow-csi/nbdexport"
)

// Kernel keeps the devices. The zero value has none. Methods may be called concurrently.
type Kernel struct {
	mu      sync.Mutex
	devices map[key]*device
	next    int
}

type key struct{ owner, volumeID string }

type device struct {
	path     string
	geometry attach.Geometry
	backend  nbdexport.Backend
	server   *Attacher // nil when nobody serves it
	inUse    bool
}

// Attacher returns the attacher of a process that works for owner.
func (k *Kernel) Attacher(owner string) *Attacher { return &Attacher{kernel: k, owner: owner} }

// SetInUse says whether something holds the device of the volume, such as a mount. It reports whether there is one.
func (k *Kernel) SetInUse(owner, volumeID string, inUse bool) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	d, ok := k.devices[key{owner, volumeID}]
	if ok {
		d.inUse = inUse
	}
	return ok
}

// Backend returns what is behind a device node, and false where there is no device.
func (k *Kernel) Backend(path string) (nbdexport.Backend, bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, d := range k.devices {
		if d.path == path {
			return d.backend, true
		}
	}
	return nil, false
}

// Attacher is one process's fake. Fail is to be set before the attacher is used.
type Attacher struct {
	// Fail, if set, is asked before every operation ("probe", "attach", "detach", "resize", "list"), and may make it
	// fail.
	Fail func(operation, volumeID string) error

	kernel *Kernel
	owner  string
	closed bool // guarded by kernel.mu
}

var _ attach.Attacher = (*Attacher)(nil)

// Name returns "fake".
func (a *Attacher) Name() string { return "fake" }

// Probe implements [attach.Attacher].
func (a *Attacher) Probe(context.Context) error { return a.fail("probe", "") }

func (a *Attacher) fail(operation, volumeID string) error {
	if a.Fail == nil {
		return nil
	}
	return a.Fail(operation, volumeID)
}

// begin begins an operation, and takes the lock.
func (a *Attacher) begin(ctx context.Context, operation, volumeID string) (end func(), err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := a.fail(operation, volumeID); err != nil {
		return nil, err
	}
	a.kernel.mu.Lock()
	if a.closed {
		a.kernel.mu.Unlock()
		return nil, attach.ErrClosed
	}
	return a.kernel.mu.Unlock, nil
}

// Attach implements [attach.Attacher].
func (a *Attacher) Attach(ctx context.Context, r attach.Request) (attach.Device, error) {
	geometry, err := r.Geometry()
	if err != nil {
		return attach.Device{}, err
	}
	end, err := a.begin(ctx, "attach", r.VolumeID)
	if err != nil {
		return attach.Device{}, err
	}
	defer end()
	k := key{a.owner, r.VolumeID}
	if d, ok := a.kernel.devices[k]; ok {
		return attach.Device{}, fmt.Errorf("%w: volume %q is attached to %s", attach.ErrBusy, r.VolumeID, d.path)
	}
	if a.kernel.devices == nil {
		a.kernel.devices = make(map[key]*device)
	}
	d := &device{path: fmt.Sprintf("/dev/fake%d", a.kernel.next), geometry: geometry, backend: r.Backend, server: a}
	a.kernel.next++
	a.kernel.devices[k] = d
	return a.describe(r.VolumeID, d), nil
}

// Detach implements [attach.Attacher].
func (a *Attacher) Detach(ctx context.Context, volumeID string) error {
	end, err := a.begin(ctx, "detach", volumeID)
	if err != nil {
		return err
	}
	defer end()
	k := key{a.owner, volumeID}
	d, ok := a.kernel.devices[k]
	if !ok {
		return nil
	}
	if d.inUse {
		return fmt.Errorf("%w: %s is in use", attach.ErrBusy, d.path)
	}
	if d.server != nil {
		if err := d.backend.Flush(); err != nil {
			return fmt.Errorf("detach volume %q: %w", volumeID, err)
		}
	}
	delete(a.kernel.devices, k)
	return nil
}

// Resize implements [attach.Attacher].
func (a *Attacher) Resize(ctx context.Context, volumeID string, size int64) error {
	end, err := a.begin(ctx, "resize", volumeID)
	if err != nil {
		return err
	}
	defer end()
	d, ok := a.kernel.devices[key{a.owner, volumeID}]
	if !ok || d.server != a {
		return fmt.Errorf("%w: volume %q", attach.ErrNotAttached, volumeID)
	}
	if err := d.geometry.CheckGrowth(size); err != nil {
		return err
	}
	d.geometry.Size = size
	return nil
}

// List implements [attach.Attacher].
func (a *Attacher) List(ctx context.Context) ([]attach.Device, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := a.fail("list", ""); err != nil {
		return nil, err
	}
	a.kernel.mu.Lock()
	defer a.kernel.mu.Unlock()
	var devices []attach.Device
	for k, d := range a.kernel.devices {
		if k.owner == a.owner {
			devices = append(devices, a.describe(k.volumeID, d))
		}
	}
	return devices, nil
}

// Close implements [attach.Attacher].
func (a *Attacher) Close() error {
	a.kernel.mu.Lock()
	defer a.kernel.mu.Unlock()
	a.closed = true
	for _, d := range a.kernel.devices {
		if d.server == a {
			d.server = nil
		}
	}
	return nil
}

func (a *Attacher) describe(volumeID string, d *device) attach.Device {
	return attach.Device{VolumeID: volumeID, Path: d.path, Size: d.geometry.Size, Served: d.server == a}
}
