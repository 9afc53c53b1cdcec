package mount

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"
)

// entry is a line of the kernel's mount table, /proc/self/mountinfo (proc_pid_mountinfo(5)).
type entry struct {
	major, minor uint32   // of the mounted filesystem; of its own making for btrfs, devtmpfs and others
	root         string   // what of the filesystem is mounted: "/" for all of it
	target       string   // where
	options      []string // of the mount
	fsType       string
	source       string
	superOptions []string // of the filesystem
}

// readOnly says whether the mount or the filesystem is.
func (e entry) readOnly() bool {
	return slices.Contains(e.options, "ro") || slices.Contains(e.superOptions, "ro")
}

// device is the block device that is mounted: the node, for a bound one, else what the filesystem is on; false when
// there is none. It looks at the target, so only the topmost entry may be asked with top.
func (e entry) device(top bool) (blockDevice, bool) {
	if top && e.root != "/" {
		if device, err := statDevice(e.target); err == nil {
			return device, true
		}
	}
	if e.major != 0 {
		return blockDevice{e.major, e.minor}, true
	}
	if device, err := statDevice(e.source); err == nil { // btrfs
		return device, true
	}
	return blockDevice{}, false
}

// Mounts implements Mounter.
func (*Host) Mounts(_ context.Context, target string) ([]Mount, error) {
	entries, err := mountsOn(target)
	if err != nil {
		return nil, fmt.Errorf("mounts: %w", err)
	}
	mounts := make([]Mount, 0, len(entries))
	for i, e := range entries {
		m := Mount{
			Device: e.source, Major: int(e.major), Minor: int(e.minor), Type: e.fsType, ReadOnly: e.readOnly(),
			Options: append(slices.Clone(e.options), e.superOptions...),
		}
		if device, ok := e.device(i == len(entries)-1); ok {
			m.Major, m.Minor = int(device.major), int(device.minor)
			if path, err := device.path(); err == nil { // a device that is gone keeps the name it was mounted by
				m.Device = path
			}
		}
		mounts = append(mounts, m)
	}
	return mounts, nil
}

// mountsOn returns the mounts on target, in the order in which they were made, so that the topmost is last. It does
// not touch target itself, which may not answer.
func mountsOn(target string) ([]entry, error) {
	path, err := resolve(target)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	entries, err := parseTable(string(text))
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(entries, func(e entry) bool { return e.target != path }), nil
}

// topmost returns the uppermost mount on target, nil when there is none.
func topmost(target string) (*entry, error) {
	entries, err := mountsOn(target)
	if err != nil || len(entries) == 0 {
		return nil, err
	}
	return &entries[len(entries)-1], nil
}

func parseTable(text string) ([]entry, error) {
	var entries []entry
	for line := range strings.Lines(text) {
		e, err := parseEntry(strings.TrimSuffix(line, "\n"))
		if err != nil {
			return nil, fmt.Errorf("mount table: %w", err)
		}
		entries = append(entries, e)
	}
	return entries, nil
}

// parseEntry parses a line: id, parent, major:minor, root, target, options, any number of optional fields, "-", type,
// source, options of the filesystem. Single spaces separate the fields, and the source may be empty.
func parseEntry(line string) (entry, error) {
	fields := strings.Split(line, " ")
	end := slices.Index(fields, "-")
	if end < 6 || len(fields) < end+4 {
		return entry{}, fmt.Errorf("malformed line %q", line)
	}
	majorText, minorText, _ := strings.Cut(fields[2], ":")
	major, err := strconv.ParseUint(majorText, 10, 32)
	if err != nil {
		return entry{}, fmt.Errorf("device number in line %q: %w", line, err)
	}
	minor, err := strconv.ParseUint(minorText, 10, 32)
	if err != nil {
		return entry{}, fmt.Errorf("device number in line %q: %w", line, err)
	}
	return entry{
		major: uint32(major), minor: uint32(minor),
		root: unescape(fields[3]), target: unescape(fields[4]), options: strings.Split(fields[5], ","),
		fsType: fields[end+1], source: unescape(fields[end+2]), superOptions: strings.Split(fields[end+3], ","),
	}, nil
}

// unescape undoes the kernel's escapes: a backslash and three octal digits for space, tab, newline, backslash and #.
func unescape(field string) string {
	return unescaper.Replace(field)
}

var unescaper = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`, `\043`, "#")
