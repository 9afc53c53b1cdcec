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
	"github.com/qcow-csi/qcow-csi/driver/attach/internal/assistant"
	"github.com/qcow-csi/qcow-csi/driver/attach/internal/blockdev"
)

// patience is how long an operation waits for what the kernel does within milliseconds when all is well.
const patience = 10 * time.Second

const loopControl = "/dev/loop-control"

func loopPath(number int) string { return "/dev/loop" + strconv.Itoa(number) }

// freeLoop returns the number of a loop device that has no file at the moment. It makes one where there is none.
func freeLoop() (int, error) { return controlLoops(unix.LOOP_CTL_GET_FREE, 0) }

// ensureLoop makes the loop device with this number exist.
func ensureLoop(number int) error {
	_, err := controlLoops(unix.LOOP_CTL_ADD, number)
	if errors.Is(err, unix.EEXIST) {
		return nil
	}
	return err
}

func controlLoops(request uint, number int) (int, error) {
	control, err := unix.Open(loopControl, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: loopControl, Err: err}
	}
	defer unix.Close(control) //nolint:errcheck // nothing was written to it
	result, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(control), uintptr(request), uintptr(number))
	if errno != 0 {
		return -1, fmt.Errorf("%s: find a free device: %w", loopControl, errno)
	}
	return int(result), nil
}

// What waits for the server of the file is done by assistants. The first two have the root directory of the mount.
var (
	configureTask = assistant.New("fuse-configure", configure)
	growTask      = assistant.New("fuse-grow", grow)
	removeTask    = assistant.New("fuse-remove", remove)
)

// none is the result of a task that has none.
type none struct{}

type configureJob struct {
	File     string
	Geometry attach.Geometry
}

// configure puts a loop device over the file of a mount and returns its number.
func configure(ctx context.Context, j configureJob) (number int, err error) {
	mode := unix.O_RDWR
	if j.Geometry.ReadOnly {
		mode = unix.O_RDONLY
	}
	file, err := unix.Openat(assistant.FirstFile, j.File, mode|unix.O_CLOEXEC, 0)
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
	// A device without a file may still be somebody's, who holds it exclusively or was faster: then the next one will do.
	for number, err = freeLoop(); err == nil; number++ {
		if err = ensureLoop(number); err == nil {
			err = configureLoop(ctx, number, &config)
		}
		if !errors.Is(err, unix.EBUSY) {
			break
		}
		err = ctx.Err()
	}
	return number, err
}

func configureLoop(ctx context.Context, number int, config *unix.LoopConfig) error {
	path := loopPath(number)
	node, err := deviceNumber(filepath.Base(path))
	if err != nil {
		return err
	}
	if err := blockdev.AwaitNode(ctx, path, node); err != nil {
		return err
	}
	// A device that is configured through a descriptor for reading becomes read-only.
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: path, Err: err}
	}
	if err = unix.IoctlLoopConfigure(fd, config); err != nil {
		err = fmt.Errorf("configure %s: %w", path, err)
	}
	return errors.Join(err, unix.Close(fd))
}

type growJob struct {
	File string
	Path string
	Size int64 // bytes
}

// grow tells the kernel that the file has grown.
func grow(ctx context.Context, j growJob) (_ none, err error) {
	d, err := blockdev.Open(j.Path)
	if err != nil {
		return none{}, err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	return none{}, blockdev.Await(ctx, "the kernel to take the size", func() (bool, error) {
		// Makes the kernel ask for the size. It ignores the answer when a write ends at the same time, hence the loop.
		var st unix.Stat_t
		if err := unix.Fstatat(assistant.FirstFile, j.File, &st, 0); err != nil {
			return false, fmt.Errorf("stat the file of the FUSE mount: %w", err)
		}
		if err := unix.IoctlSetInt(d.FD(), unix.LOOP_SET_CAPACITY, 0); err != nil {
			return false, fmt.Errorf("set the capacity: %w", err)
		}
		size, err := d.Size()
		return size == j.Size, err
	})
}

type removeJob struct {
	Owner, VolumeID string
	Path            string
	Flush           bool // before that
}

// remove takes the volume's file from a loop device.
func remove(ctx context.Context, j removeJob) (none, error) {
	ctx, cancel := blockdev.Settle(ctx)
	defer cancel()
	return none{}, blockdev.Await(ctx, j.Path+" to be closed by everybody else", func() (bool, error) {
		d, err := blockdev.Claim(ctx, j.Path)
		if err != nil {
			return false, err
		}
		removed, err := j.removeFrom(d)
		return removed, errors.Join(err, d.Close())
	})
}

// removeFrom returns false when the device is open elsewhere. d claims it: nobody gives it another file meanwhile.
func (j removeJob) removeFrom(d *blockdev.Device) (removed bool, err error) {
	l, found, err := findLoop(j.Owner, j.VolumeID)
	if err != nil || !found || l.path != j.Path {
		return err == nil, err // somebody else took the file away
	}
	if j.Flush {
		if err := d.Sync(); err != nil {
			return false, err
		}
	}
	return clearLoop(d)
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
