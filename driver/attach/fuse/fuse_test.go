package fuse_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/qcow-csi/qcow-csi/driver/attach"
	"github.com/qcow-csi/qcow-csi/driver/attach/attachtest"
	"github.com/qcow-csi/qcow-csi/driver/attach/fuse"
	"github.com/qcow-csi/qcow-csi/nbdexport"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// owner is not the one of other runs on the same node.
var owner = fmt.Sprintf("fuse_test-%d", os.Getpid())

func newAttacher(owner string) attach.Attacher { return fuse.New(fuse.Options{Owner: owner}) }

func TestMain(m *testing.M) { os.Exit(attachtest.Main(m, newAttacher)) }

// needsKernel skips the test where the kernel cannot do this.
func needsKernel(t *testing.T) {
	t.Helper()
	require.Root(t)
	err := newAttacher(owner).Probe(t.Context())
	require.Feature(t, err == nil, "needs FUSE and loop devices")
}

func TestConformance(t *testing.T) {
	needsKernel(t)
	attachtest.Run(t, attachtest.Subject{New: newAttacher, Devices: true, SeesOpen: true})
}

// attachOne attaches a volume for the length of the test.
func attachOne(t *testing.T, preferred uint32) (*attachtest.Backend, attach.Device) {
	t.Helper()
	needsKernel(t)
	a := newAttacher(owner)
	b := attachtest.NewBackend(t, 4<<20)
	b.Describe(nbdexport.Info{PreferredBlock: preferred})
	d, err := a.Attach(t.Context(), attach.Request{VolumeID: "v", Backend: b})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(a.Detach(context.Background(), "v"), a.Close()); err != nil {
			t.Error(err)
		}
	})
	return b, d
}

func TestMountIsNowhere(t *testing.T) {
	_, d := attachOne(t, 0)
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, " - fuse qcow-csi ") {
			t.Errorf("in the mount table: %s", line)
		}
	}
	backing, err := os.ReadFile("/sys/block/" + strings.TrimPrefix(d.Path, "/dev/") + "/loop/backing_file")
	if err != nil || string(backing) != "/qcow-csi:"+owner+":v\n" {
		t.Errorf("the file of %s is %q, %v", d.Path, backing, err)
	}
}

func TestNoSpaceIsNoSpace(t *testing.T) {
	b, d := attachOne(t, 0)
	b.Fail(func(op attachtest.Op, _ int64) error {
		if op == attachtest.Write {
			return syscall.ENOSPC
		}
		return nil
	})
	fd, err := unix.Open(d.Path, unix.O_RDWR|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Pwrite(fd, attachtest.Aligned(4096), 0); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("write: %v, want %v", err, syscall.ENOSPC)
	}
	b.Fail(nil)
	if err := unix.Close(fd); err != nil {
		t.Error(err)
	}
}

// TestDirectIO looks at what the design rests on: the page cache of the file stays out of it, and discards are as
// coarse as the backend likes them.
func TestDirectIO(t *testing.T) {
	_, d := attachOne(t, 2<<20)
	dir := "/sys/block/" + strings.TrimPrefix(d.Path, "/dev/")
	for file, want := range map[string]string{
		"/loop/dio":                  "1",
		"/loop/autoclear":            "0",
		"/loop/partscan":             "0",
		"/queue/discard_granularity": "2097152",
		"/queue/logical_block_size":  "512",
		"/queue/write_cache":         "write back",
	} {
		got, err := os.ReadFile(dir + file)
		if strings.TrimSpace(string(got)) != want || err != nil {
			t.Errorf("%s is %q (%v), want %s", file, got, err, want)
		}
	}
}
