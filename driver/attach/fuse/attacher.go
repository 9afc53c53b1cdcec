package fuse

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/qcow-csi/qcow-csi/driver/attach"
	"github.com/qcow-csi/qcow-csi/driver/attach/internal/blockdev"
	"github.com/qcow-csi/qcow-csi/driver/attach/internal/kmod"
	"github.com/qcow-csi/qcow-csi/driver/attach/internal/served"
)

// Options of an attacher.
type Options struct {
	// Owner is whose devices they are: the driver's name. Attachers with other owners see nothing of them.
	Owner string
}

// Attacher attaches by FUSE and loop devices.
type Attacher struct {
	owner   string
	devices served.Set[*device]
}

var _ attach.Attacher = (*Attacher)(nil)

// device is a device that this process serves.
type device struct {
	path   string
	export *export
}

// New returns an attacher.
func New(o Options) *Attacher { return &Attacher{owner: o.Owner} }

// Name returns "fuse".
func (a *Attacher) Name() string { return "fuse" }

// Probe implements [attach.Attacher]. It loads the modules fuse and loop where they are missing.
func (a *Attacher) Probe(ctx context.Context) error {
	for _, part := range []struct {
		module string
		check  func() error
	}{{"fuse", checkFUSE}, {"loop", checkLoop}} {
		if part.check() == nil {
			continue
		}
		loadErr := kmod.Load(ctx, part.module)
		if err := part.check(); err != nil {
			return fmt.Errorf("%w: it takes Linux 5.8 with the drivers fuse and loop, CAP_SYS_ADMIN and, in a container, "+
				"the host's /dev (%w)", attach.ErrUnavailable, errors.Join(err, loadErr))
		}
	}
	return nil
}

// checkFUSE makes a connection and lets it go.
func checkFUSE() error {
	c, err := connect()
	if err != nil {
		return err
	}
	return errors.Join(c.root.Close(), unix.Close(c.device))
}

// checkLoop asks a free loop device for a file that does not exist: a kernel that can do what we need objects to the
// file.
func checkLoop() error {
	number, err := freeLoop()
	if err != nil {
		return err
	}
	fd, err := unix.Open(loopPath(number), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", loopPath(number), err)
	}
	defer unix.Close(fd) //nolint:errcheck // nothing was written to it
	err = unix.IoctlLoopConfigure(fd, &unix.LoopConfig{Fd: ^uint32(0)})
	if !errors.Is(err, unix.EBADF) && !errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("configure a loop device in one step: %w", err)
	}
	return nil
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
	if existing, found, err := findLoop(a.owner, r.VolumeID); err != nil {
		return attach.Device{}, err
	} else if found {
		return attach.Device{}, fmt.Errorf("%w: volume %q is attached to %s", attach.ErrBusy, r.VolumeID, existing.path)
	}
	name := fileName(a.owner, r.VolumeID)
	e, err := newExport(ctx, name, r.Backend, geometry)
	if err != nil {
		return attach.Device{}, fmt.Errorf("attach volume %q: %w", r.VolumeID, err)
	}
	number, err := configureTask.Run(ctx, configureJob{name, geometry}, e.root)
	if err != nil {
		err = errors.Join(err, a.discard(r.VolumeID), closeExport(e))
		return attach.Device{}, fmt.Errorf("attach volume %q: %w", r.VolumeID, err)
	}
	d := &device{loopPath(number), e}
	a.devices.Put(r.VolumeID, d)
	klog.FromContext(ctx).Info("Attached", "volume", r.VolumeID, "device", d.path)
	return attach.Device{VolumeID: r.VolumeID, Path: d.path, Size: geometry.Size, Served: true}, nil
}

// discard removes the device of a volume, should an assistant have made one and then failed.
func (a *Attacher) discard(volumeID string) error {
	l, found, err := findLoop(a.owner, volumeID)
	if err != nil || !found {
		return err
	}
	return a.remove(context.Background(), l, false)
}

// Detach implements [attach.Attacher]. It notices when the device is merely open elsewhere, too.
func (a *Attacher) Detach(ctx context.Context, volumeID string) error {
	release, err := a.devices.Claim(volumeID)
	if err != nil {
		return err
	}
	defer release()
	l, found, err := findLoop(a.owner, volumeID)
	if err != nil {
		return err
	}
	d, isServed := a.devices.Get(volumeID)
	if found {
		if err := a.remove(ctx, l, isServed && d.export.alive()); err != nil {
			return fmt.Errorf("detach volume %q from %s: %w", volumeID, l.path, err)
		}
		klog.FromContext(ctx).Info("Detached", "volume", volumeID, "device", l.path)
	}
	if !isServed {
		return nil
	}
	if err := closeExport(d.export); err != nil {
		return fmt.Errorf("detach volume %q: %w", volumeID, err)
	}
	a.devices.Delete(volumeID)
	return nil
}

// remove takes the file from a loop device, after flushing it if that is wanted.
func (a *Attacher) remove(ctx context.Context, l loop, flush bool) error {
	if _, err := removeTask.Run(ctx, removeJob{a.owner, l.volumeID, l.path, flush}); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	return blockdev.Await(ctx, "the kernel to clear "+l.path, func() (bool, error) {
		now, found, err := findLoop(a.owner, l.volumeID)
		return !found || now.path != l.path, err
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
	e := d.export
	geometry := e.geometry
	geometry.Size = e.size.Load()
	if err := geometry.CheckGrowth(size); err != nil {
		return err
	}
	e.size.Store(size)
	if _, err := growTask.Run(ctx, growJob{e.name, d.path, size}, e.root); err != nil {
		return fmt.Errorf("resize %s of volume %q to %d bytes: %w", d.path, volumeID, size, err)
	}
	klog.FromContext(ctx).Info("Resized", "volume", volumeID, "device", d.path, "size", size)
	return nil
}

// List implements [attach.Attacher].
func (a *Attacher) List(context.Context) ([]attach.Device, error) {
	found, err := loops(a.owner)
	if err != nil {
		return nil, err
	}
	devices := make([]attach.Device, 0, len(found))
	for _, l := range found {
		d, ok := a.devices.Get(l.volumeID)
		devices = append(devices, attach.Device{
			VolumeID: l.volumeID,
			Path:     l.path,
			Size:     l.size,
			Served:   ok && d.path == l.path && d.export.alive(),
		})
	}
	return devices, nil
}

// Close implements [attach.Attacher]. What is mounted from the devices gets I/O errors from now on.
func (a *Attacher) Close() error {
	gone, cancel := context.WithCancel(context.Background())
	cancel() // the loop devices do not let go of their files: waiting for that would be in vain
	var errs []error
	for _, d := range a.devices.Close() {
		errs = append(errs, d.export.close(gone))
	}
	return errors.Join(errs...)
}

// closeExport ends an export that no loop device uses any more.
func closeExport(e *export) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	return e.close(ctx)
}
