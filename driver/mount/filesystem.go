package mount

import (
	"fmt"
	"strings"
)

// Filesystem is a filesystem to make or mount.
type Filesystem struct {
	Type    string   // "ext4", "xfs" or "btrfs"
	Options []string // mount options, without the leading -o
}

// MinimumSize is the smallest device in bytes on which a filesystem of the type can be made; 0 for an unknown type.
func MinimumSize(fsType string) int64 {
	switch fsType {
	case "ext4":
		return 8 << 20 // below, mke2fs leaves out the journal
	case "xfs":
		return 300 << 20
	case "btrfs":
		return 256 << 20 // the kernel resizes none that is, or would be, smaller
	default:
		return 0
	}
}

// ReadOnly says whether the options ask for a read-only mount. As in mount(8), the last of ro and rw counts.
func (f Filesystem) ReadOnly() bool {
	readOnly := false
	for option := range f.each() {
		switch option {
		case "ro":
			readOnly = true
		case "rw":
			readOnly = false
		}
	}
	return readOnly
}

// Validate refuses, with ErrInvalid, unknown types and options that mean something else than how a filesystem is
// mounted.
func (f Filesystem) Validate() error {
	if MinimumSize(f.Type) == 0 {
		return fmt.Errorf("filesystem type %q: %w: have ext4, xfs and btrfs", f.Type, ErrInvalid)
	}
	for option := range f.each() {
		if reason := forbidden(option); reason != "" {
			return fmt.Errorf("mount option %q: %w: %s", option, ErrInvalid, reason)
		}
	}
	return nil
}

// each yields the single options: an element may hold several, separated by commas.
func (f Filesystem) each() func(yield func(string) bool) {
	return func(yield func(string) bool) {
		for _, element := range f.Options {
			for option := range strings.SplitSeq(element, ",") {
				if !yield(option) {
					return
				}
			}
		}
	}
}

// forbidden says why an option is refused, "" if it is not.
func forbidden(option string) string {
	if strings.ContainsFunc(option, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return "control character"
	}
	name, _, _ := strings.Cut(option, "=")
	switch name {
	case "":
		return "empty"
	case "bind", "rbind", "move", "remount",
		"shared", "rshared", "slave", "rslave", "private", "rprivate", "unbindable", "runbindable":
		return "asks for another operation than mounting the volume"
	case "loop", "offset", "sizelimit":
		return "asks for another device than the volume's"
	case "nofail":
		return "hides failures"
	}
	if strings.HasPrefix(strings.ToLower(name), "x-") || strings.HasSuffix(name, "helper") {
		return "is for other programs than the kernel"
	}
	return ""
}
