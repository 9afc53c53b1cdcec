package fuse

import (
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/qcow-csi/qcow-csi/driver/attach"
)

const sysBlock = "/sys/block"

// loop is a loop device over a file of ours.
type loop struct {
	path     string
	volumeID string
	size     int64 // bytes
}

// loops returns the loop devices over files of this owner.
func loops(owner string) ([]loop, error) {
	files, err := filepath.Glob(filepath.Join(sysBlock, "loop*", "loop", "backing_file"))
	if err != nil {
		return nil, err
	}
	var found []loop
	for _, file := range files {
		raw, err := os.ReadFile(file)
		if isGone(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		volumeID, ours := volumeOfFile(owner, strings.TrimSuffix(string(raw), "\n"))
		if !ours {
			continue
		}
		dir := filepath.Dir(filepath.Dir(file))
		raw, err = os.ReadFile(filepath.Join(dir, "size"))
		if err != nil {
			return nil, err
		}
		sectors, err := strconv.ParseInt(strings.TrimSpace(string(raw)), 10, 64)
		if err != nil {
			return nil, fmt.Errorf("%s/size: %w", dir, err)
		}
		found = append(found, loop{"/dev/" + filepath.Base(dir), volumeID, sectors * 512})
	}
	return found, nil
}

// findLoop returns the loop device of the volume.
func findLoop(owner, volumeID string) (loop, bool, error) {
	found, err := loops(owner)
	if err != nil {
		return loop{}, false, err
	}
	for _, l := range found {
		if l.volumeID == volumeID {
			return l, true, nil
		}
	}
	return loop{}, false, nil
}

// isGone tells whether a file was missing because its device has been cleared.
func isGone(err error) bool { return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) }

// fileName is the name of the file for a volume.
func fileName(owner, volumeID string) string { return url.PathEscape(attach.Tag(owner, volumeID)) }

// volumeOfFile is the volume that a backing file, as sysfs words it, belongs to. Files of ours stand in the root of a
// mount that is attached nowhere, which the kernel shows as a path of one element.
func volumeOfFile(owner, backingFile string) (string, bool) {
	name, ok := strings.CutPrefix(backingFile, "/")
	if !ok || strings.Contains(name, "/") {
		return "", false
	}
	tag, err := url.PathUnescape(strings.TrimSuffix(name, " (deleted)")) // blanks in names are escaped
	if err != nil {
		return "", false
	}
	return attach.VolumeOf(owner, tag)
}

// deviceNumber reads the number of a block device.
func deviceNumber(name string) (uint64, error) {
	raw, err := os.ReadFile(filepath.Join(sysBlock, name, "dev"))
	if err != nil {
		return 0, err
	}
	var major, minor uint32
	if _, err := fmt.Sscanf(string(raw), "%d:%d", &major, &minor); err != nil {
		return 0, fmt.Errorf("device number of %s: %w", name, err)
	}
	return unix.Mkdev(major, minor), nil
}
