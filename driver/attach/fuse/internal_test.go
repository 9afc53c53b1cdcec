package fuse

import (
	"fmt"
	"os"
	"testing"

	"github.com/qcow-csi/qcow-csi/driver/attach"
	"github.com/qcow-csi/qcow-csi/driver/attach/attachtest"
	"github.com/qcow-csi/qcow-csi/driver/attach/internal/blockdev"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// needsKernel returns an attacher, on a kernel that can do what it needs.
func needsKernel(t *testing.T) *Attacher {
	t.Helper()
	require.Root(t)
	a := New(Options{Owner: fmt.Sprintf("internal_test-%d", os.Getpid())})
	err := a.Probe(t.Context())
	require.Feature(t, err == nil, "needs FUSE and loop devices")
	t.Cleanup(func() {
		if err := a.Close(); err != nil {
			t.Error(err)
		}
	})
	return a
}

// holdFreeLoop claims a loop device that has no file.
func holdFreeLoop(t *testing.T) (number int, held *blockdev.Device) {
	t.Helper()
	for {
		number, err := freeLoop()
		if err != nil {
			t.Fatal(err)
		}
		held, err := blockdev.Claim(t.Context(), loopPath(number))
		if err != nil {
			t.Fatal(err)
		}
		if again, err := freeLoop(); err == nil && again == number {
			return number, held
		}
		// Others look for free devices, too.
		if err := held.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestLoopHeldByOthers: a loop device without a file is not free when somebody holds it.
func TestLoopHeldByOthers(t *testing.T) {
	a := needsKernel(t)
	number, held := holdFreeLoop(t)
	d, err := a.Attach(t.Context(), attach.Request{VolumeID: "v", Backend: attachtest.NewBackend(t, 1<<20)})
	if err != nil {
		t.Errorf("attach: %v", err)
	}
	if d.Path == loopPath(number) {
		t.Errorf("attached to %s, which is somebody's", d.Path)
	}
	if err := a.Detach(t.Context(), "v"); err != nil {
		t.Errorf("detach: %v", err)
	}
	if err := held.Close(); err != nil {
		t.Error(err)
	}
}

// TestAborted has somebody else abort the FUSE connection of a device: it can be detached, and attached again.
func TestAborted(t *testing.T) {
	a := needsKernel(t)
	for range 2 {
		b := attachtest.NewBackend(t, 1<<20)
		if _, err := a.Attach(t.Context(), attach.Request{VolumeID: "v", Backend: b}); err != nil {
			t.Fatal(err)
		}
		d, _ := a.devices.Get("v")
		if err := abort(d.export.number); err != nil {
			t.Fatal(err)
		}
		<-d.export.ended
		b.Retire()
		if got, err := a.List(t.Context()); len(got) != 1 || got[0].Served || err != nil {
			t.Errorf("listed %+v, %v; want a device that is not served", got, err)
		}
		if err := a.Detach(t.Context(), "v"); err != nil {
			t.Errorf("detach: %v", err)
		}
		if err := abort(d.export.number); err != nil {
			t.Errorf("abort what is gone: %v", err)
		}
	}
}
