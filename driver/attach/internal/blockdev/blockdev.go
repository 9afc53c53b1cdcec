// Package blockdev does what attachers need of the node of a block device: wait for it, claim it, flush it, measure it.
//
// Everything goes by file descriptors that the Go runtime's poller never sees: for a device whose server is this very
// process, a thread that waits is right, and the poller waiting would not be.
package blockdev

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/qcow-csi/qcow-csi/driver/attach"
)

// Device is an open block device.
type Device struct {
	path string
	fd   int
}

// Open opens the device without excluding anybody. The node is opened for reading only: that is enough for every
// ioctl, and a descriptor that was open for writing would be reported to others (udev probes the device anew) when it
// closes.
func Open(path string) (*Device, error) { return open(path, 0) }

// Claim opens the device and keeps it from being mounted or becoming part of another device for as long as it is open.
// While it is that already, or another process claims it, Claim waits, until ctx ends.
func Claim(ctx context.Context, path string) (*Device, error) {
	var d *Device
	err := Await(ctx, path+" to be mounted nowhere, and no part of another device", func() (claimed bool, err error) {
		d, err = open(path, unix.O_EXCL)
		if errors.Is(err, unix.EBUSY) {
			return false, nil
		}
		return true, err
	})
	return d, err
}

// Settle returns a context for waiting until others are done with a device, which ends, with attach.ErrBusy, in a
// second. udev opens every device for a moment after every change, and wherever on the node a container starts at the time
// when something is unmounted, a copy of the mount lives on in its namespace for a moment.
func Settle(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, time.Second, attach.ErrBusy)
}

func open(path string, flags int) (*Device, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|flags, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	d := &Device{path: path, fd: fd}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, errors.Join(&os.PathError{Op: "stat", Path: path, Err: err}, d.Close())
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return nil, errors.Join(fmt.Errorf("%s is not a block device", path), d.Close())
	}
	return d, nil
}

// FD is the file descriptor, for ioctls. It belongs to d.
func (d *Device) FD() int { return d.fd }

// Sync writes what the page cache holds for the device, and flushes the device.
func (d *Device) Sync() error {
	if err := unix.Fsync(d.fd); err != nil {
		return &os.PathError{Op: "fsync", Path: d.path, Err: err}
	}
	return nil
}

// Size returns the length of the device in bytes.
func (d *Device) Size() (int64, error) {
	var size uint64
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(d.fd), unix.BLKGETSIZE64, uintptr(unsafe.Pointer(&size)))
	if errno != 0 {
		return 0, &os.PathError{Op: "measure", Path: d.path, Err: errno}
	}
	return int64(size), nil
}

// Close closes the descriptor, which ends a claim.
func (d *Device) Close() error {
	if err := unix.Close(d.fd); err != nil {
		return &os.PathError{Op: "close", Path: d.path, Err: err}
	}
	return nil
}

// Await asks condition, first at once and then in growing steps of up to 50 ms, until it is true or fails, or until
// ctx ends.
func Await(ctx context.Context, what string, condition func() (bool, error)) error {
	const longest = 50 * time.Millisecond
	for pause := time.Millisecond; ; pause = min(2*pause, longest) {
		ok, err := condition()
		if ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for %s: %w", what, context.Cause(ctx))
		case <-time.After(pause):
		}
	}
}

// AwaitNode waits until the node at path is the block device with the given number. It appears a moment after the device
// where udev makes the nodes, and never in a container that has not got the host's /dev.
func AwaitNode(ctx context.Context, path string, number uint64) error {
	err := Await(ctx, "the device node", func() (bool, error) {
		var st unix.Stat_t
		err := unix.Stat(path, &st)
		if errors.Is(err, unix.ENOENT) {
			return false, nil
		}
		return st.Mode&unix.S_IFMT == unix.S_IFBLK && st.Rdev == number, err
	})
	if err != nil {
		return fmt.Errorf("%s does not become the device's node (a container needs the host's /dev): %w", path, err)
	}
	return nil
}
