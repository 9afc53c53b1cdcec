package mountfake_test

import (
	"errors"
	"fmt"
	"path/filepath"
	"testing"

	"github.com/qcow-csi/qcow-csi/driver/mount"
	"github.com/qcow-csi/qcow-csi/driver/mount/mountfake"
	"github.com/qcow-csi/qcow-csi/driver/mount/mounttest"
)

func TestConformance(t *testing.T) {
	mounttest.Run(t, func(*testing.T) mounttest.Env {
		fake := mountfake.New()
		devices := 0
		return mounttest.Env{
			Mounter: fake,
			NewDevice: func(_ *testing.T, size int64) string {
				path := fmt.Sprintf("/dev/fake%d", devices)
				devices++
				fake.AddDevice(path, size)
				return path
			},
			GrowDevice: func(_ *testing.T, device string, size int64) { fake.AddDevice(device, size) },
			Scribble:   func(_ *testing.T, device string) { fake.SetContent(device, mount.Content{}) },
			NewBrokenDevice: func(_ *testing.T, size int64) string {
				fake.AddDevice("/dev/broken", size)
				fake.SetUnreadable("/dev/broken", true)
				return "/dev/broken"
			},
		}
	})
}

func TestHookFailsCalls(t *testing.T) {
	fake := mountfake.New()
	fake.AddDevice("/dev/fake0", 16<<20)
	boom := errors.New("boom")
	fake.SetHook(func(c mountfake.Call) error {
		if c.Op == "Format" || c.Op == "Mount" {
			return boom
		}
		return nil
	})
	target := filepath.Join(t.TempDir(), "target")
	ext4 := mount.Filesystem{Type: "ext4"}
	if err := fake.Mount(t.Context(), "/dev/fake0", target, ext4); !errors.Is(err, boom) {
		t.Errorf("Mount: %v", err)
	}
	if err := fake.Format(t.Context(), "/dev/fake0", ext4, true); !errors.Is(err, boom) {
		t.Errorf("Format: %v", err)
	}
	content, err := fake.Probe(t.Context(), "/dev/fake0")
	if err != nil || content != (mount.Content{}) {
		t.Errorf("after a Format that failed: %+v, %v", content, err)
	}
	if calls := fake.Calls("Mount"); len(calls) != 1 || calls[0].Target != target {
		t.Errorf("calls of Mount: %+v", calls)
	}
	if targets := fake.Targets(); len(targets) != 0 {
		t.Errorf("targets: %q", targets)
	}
}
