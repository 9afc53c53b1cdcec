package mount

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// sectorSize is the unit of sizes in sysfs, whatever the device's own blocks are.
const sectorSize = 512

// blockDevice is a block device as its node and sysfs show it, which takes no opening: opening waits for a device
// that hangs.
type blockDevice struct {
	major, minor uint32
}

// statDevice returns the block device whose node is path, or that is bound to it.
func statDevice(path string) (blockDevice, error) {
	if !filepath.IsAbs(path) {
		return blockDevice{}, fmt.Errorf("device %q: %w: not an absolute path", path, ErrInvalid)
	}
	info, err := os.Stat(path)
	if err != nil {
		return blockDevice{}, err
	}
	device, ok := deviceOf(info)
	if !ok {
		return blockDevice{}, fmt.Errorf("%s: %w: not a block device", path, ErrInvalid)
	}
	return device, nil
}

// deviceOf returns the device that a node stands for; false when it is not the node of a block device.
func deviceOf(info fs.FileInfo) (blockDevice, bool) {
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok || stat.Mode&syscall.S_IFMT != syscall.S_IFBLK {
		return blockDevice{}, false
	}
	return blockDevice{unix.Major(stat.Rdev), unix.Minor(stat.Rdev)}, true
}

func (d blockDevice) sysfs() string { return fmt.Sprintf("/sys/dev/block/%d:%d", d.major, d.minor) }

// path is the device's node as the kernel names it.
func (d blockDevice) path() (string, error) {
	link, err := os.Readlink(d.sysfs())
	if err != nil {
		return "", err
	}
	return "/dev/" + strings.ReplaceAll(filepath.Base(link), "!", "/"), nil
}

// size is the device's capacity in bytes; a device with nothing behind it is ErrUnreadable.
func (d blockDevice) size() (int64, error) {
	text, err := os.ReadFile(filepath.Join(d.sysfs(), "size"))
	if err != nil {
		return 0, err
	}
	sectors, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("size of device %d:%d: %w", d.major, d.minor, err)
	}
	if sectors == 0 {
		return 0, fmt.Errorf("device %d:%d: %w: it has no size, so nothing is attached", d.major, d.minor, ErrUnreadable)
	}
	return sectors * sectorSize, nil
}

// idle is ErrBusy while the device is mounted or otherwise held exclusively.
func idle(path string) (err error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_EXCL, 0)
	if errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("%s: %w: it is mounted, or another program holds it", path, ErrBusy)
	}
	if err != nil {
		return err
	}
	return f.Close()
}
