package mount

import (
	"errors"
	"testing"
)

func TestFilesystemReadOnly(t *testing.T) {
	for _, test := range []struct {
		options []string
		want    bool
	}{
		{nil, false},
		{[]string{"ro"}, true},
		{[]string{"noatime,ro"}, true},
		{[]string{"ro", "rw"}, false},
		{[]string{"rw,ro"}, true},
		{[]string{"errors=remount-ro"}, false},
	} {
		if got := (Filesystem{Type: "ext4", Options: test.options}).ReadOnly(); got != test.want {
			t.Errorf("options %q: read-only %t", test.options, got)
		}
	}
}

func TestFilesystemValidate(t *testing.T) {
	for _, option := range []string{
		"noatime", "discard,nodiratime", "data=ordered", "compress=zstd:3", `context="a:b:c:s0:c1,c2"`, "subvol=/x",
	} {
		if err := (Filesystem{Type: "btrfs", Options: []string{option}}).Validate(); err != nil {
			t.Errorf("option %q: %v", option, err)
		}
	}
	for _, option := range []string{
		"", "noatime,", "rbind", "remount,ro", "move", "shared", "loop", "offset=4096", "sizelimit=1", "nofail",
		"x-systemd.automount", "X-mount.subdir=/x", "uhelper=x", "helper=x", "data=ordered\x00", "a\nb", "\x7f",
	} {
		if err := (Filesystem{Type: "ext4", Options: []string{option}}).Validate(); !errors.Is(err, ErrInvalid) {
			t.Errorf("option %q: %v", option, err)
		}
	}
}
