package fuse

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/qcow-csi/qcow-csi/driver/attach"
	"github.com/qcow-csi/qcow-csi/driver/attach/internal/blockdev"
)

const (
	// patience is how long an operation waits for what the kernel does within milliseconds when all is well.
	patience = 10 * time.Second
	// settling is how long Detach waits for others to close the device. udev opens it for a moment after every change.
	settling = 2 * time.Second

	loopControl = "/dev/loop-control"
)

func loopPath(number int) string { return "/dev/loop" + strconv.Itoa(number) }

// freeLoop returns the number of a loop device that nobody uses, for the moment. It makes one where there is none.
func freeLoop() (int, error) {
	control, err := unix.Open(loopControl, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: loopControl, Err: err}
	}
	defer unix.Close(control) //nolint:errcheck // nothing was written to it
	number, err := unix.IoctlRetInt(control, unix.LOOP_CTL_GET_FREE)
	if err != nil {
		return -1, fmt.Errorf("get a free loop device: %w", err)
	}
	return number, nil
}

// configureJob puts a loop device over the file of a mount.
type configureJob struct {
	File     string
	Geometry attach.Geometry
}

// do returns the number of the device.
func (j *configureJob) do(ctx context.Context) (number int, err error) {
	mode := unix.O_RDWR
	if j.Geometry.ReadOnly {
		mode = unix.O_RDONLY
	}
	file, err := unix.Openat(rootFD, j.File, mode|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open the file of the FUSE mount: %w", err)
	}
	defer unix.Close(file) //nolint:errcheck // the loop device has it open, or nothing was written to it
	config := unix.LoopConfig{Fd: uint32(file), Size: uint32(j.Geometry.BlockSize)}
	config.Info.Flags = unix.LO_FLAGS_DIRECT_IO
	if j.Geometry.ReadOnly {
		config.Info.Flags |= unix.LO_FLAGS_READ_ONLY
	}
	copy(config.Info.File_name[:], "qcow-csi") // which is too short for the name, but the kernel knows that anyway

	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	// Others look for free devices, too: whoever configures one first has it.
	err = blockdev.Await(ctx, "a free loop device", func() (configured bool, err error) {
		number, err = freeLoop()
		if err != nil {
			return false, err
		}
		return configureLoop(ctx, number, &config)
	})
	return number, err
}

// configureLoop returns false when another process was faster.
func configureLoop(ctx context.Context, number int, config *unix.LoopConfig) (configured bool, err error) {
	path := loopPath(number)
	node, err := deviceNumber(filepath.Base(path))
	if err != nil {
		return false, err
	}
	if err := blockdev.AwaitNode(ctx, path, node); err != nil {
		return false, err
	}
	// A device that is configured through a descriptor for reading becomes read-only.
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return false, &os.PathError{Op: "open", Path: path, Err: err}
	}
	err = unix.IoctlLoopConfigure(fd, config)
	if err := unix.Close(fd); err != nil {
		return false, &os.PathError{Op: "close", Path: path, Err: err}
	}
	switch {
	case errors.Is(err, unix.EBUSY):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("configure %s: %w", path, err)
	}
	return true, nil
}

// growJob tells the kernel that the file has grown.
type growJob struct {
	File string
	Path string
	Size int64 // bytes
}

func (j *growJob) do(ctx context.Context) (err error) {
	d, err := blockdev.Open(j.Path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	return blockdev.Await(ctx, "the kernel to take the size", func() (bool, error) {
		// Makes the kernel ask for the size. It ignores the answer when a write ends at the same time, hence the loop.
		var st unix.Stat_t
		if err := unix.Fstatat(rootFD, j.File, &st, 0); err != nil {
			return false, fmt.Errorf("stat the file of the FUSE mount: %w", err)
		}
		if err := unix.IoctlSetInt(d.FD(), unix.LOOP_SET_CAPACITY, 0); err != nil {
			return false, fmt.Errorf("set the capacity: %w", err)
		}
		size, err := d.Size()
		return size == j.Size, err
	})
}

// removeJob takes the file from a loop device.
type removeJob struct {
	Path  string
	Flush bool // before that
}

func (j *removeJob) do(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, settling, attach.ErrBusy)
	defer cancel()
	return blockdev.Await(ctx, j.Path+" to be closed by everybody else", func() (bool, error) {
		d, err := blockdev.Claim(j.Path)
		if err != nil {
			return false, err
		}
		cleared := false
		if j.Flush {
			err = d.Sync()
		}
		if err == nil {
			cleared, err = clearLoop(d)
		}
		return cleared, errors.Join(err, d.Close())
	})
}

// clearLoop takes the file from the loop device. The claim on the device says that nobody has it mounted. Whoever merely
// has it open makes the kernel put the clearing off until the last close. That is not wanted: then the device stays
// as it is, and cleared is false.
func clearLoop(d *blockdev.Device) (cleared bool, err error) {
	err = unix.IoctlSetInt(d.FD(), unix.LOOP_CLR_FD, 0)
	var status *unix.LoopInfo64
	if err == nil {
		status, err = unix.IoctlLoopGetStatus64(d.FD())
	}
	switch {
	case errors.Is(err, unix.ENXIO): // has no file, or will have none once d is closed
		return true, nil
	case err != nil:
		return false, fmt.Errorf("clear the loop device: %w", err)
	}
	status.Flags &^= unix.LO_FLAGS_AUTOCLEAR
	if err := unix.IoctlLoopSetStatus64(d.FD(), status); err != nil {
		return false, fmt.Errorf("call back the clearing of the loop device: %w", err)
	}
	return false, nil
}
