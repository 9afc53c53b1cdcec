package fuse

import (
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// connection is a FUSE connection with its mount, which is attached nowhere.
type connection struct {
	device int      // descriptor of /dev/fuse, the server's end
	root   *os.File // the mount's root directory, as a place only (O_PATH): closing it asks the server nothing
	number uint32   // under which the kernel's fusectl filesystem knows the connection
}

// connect makes a FUSE mount. The caller closes both files.
func connect() (connection, error) {
	device, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return connection{}, fmt.Errorf("open /dev/fuse: %w", err)
	}
	root, err := newMount("fuse",
		"source", "qcow-csi",
		"fd", strconv.Itoa(device),
		"rootmode", strconv.FormatUint(unix.S_IFDIR, 8),
		"user_id", "0",
		"group_id", "0",
		"max_read", strconv.Itoa(maxRequest),
	)
	if err != nil {
		return connection{}, errors.Join(err, unix.Close(device))
	}
	// Asks the kernel alone: the root's attributes are not fetched from the server, which does not run yet.
	var st unix.Statx_t
	if err := unix.Statx(int(root.Fd()), "", unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, 0, &st); err != nil {
		return connection{}, errors.Join(fmt.Errorf("stat the mount: %w", err), root.Close(), unix.Close(device))
	}
	return connection{device, root, st.Dev_minor}, nil
}

// abort makes the kernel end the connection with this number. Whoever waits for an answer gets an error, and the
// server an end of requests. A connection that has ended already is fine.
func abort(number uint32) error {
	control, err := newMount("fusectl")
	if err != nil {
		return err
	}
	defer control.Close() //nolint:errcheck // a directory
	fd, err := unix.Openat(int(control.Fd()), strconv.FormatUint(uint64(number), 10)+"/abort", unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("abort FUSE connection %d: %w", number, err)
	}
	_, err = unix.Write(fd, []byte("1"))
	if err := errors.Join(err, unix.Close(fd)); err != nil {
		return fmt.Errorf("abort FUSE connection %d: %w", number, err)
	}
	return nil
}

// newMount makes a mount that is attached nowhere, with these keys and values, and returns its root directory. The
// mount lasts for as long as the directory or a file in it is open.
func newMount(filesystem string, options ...string) (root *os.File, err error) {
	config, err := unix.Fsopen(filesystem, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("fsopen %s: %w", filesystem, err)
	}
	defer unix.Close(config) //nolint:errcheck // nothing was written to it
	for i := 0; i < len(options); i += 2 {
		if err := unix.FsconfigSetString(config, options[i], options[i+1]); err != nil {
			return nil, fmt.Errorf("fsconfig %s %s=%s: %w", filesystem, options[i], options[i+1], err)
		}
	}
	if err := unix.FsconfigCreate(config); err != nil {
		return nil, fmt.Errorf("fsconfig %s: %w", filesystem, err)
	}
	fd, err := unix.Fsmount(config, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return nil, fmt.Errorf("fsmount %s: %w", filesystem, err)
	}
	return os.NewFile(uintptr(fd), filesystem), nil
}
