package nbd

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/qcow-csi/qcow-csi/driver/attach"
)

// sysfs reads what the kernel shows of its block devices. Its value is the directory, usually /sys/block.
type sysfs string

// systemDisks is where the kernel shows them.
const systemDisks sysfs = "/sys/block"

// deviceName is what the kernel calls the device with this number.
func deviceName(index uint32) string { return "nbd" + strconv.FormatUint(uint64(index), 10) }

func devicePath(index uint32) string { return "/dev/" + deviceName(index) }

// disk is an NBD device of ours.
type disk struct {
	index    uint32
	name     string // such as nbd0
	volumeID string
	size     int64 // bytes
}

func (d disk) path() string { return devicePath(d.index) }

// disks returns the devices of owner. A device that is being set up or torn down at the moment may be missing.
func (s sysfs) disks(owner string) ([]disk, error) {
	files, err := filepath.Glob(filepath.Join(string(s), "nbd*", "backend"))
	if err != nil {
		return nil, err
	}
	var found []disk
	for _, file := range files {
		raw, err := os.ReadFile(file)
		if isGone(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		volumeID, ours := attach.VolumeOf(owner, strings.TrimSuffix(string(raw), "\n"))
		if !ours {
			continue
		}
		name := filepath.Base(filepath.Dir(file))
		index, err := strconv.ParseUint(strings.TrimPrefix(name, "nbd"), 10, 32)
		if err != nil {
			return nil, fmt.Errorf("NBD device %s: %w", name, err)
		}
		sectors, err := s.number(name, "size")
		if err != nil {
			return nil, err
		}
		found = append(found, disk{uint32(index), name, volumeID, sectors * 512})
	}
	return found, nil
}

// find returns the device of the volume.
func (s sysfs) find(owner, volumeID string) (disk, bool, error) {
	disks, err := s.disks(owner)
	if err != nil {
		return disk{}, false, err
	}
	for _, d := range disks {
		if d.volumeID == volumeID {
			return d, true, nil
		}
	}
	return disk{}, false, nil
}

// deviceNumber returns the number of the device's node.
func (s sysfs) deviceNumber(name string) (uint64, error) {
	raw, err := os.ReadFile(filepath.Join(string(s), name, "dev"))
	if err != nil {
		return 0, err
	}
	return parseDeviceNumber(strings.TrimSpace(string(raw)))
}

// user returns what uses the device or a partition of it, in words, and "" when nothing does. It does not open the
// device. mountinfo is the mount table, in the form of proc(5).
func (s sysfs) user(name string, mountinfo string) (string, error) {
	dirs, err := filepath.Glob(filepath.Join(string(s), name, name+"p*"))
	if err != nil {
		return "", err
	}
	numbers := make(map[string]bool)
	nodes := make(map[string]bool)
	for _, dir := range append(dirs, filepath.Join(string(s), name)) {
		holders, err := os.ReadDir(filepath.Join(dir, "holders"))
		if err != nil && !isGone(err) {
			return "", err
		}
		if len(holders) > 0 {
			return "device " + holders[0].Name(), nil
		}
		raw, err := os.ReadFile(filepath.Join(dir, "dev"))
		if err != nil {
			return "", err
		}
		numbers[strings.TrimSpace(string(raw))] = true
		nodes["/dev/"+filepath.Base(dir)] = true
	}
	for line := range strings.Lines(mountinfo) {
		// 36 35 98:0 /root /mount/point options optional... - type source options
		before, after, _ := strings.Cut(line, " - ")
		mount, filesystem := strings.Fields(before), strings.Fields(after)
		if len(mount) < 5 || len(filesystem) < 2 {
			continue
		}
		// Filesystems that can span devices (btrfs) have a number of their own, but name a device.
		if numbers[mount[2]] || nodes[filesystem[1]] {
			return "the mount on " + mount[4], nil
		}
	}
	return "", nil
}

// number reads a decimal number.
func (s sysfs) number(elements ...string) (int64, error) {
	file := filepath.Join(append([]string{string(s)}, elements...)...)
	raw, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(raw)), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", file, err)
	}
	return n, nil
}

func parseDeviceNumber(s string) (uint64, error) {
	var major, minor uint32
	if _, err := fmt.Sscanf(s, "%d:%d", &major, &minor); err != nil {
		return 0, fmt.Errorf("device number %q: %w", s, err)
	}
	return unix.Mkdev(major, minor), nil
}

// isGone tells whether a file was missing because its device is being torn down.
func isGone(err error) bool { return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) }
