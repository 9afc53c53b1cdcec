// Package drivertest has a node without a kernel, for tests of the driver that need neither root nor devices: the fakes
// of attach and mount, put together so that what one does shows in the other.
package drivertest

import (
	"context"
	"fmt"
	"slices"
	"sync"

	"github.com/qcow-csi/qcow-csi/driver/attach"
	"github.com/qcow-csi/qcow-csi/driver/attach/attachfake"
	"github.com/qcow-csi/qcow-csi/driver/mount/mountfake"
)

// Node is what outlives a process of the driver: the kernel with its devices and mounts, and what is on the volumes. A
// volume always gets the same device node, by which the fake Mounter knows what is on it.
type Node struct {
	Mounter *mountfake.Mounter

	kernel   attachfake.Kernel
	mu       sync.Mutex
	paths    map[string]string // of device nodes, by volume
	readOnly map[string]bool   // by volume: as it was attached last
}

// NewNode returns a node on which nothing is attached or mounted.
func NewNode() *Node {
	return &Node{Mounter: mountfake.New(), paths: map[string]string{}, readOnly: map[string]bool{}}
}

// Attacher returns the attacher of one process of the driver called owner. Closing it is the end of that process.
func (n *Node) Attacher(owner string) *Attacher {
	return &Attacher{Attacher: n.kernel.Attacher(owner), node: n}
}

// Forget lets the device of a volume vanish, whatever is mounted from it.
func (n *Node) Forget(ctx context.Context, owner, volumeID string) error {
	if err := n.kernel.Attacher(owner).Detach(ctx, volumeID); err != nil {
		return err
	}
	n.Mounter.SetUnreadable(n.path(volumeID), true)
	return nil
}

// ReadOnly reports whether the device of a volume refuses writes.
func (n *Node) ReadOnly(volumeID string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.readOnly[volumeID]
}

func (n *Node) path(volumeID string) string {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.paths[volumeID] == "" {
		n.paths[volumeID] = fmt.Sprintf("/dev/fake%d", len(n.paths))
	}
	return n.paths[volumeID]
}

// Attacher is attachfake's, with devices that the fake Mounter of the node knows.
type Attacher struct {
	*attachfake.Attacher
	node *Node
}

var _ attach.Attacher = (*Attacher)(nil)

// Attach implements [attach.Attacher].
func (a *Attacher) Attach(ctx context.Context, r attach.Request) (attach.Device, error) {
	d, err := a.Attacher.Attach(ctx, r)
	if err != nil {
		return d, err
	}
	d.Path = a.node.path(r.VolumeID)
	a.node.Mounter.AddDevice(d.Path, d.Size)
	a.node.Mounter.SetUnreadable(d.Path, false)
	a.node.mu.Lock()
	defer a.node.mu.Unlock()
	a.node.readOnly[r.VolumeID] = r.ReadOnly
	return d, nil
}

// Detach implements [attach.Attacher]. What is mounted is in use.
func (a *Attacher) Detach(ctx context.Context, volumeID string) error {
	devices, err := a.List(ctx)
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(devices, func(d attach.Device) bool { return d.VolumeID == volumeID }) {
		return a.Attacher.Detach(ctx, volumeID)
	}
	path := a.node.path(volumeID)
	for _, target := range a.node.Mounter.Targets() {
		mounts, err := a.node.Mounter.Mounts(ctx, target)
		if err != nil {
			return err
		}
		for _, m := range mounts {
			if m.Device == path {
				return fmt.Errorf("%w: %s is mounted on %s", attach.ErrBusy, path, target)
			}
		}
	}
	if err := a.Attacher.Detach(ctx, volumeID); err != nil {
		return err
	}
	a.node.Mounter.SetUnreadable(path, true)
	return nil
}

// Resize implements [attach.Attacher].
func (a *Attacher) Resize(ctx context.Context, volumeID string, size int64) error {
	if err := a.Attacher.Resize(ctx, volumeID, size); err != nil {
		return err
	}
	a.node.Mounter.AddDevice(a.node.path(volumeID), size)
	return nil
}

// List implements [attach.Attacher].
func (a *Attacher) List(ctx context.Context) ([]attach.Device, error) {
	devices, err := a.Attacher.List(ctx)
	for i := range devices {
		devices[i].Path = a.node.path(devices[i].VolumeID)
	}
	return devices, err
}
