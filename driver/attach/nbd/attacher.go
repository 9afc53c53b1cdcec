package nbd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"k8s.io/klog/v2"

	"github.com/qcow-csi/qcow-csi/driver/attach"
	"github.com/qcow-csi/qcow-csi/driver/attach/internal/assistant"
	"github.com/qcow-csi/qcow-csi/driver/attach/internal/blockdev"
	"github.com/qcow-csi/qcow-csi/driver/attach/internal/kmod"
	"github.com/qcow-csi/qcow-csi/driver/attach/internal/served"
	"github.com/qcow-csi/qcow-csi/nbdexport"
)

// Options of an attacher.
type Options struct {
	// Owner is whose devices they are: the driver's name. Attachers with other owners see nothing of them.
	Owner string
	// RequestTimeout is how long the kernel waits for the answer to a request before it gives the connection up and
	// sends the request again on the next one; in whole seconds, rounded up; 0 means 30 s. It bounds the stall after
	// the connection was lost, and the slowness of storage that goes unpunished.
	RequestTimeout time.Duration
	// DeadConnTimeout is how long a device waits for a new connection before its I/O fails; in whole seconds, rounded
	// up; 0 means 60 s.
	DeadConnTimeout time.Duration
}

// Attacher attaches by the kernel's NBD client.
type Attacher struct {
	options   Options
	kernel    client
	sysfs     sysfs
	mountinfo string        // path of the mount table
	patience  time.Duration // with what the kernel does within milliseconds when all is well
	devices   served.Set[*device]
}

var _ attach.Attacher = (*Attacher)(nil)

// New returns an attacher.
func New(o Options) *Attacher {
	if o.RequestTimeout == 0 {
		o.RequestTimeout = 30 * time.Second
	}
	if o.DeadConnTimeout == 0 {
		o.DeadConnTimeout = 60 * time.Second
	}
	return &Attacher{
		options:   o,
		kernel:    newClient(),
		sysfs:     systemDisks,
		mountinfo: "/proc/self/mountinfo",
		patience:  10 * time.Second,
	}
}

// Name returns "nbd".
func (a *Attacher) Name() string { return "nbd" }

// Probe implements [attach.Attacher]. It loads the module nbd where it is missing.
func (a *Attacher) Probe(ctx context.Context) error {
	err := a.kernel.available()
	if err == nil {
		return nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: %w", attach.ErrUnavailable, err)
	}
	// Without partition scans: nothing reads a volume's partition table that was not asked to.
	err = kmod.Load(ctx, "nbd", "max_part=0")
	if a.kernel.available() == nil {
		return nil
	}
	if _, statErr := os.Stat("/sys/module/nbd"); statErr == nil {
		return fmt.Errorf("%w: the kernel's NBD client shows in the initial network namespace only: "+
			"the pod needs host networking", attach.ErrUnavailable)
	}
	return fmt.Errorf("%w: the kernel has no NBD client: load the module nbd on the node, or install a kernel that has it (%w)",
		attach.ErrUnavailable, err)
}

// Attach implements [attach.Attacher].
func (a *Attacher) Attach(ctx context.Context, r attach.Request) (attach.Device, error) {
	geometry, err := r.Geometry()
	if err != nil {
		return attach.Device{}, err
	}
	release, err := a.devices.Claim(r.VolumeID)
	if err != nil {
		return attach.Device{}, err
	}
	defer release()
	if err := ctx.Err(); err != nil {
		return attach.Device{}, err
	}
	if existing, found, err := a.sysfs.find(a.options.Owner, r.VolumeID); err != nil {
		return attach.Device{}, err
	} else if found {
		return attach.Device{}, fmt.Errorf("%w: volume %q is attached to %s", attach.ErrBusy, r.VolumeID, existing.path())
	}
	d, err := a.setUp(ctx, r, geometry)
	if err != nil {
		return attach.Device{}, fmt.Errorf("attach volume %q: %w", r.VolumeID, err)
	}
	a.devices.Put(r.VolumeID, d)
	klog.FromContext(ctx).Info("Attached", "volume", r.VolumeID, "device", d.path())
	return attach.Device{VolumeID: r.VolumeID, Path: d.path(), Size: geometry.Size, Served: true}, nil
}

// setUp makes a device and serves it.
func (a *Attacher) setUp(ctx context.Context, r attach.Request, g attach.Geometry) (*device, error) {
	ours, theirs, err := socketPair()
	if err != nil {
		return nil, err
	}
	info := r.Backend.Info()
	info.ReadOnly = g.ReadOnly
	tag := attach.Tag(a.options.Owner, r.VolumeID)
	index, err := a.kernel.connect(export{
		backend:         tag,
		size:            g.Size,
		blockSize:       g.BlockSize,
		flags:           nbdexport.TransmissionFlags(info),
		requestTimeout:  a.options.RequestTimeout,
		deadConnTimeout: a.options.DeadConnTimeout,
		socket:          int(theirs.Fd()),
	})
	_ = theirs.Close() // the kernel has its own reference, if it has accepted the socket
	if err != nil {
		return nil, errors.Join(err, ours.Close())
	}
	d := newDevice(ctx, a, index, tag, r.Backend, g)
	go d.serve(ours)
	if err := a.awaitDevice(ctx, d, g.Size); err != nil {
		err = errors.Join(err, a.kernel.disconnect(index))
		d.stop()
		return nil, err
	}
	return d, nil
}

// awaitDevice waits until the device can be opened and has its size.
func (a *Attacher) awaitDevice(ctx context.Context, d *device, size int64) error {
	ctx, cancel := context.WithTimeout(ctx, a.patience)
	defer cancel()
	number, err := a.sysfs.deviceNumber(d.name())
	if err != nil {
		return err
	}
	if err := blockdev.AwaitNode(ctx, d.path(), number); err != nil {
		return err
	}
	return a.awaitSize(ctx, d, size)
}

func (a *Attacher) awaitSize(ctx context.Context, d *device, size int64) error {
	return blockdev.Await(ctx, "the kernel to take the size", func() (bool, error) {
		sectors, err := a.sysfs.number(d.name(), "size")
		return sectors == size/512, err
	})
}

// Detach implements [attach.Attacher].
func (a *Attacher) Detach(ctx context.Context, volumeID string) error {
	release, err := a.devices.Claim(volumeID)
	if err != nil {
		return err
	}
	defer release()
	found, exists, err := a.sysfs.find(a.options.Owner, volumeID)
	if err != nil {
		return err
	}
	d, isServed := a.devices.Get(volumeID)
	if exists {
		if isServed && d.alive() {
			_, err = tearDownTask.Run(ctx, tearDownJob{a.options.Owner, volumeID, found.index})
		} else {
			err = a.tearDownDead(found)
		}
		if err == nil {
			err = a.awaitGone(ctx, found)
		}
		if err != nil {
			return fmt.Errorf("detach volume %q from %s: %w", volumeID, found.path(), err)
		}
		klog.FromContext(ctx).Info("Detached", "volume", volumeID, "device", found.path())
	}
	if isServed {
		d.stop()
		a.devices.Delete(volumeID)
	}
	return nil
}

// tearDownTask is tearDown in an assistant, because it waits for the server of the device.
var tearDownTask = assistant.New("nbd-tear-down", tearDown)

// none is the result of a task that has none.
type none struct{}

type tearDownJob struct {
	Owner, VolumeID string
	Index           uint32
}

// tearDown disconnects the device of a volume that is served, after flushing it, and keeps everybody from mounting it
// meanwhile.
func tearDown(ctx context.Context, j tearDownJob) (_ none, err error) {
	ctx, cancel := blockdev.Settle(ctx)
	defer cancel()
	claim, err := blockdev.Claim(ctx, devicePath(j.Index))
	if err != nil {
		return none{}, err
	}
	// The kernel drops the device when the last descriptor is closed, this one at the latest. Until then nobody else
	// gets the number.
	defer func() { err = errors.Join(err, claim.Close()) }()
	found, exists, err := systemDisks.find(j.Owner, j.VolumeID)
	if err != nil || !exists || found.index != j.Index {
		return none{}, err // somebody else has disconnected it
	}
	if err := claim.Sync(); err != nil {
		return none{}, err
	}
	return none{}, newClient().disconnect(j.Index)
}

// tearDownDead disconnects a device that has no server. Opening such a device may wait for one, so it is not opened.
func (a *Attacher) tearDownDead(found disk) error {
	mountinfo, err := os.ReadFile(a.mountinfo)
	if err != nil {
		return err
	}
	user, err := a.sysfs.user(found.name, string(mountinfo))
	if err != nil {
		return err
	}
	if user != "" {
		return fmt.Errorf("%w: used by %s", attach.ErrBusy, user)
	}
	return a.kernel.disconnect(found.index)
}

// awaitGone waits until the kernel has dropped the device. It does not while another process has it open.
func (a *Attacher) awaitGone(ctx context.Context, found disk) error {
	ctx, cancel := context.WithTimeoutCause(ctx, a.patience, attach.ErrBusy)
	defer cancel()
	return blockdev.Await(ctx, "everybody to close the device, which is disconnected", func() (bool, error) {
		now, exists, err := a.sysfs.find(a.options.Owner, found.volumeID)
		return !exists || now.index != found.index, err
	})
}

// Resize implements [attach.Attacher].
func (a *Attacher) Resize(ctx context.Context, volumeID string, size int64) error {
	release, err := a.devices.Claim(volumeID)
	if err != nil {
		return err
	}
	defer release()
	d, ok := a.devices.Get(volumeID)
	if !ok {
		return fmt.Errorf("%w: volume %q", attach.ErrNotAttached, volumeID)
	}
	if err := d.geometry.CheckGrowth(size); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, a.patience)
	defer cancel()
	err = a.kernel.resize(d.index, d.tag, size)
	if err == nil {
		err = a.awaitSize(ctx, d, size)
	}
	if err != nil {
		return fmt.Errorf("resize %s of volume %q to %d bytes: %w", d.path(), volumeID, size, err)
	}
	d.geometry.Size = size
	klog.FromContext(ctx).Info("Resized", "volume", volumeID, "device", d.path(), "size", size)
	return nil
}

// List implements [attach.Attacher].
func (a *Attacher) List(context.Context) ([]attach.Device, error) {
	disks, err := a.sysfs.disks(a.options.Owner)
	if err != nil {
		return nil, err
	}
	devices := make([]attach.Device, 0, len(disks))
	for _, found := range disks {
		d, ok := a.devices.Get(found.volumeID)
		devices = append(devices, attach.Device{
			VolumeID: found.volumeID,
			Path:     found.path(),
			Size:     found.size,
			Served:   ok && d.index == found.index && d.alive(),
		})
	}
	return devices, nil
}

// Close implements [attach.Attacher]. Requests that the kernel has sent are answered; further I/O waits for the
// dead-connection timeout.
func (a *Attacher) Close() error {
	for _, d := range a.devices.Close() {
		d.stop()
	}
	return nil
}
