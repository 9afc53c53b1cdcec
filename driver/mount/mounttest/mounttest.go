// Package mounttest is the conformance suite of mount.Mounter: what the interface promises, seen through the
// interface alone. It runs against the fake and, on loop devices, against the real one.
package mounttest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/qcow-csi/qcow-csi/driver/mount"
)

// Env is a Mounter to test, and the machine around it. What its functions make lives until the test that asked for it
// ends; a function that cannot do its part fails that test.
type Env struct {
	Mounter mount.Mounter
	// NewDevice makes a blank block device of size bytes and returns its path.
	NewDevice func(t *testing.T, size int64) string
	// GrowDevice makes a device size bytes long.
	GrowDevice func(t *testing.T, device string, size int64)
	// Scribble writes data of no known kind to the start of a device.
	Scribble func(t *testing.T, device string)
	// NewBrokenDevice is NewDevice, but every read of the device fails.
	NewBrokenDevice func(t *testing.T, size int64) string
	// CannotGrow names the types of filesystem that this machine cannot grow while they are mounted.
	CannotGrow []string
}

// Sizes of the devices that the suite formats, in bytes, by type of filesystem.
var Sizes = map[string]int64{"ext4": 16 << 20, "xfs": 320 << 20, "btrfs": 256 << 20}

// Run runs the suite. newEnv is called once for each test.
func Run(t *testing.T, newEnv func(t *testing.T) Env) {
	for _, test := range []struct {
		name string
		run  func(t *testing.T, e Env)
	}{
		{"Probe", testProbe},
		{"Refusals", testRefusals},
		{"Lifecycle", testLifecycle},
		{"Grow", testGrow},
		{"ReadOnly", testReadOnly},
		{"Options", testOptions},
		{"Occupied", testOccupied},
		{"Block", testBlock},
		{"NotMounted", testNotMounted},
		{"Cancelled", testCancelled},
		{"Concurrency", testConcurrency},
	} {
		t.Run(test.name, func(t *testing.T) { test.run(t, newEnv(t)) })
	}
}

func testProbe(t *testing.T, e Env) {
	device := e.NewDevice(t, Sizes["ext4"])
	wantContent(t, e, device, mount.Content{Blank: true})
	e.Scribble(t, device)
	wantContent(t, e, device, mount.Content{})

	broken := e.NewBrokenDevice(t, Sizes["ext4"])
	content, err := e.Mounter.Probe(t.Context(), broken)
	wantError(t, err, mount.ErrUnreadable)
	if content.Blank {
		t.Error("an unreadable device passes for blank")
	}

	_, err = e.Mounter.Probe(t.Context(), filepath.Join(t.TempDir(), "absent"))
	wantError(t, err, fs.ErrNotExist)
}

func testRefusals(t *testing.T, e Env) {
	device := e.NewDevice(t, Sizes["ext4"])
	target := filepath.Join(t.TempDir(), "target")
	for _, filesystem := range []mount.Filesystem{
		{Type: ""},
		{Type: "ext3"},
		{Type: "ext4 -F"},
		{Type: "ext4", Options: []string{"bind"}},
		{Type: "ext4", Options: []string{"noatime,remount"}},
		{Type: "ext4", Options: []string{"loop=/dev/loop0"}},
		{Type: "ext4", Options: []string{"nofail"}},
		{Type: "ext4", Options: []string{"X-mount.mkdir"}},
		{Type: "ext4", Options: []string{""}},
		{Type: "ext4", Options: []string{"data=\nordered"}},
	} {
		wantError(t, e.Mounter.Format(t.Context(), device, filesystem, true), mount.ErrInvalid)
		wantError(t, e.Mounter.Mount(t.Context(), device, target, filesystem), mount.ErrInvalid)
	}
	wantContent(t, e, device, mount.Content{Blank: true})
	for _, fsType := range []string{"xfs", "btrfs"} {
		wantError(t, e.Mounter.Format(t.Context(), device, mount.Filesystem{Type: fsType}, true), mount.ErrInvalid)
	}
	wantContent(t, e, device, mount.Content{Blank: true})

	noError(t, e.Mounter.Format(t.Context(), device, mount.Filesystem{Type: "ext4"}, true))
	for _, impossible := range []string{"", "relative/target", "/", "/tmp/.."} {
		wantError(t, e.Mounter.Mount(t.Context(), device, impossible, mount.Filesystem{Type: "ext4"}), mount.ErrInvalid)
		wantError(t, e.Mounter.Bind(t.Context(), device, impossible, false), mount.ErrInvalid)
		wantError(t, e.Mounter.Unmount(t.Context(), impossible), mount.ErrInvalid)
	}
	if err := e.Mounter.Mount(t.Context(), device, target, mount.Filesystem{Type: "xfs"}); err == nil {
		t.Error("an ext4 was mounted as xfs")
	}
	wantMounts(t, e, target, 0)
	wantAbsent(t, target)
}

func testLifecycle(t *testing.T, e Env) {
	for fsType, size := range Sizes {
		t.Run(fsType, func(t *testing.T) {
			device := e.NewDevice(t, size)
			filesystem := mount.Filesystem{Type: fsType}
			staged := filepath.Join(t.TempDir(), "plugins", "staged dir")
			published := filepath.Join(t.TempDir(), "pods", "published")

			noError(t, e.Mounter.Format(t.Context(), device, filesystem, true))
			wantContent(t, e, device, mount.Content{Type: fsType})
			noError(t, e.Mounter.Format(t.Context(), device, filesystem, false)) // over what is there
			wantContent(t, e, device, mount.Content{Type: fsType})

			unmountLater(t, e, staged)
			for range 2 {
				noError(t, e.Mounter.Mount(t.Context(), device, staged, filesystem))
				m := wantMounts(t, e, staged, 1)[0]
				if m.Device != device || m.Type != fsType || m.ReadOnly {
					t.Errorf("mounted on %s: %+v", staged, m)
				}
			}
			wantError(t, e.Mounter.Format(t.Context(), device, filesystem, false), mount.ErrBusy)

			usage, err := e.Mounter.Usage(t.Context(), staged)
			noError(t, err)
			if usage.TotalBytes < size/3 || usage.TotalBytes > size || usage.AvailableBytes > usage.TotalBytes {
				t.Errorf("usage of a device of %d bytes: %+v", size, usage)
			}
			if hasInodes := fsType != "btrfs"; (usage.TotalInodes > 0) != hasInodes {
				t.Errorf("inodes of %s: %+v", fsType, usage)
			}

			unmountLater(t, e, published)
			for range 2 {
				noError(t, e.Mounter.Bind(t.Context(), staged, published, false))
				m := wantMounts(t, e, published, 1)[0]
				if m.Device != device || m.Type != fsType || m.ReadOnly {
					t.Errorf("mounted on %s: %+v", published, m)
				}
			}
			bound, err := e.Mounter.Usage(t.Context(), published)
			noError(t, err)
			if bound.TotalBytes != usage.TotalBytes {
				t.Errorf("usage of the bind mount %+v, of the mount %+v", bound, usage)
			}

			for range 2 {
				noError(t, e.Mounter.Unmount(t.Context(), published))
				wantMounts(t, e, published, 0)
				wantAbsent(t, published)
			}
			wantMounts(t, e, staged, 1)
			noError(t, e.Mounter.Unmount(t.Context(), staged))
			wantAbsent(t, staged)
			wantContent(t, e, device, mount.Content{Type: fsType})
		})
	}
}

func testGrow(t *testing.T, e Env) {
	for fsType, size := range Sizes {
		if slices.Contains(e.CannotGrow, fsType) {
			continue
		}
		t.Run(fsType, func(t *testing.T) {
			device, target := formatted(t, e, fsType)
			noError(t, e.Mounter.Mount(t.Context(), device, target, mount.Filesystem{Type: fsType}))
			before, err := e.Mounter.Usage(t.Context(), target)
			noError(t, err)
			noError(t, e.Mounter.Grow(t.Context(), device, target)) // nothing to do
			e.GrowDevice(t, device, 3*size)
			for range 2 {
				noError(t, e.Mounter.Grow(t.Context(), device, target))
				after, err := e.Mounter.Usage(t.Context(), target)
				noError(t, err)
				if grown := after.TotalBytes - before.TotalBytes; grown < size*3/2 || after.TotalBytes > 3*size {
					t.Errorf("device grew from %d to %d bytes, filesystem by %d", size, 3*size, grown)
				}
			}
		})
	}
}

func testReadOnly(t *testing.T, e Env) {
	device, staged := formatted(t, e, "ext4")
	published := filepath.Join(t.TempDir(), "published")
	noError(t, e.Mounter.Mount(t.Context(), device, staged, mount.Filesystem{Type: "ext4"}))
	unmountLater(t, e, published)
	for range 2 {
		noError(t, e.Mounter.Bind(t.Context(), staged, published, true))
		if m := wantMounts(t, e, published, 1)[0]; !m.ReadOnly {
			t.Errorf("bound read-only: %+v", m)
		}
	}
	wantError(t, e.Mounter.Bind(t.Context(), staged, published, false), mount.ErrBusy)
	wantError(t, e.Mounter.Grow(t.Context(), device, published), mount.ErrReadOnly)
	if m := wantMounts(t, e, staged, 1)[0]; m.ReadOnly {
		t.Errorf("the source of a read-only bind mount: %+v", m)
	}
	noError(t, e.Mounter.Unmount(t.Context(), published))

	// What was bound writable, by a plugin that was killed before the second step, say, becomes read-only.
	noError(t, e.Mounter.Bind(t.Context(), staged, published, false))
	noError(t, e.Mounter.Bind(t.Context(), staged, published, true))
	if m := wantMounts(t, e, published, 1)[0]; !m.ReadOnly {
		t.Errorf("made read-only: %+v", m)
	}
	noError(t, e.Mounter.Unmount(t.Context(), published))
	noError(t, e.Mounter.Unmount(t.Context(), staged))

	// A filesystem that is mounted read-only is so wherever it is bound.
	noError(t, e.Mounter.Mount(t.Context(), device, staged, mount.Filesystem{Type: "ext4", Options: []string{"ro"}}))
	for range 2 {
		noError(t, e.Mounter.Bind(t.Context(), staged, published, false))
	}
	for _, target := range []string{staged, published} {
		if m := wantMounts(t, e, target, 1)[0]; !m.ReadOnly {
			t.Errorf("mounted read-only: %+v", m)
		}
		wantError(t, e.Mounter.Grow(t.Context(), device, target), mount.ErrReadOnly)
	}
}

func testOptions(t *testing.T, e Env) {
	device, target := formatted(t, e, "ext4")
	filesystem := mount.Filesystem{Type: "ext4", Options: []string{"noatime", "nosuid,discard"}}
	noError(t, e.Mounter.Mount(t.Context(), device, target, filesystem))
	m := wantMounts(t, e, target, 1)[0]
	flat := strings.Split(strings.Join(m.Options, ","), ",")
	for _, option := range []string{"noatime", "nosuid", "discard"} {
		if !slices.Contains(flat, option) {
			t.Errorf("option %s is missing: %q", option, m.Options)
		}
	}
}

func testOccupied(t *testing.T, e Env) {
	device, target := formatted(t, e, "ext4")
	other, source := formatted(t, e, "ext4")
	filesystem := mount.Filesystem{Type: "ext4"}
	noError(t, e.Mounter.Mount(t.Context(), device, target, filesystem))
	noError(t, e.Mounter.Mount(t.Context(), other, source, filesystem))
	wantError(t, e.Mounter.Mount(t.Context(), other, target, filesystem), mount.ErrBusy)
	wantError(t, e.Mounter.Bind(t.Context(), source, target, false), mount.ErrBusy)
	wantError(t, e.Mounter.Bind(t.Context(), other, target, false), mount.ErrBusy)
	wantError(t, e.Mounter.Grow(t.Context(), other, target), mount.ErrNotMounted)
	if m := wantMounts(t, e, target, 1)[0]; m.Device != device {
		t.Errorf("mounted now: %+v", m)
	}
	// Data in a directory on which nothing is mounted is not removed.
	full := t.TempDir()
	file := filepath.Join(full, "file")
	noError(t, os.WriteFile(file, []byte("data"), 0o600))
	for _, path := range []string{full, file} {
		if err := e.Mounter.Unmount(t.Context(), path); err == nil {
			t.Errorf("Unmount removed %s", path)
		}
	}
	if text, err := os.ReadFile(file); err != nil || string(text) != "data" {
		t.Errorf("file after Unmount: %q, %v", text, err)
	}
}

func testBlock(t *testing.T, e Env) {
	const size = 16 << 20
	device := e.NewDevice(t, size)
	target := filepath.Join(t.TempDir(), "pods", "volume")
	unmountLater(t, e, target)
	for _, readOnly := range []bool{false, true} {
		for range 2 {
			noError(t, e.Mounter.Bind(t.Context(), device, target, readOnly))
			m := wantMounts(t, e, target, 1)[0]
			if m.Device != device || m.Major == 0 || m.ReadOnly != readOnly {
				t.Errorf("bound to %s: %+v", target, m)
			}
			usage, err := e.Mounter.Usage(t.Context(), target)
			noError(t, err)
			if want := (mount.Usage{TotalBytes: size}); usage != want {
				t.Errorf("usage %+v, want %+v", usage, want)
			}
		}
		if info, err := os.Lstat(target); err != nil || info.IsDir() {
			t.Errorf("target of a device: %v, %v", info, err)
		}
		for range 2 {
			noError(t, e.Mounter.Unmount(t.Context(), target))
			wantAbsent(t, target)
		}
	}
}

func testNotMounted(t *testing.T, e Env) {
	device := e.NewDevice(t, Sizes["ext4"])
	dir := t.TempDir()
	for _, target := range []string{dir, filepath.Join(dir, "absent"), filepath.Join(dir, "absent", "below")} {
		wantMounts(t, e, target, 0)
		_, err := e.Mounter.Usage(t.Context(), target)
		wantError(t, err, mount.ErrNotMounted)
		wantError(t, e.Mounter.Grow(t.Context(), device, target), mount.ErrNotMounted)
		noError(t, e.Mounter.Unmount(t.Context(), target))
		wantAbsent(t, target)
	}
	err := e.Mounter.Bind(t.Context(), filepath.Join(dir, "absent"), filepath.Join(t.TempDir(), "target"), false)
	wantError(t, err, fs.ErrNotExist)
}

func testCancelled(t *testing.T, e Env) {
	device, target := formatted(t, e, "ext4")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	wantError(t, e.Mounter.Mount(ctx, device, target, mount.Filesystem{Type: "ext4"}), context.Canceled)
	wantMounts(t, e, target, 0)
	_, err := e.Mounter.Probe(ctx, device)
	wantError(t, err, context.Canceled)
	noError(t, e.Mounter.Mount(t.Context(), device, target, mount.Filesystem{Type: "ext4"}))
}

func testConcurrency(t *testing.T, e Env) {
	const volumes = 6
	dir := t.TempDir()
	var wg sync.WaitGroup
	for i := range volumes {
		device := e.NewDevice(t, Sizes["ext4"])
		staged := filepath.Join(dir, fmt.Sprintf("staged-%d", i))
		published := filepath.Join(dir, fmt.Sprintf("published-%d", i))
		unmountLater(t, e, staged)
		unmountLater(t, e, published)
		wg.Go(func() {
			filesystem := mount.Filesystem{Type: "ext4"}
			for _, err := range []error{
				e.Mounter.Format(t.Context(), device, filesystem, true),
				e.Mounter.Mount(t.Context(), device, staged, filesystem),
				e.Mounter.Bind(t.Context(), staged, published, i%2 == 0),
			} {
				if err != nil {
					t.Errorf("volume %d: %v", i, err)
				}
			}
			mounts, err := e.Mounter.Mounts(t.Context(), published)
			if err != nil || len(mounts) != 1 || mounts[0].Device != device || mounts[0].ReadOnly != (i%2 == 0) {
				t.Errorf("volume %d: mounts %+v, %v", i, mounts, err)
			}
			for _, target := range []string{published, staged} {
				if err := e.Mounter.Unmount(t.Context(), target); err != nil {
					t.Errorf("volume %d: %v", i, err)
				}
			}
		})
	}
	wg.Wait()
}

// formatted returns a device with a filesystem, and a target that is unmounted when the test ends.
func formatted(t *testing.T, e Env, fsType string) (device, target string) {
	t.Helper()
	device = e.NewDevice(t, Sizes[fsType])
	noError(t, e.Mounter.Format(t.Context(), device, mount.Filesystem{Type: fsType}, true))
	target = filepath.Join(t.TempDir(), "staged")
	unmountLater(t, e, target)
	return device, target
}

func unmountLater(t *testing.T, e Env, target string) {
	t.Cleanup(func() {
		if err := e.Mounter.Unmount(context.Background(), target); err != nil {
			t.Errorf("cleanup: %v", err)
		}
	})
}

func wantContent(t *testing.T, e Env, device string, want mount.Content) {
	t.Helper()
	got, err := e.Mounter.Probe(t.Context(), device)
	noError(t, err)
	if got != want {
		t.Errorf("%s holds %+v, want %+v", device, got, want)
	}
}

func wantMounts(t *testing.T, e Env, target string, want int) []mount.Mount {
	t.Helper()
	mounts, err := e.Mounter.Mounts(t.Context(), target)
	noError(t, err)
	if len(mounts) != want {
		t.Fatalf("%d mounts on %s, want %d: %+v", len(mounts), target, want, mounts)
	}
	return mounts
}

func wantAbsent(t *testing.T, path string) {
	t.Helper()
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s is still there: %v", path, err)
	}
}

func wantError(t *testing.T, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("error %v, want %v", err, want)
	}
}

func noError(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
