package fuse

import (
	"testing"

	"github.com/qcow-csi/qcow-csi/driver/attach"
	"github.com/qcow-csi/qcow-csi/driver/attach/attachtest"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// TestAborted has somebody else abort the FUSE connection of a device: it can be detached, and attached again.
func TestAborted(t *testing.T) {
	require.Root(t)
	a := New(Options{Owner: "abort_test"})
	err := a.Probe(t.Context())
	require.Feature(t, err == nil, "needs FUSE and loop devices")
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
	if err := a.Close(); err != nil {
		t.Error(err)
	}
}
