package attachfake_test

import (
	"errors"
	"testing"

	"github.com/qcow-csi/qcow-csi/driver/attach"
	"github.com/qcow-csi/qcow-csi/driver/attach/attachfake"
	"github.com/qcow-csi/qcow-csi/driver/attach/attachtest"
)

func TestConformance(t *testing.T) {
	var kernel attachfake.Kernel
	attachtest.Run(t, attachtest.Subject{
		New: func(owner string) attach.Attacher { return kernel.Attacher(owner) },
	})
}

// TestKnobs looks at what the fake has beyond the suite.
func TestKnobs(t *testing.T) {
	var kernel attachfake.Kernel
	a := kernel.Attacher("o")
	b := attachtest.NewBackend(t, 1<<20)
	d, err := a.Attach(t.Context(), attach.Request{VolumeID: "v", Backend: b})
	if err != nil {
		t.Fatal(err)
	}
	if got, ok := kernel.Backend(d.Path); got != b || !ok {
		t.Errorf("behind %s is %v, %v", d.Path, got, ok)
	}
	if _, ok := kernel.Backend("/dev/sda"); ok {
		t.Error("there is something behind /dev/sda")
	}
	if kernel.SetInUse("o", "w", true) || !kernel.SetInUse("o", "v", true) {
		t.Error("SetInUse knows volume w, or does not know v")
	}
	if err := a.Detach(t.Context(), "v"); !errors.Is(err, attach.ErrBusy) {
		t.Errorf("detach in use: %v, want %v", err, attach.ErrBusy)
	}
	kernel.SetInUse("o", "v", false)
	injected := errors.New("injected")
	failing := kernel.Attacher("o")
	failing.Fail = func(operation, volumeID string) error {
		if operation == "detach" && volumeID == "v" {
			return injected
		}
		return nil
	}
	if err := failing.Detach(t.Context(), "v"); !errors.Is(err, injected) {
		t.Errorf("detach: %v, want %v", err, injected)
	}
	if err := a.Detach(t.Context(), "v"); err != nil {
		t.Errorf("detach: %v", err)
	}
}
