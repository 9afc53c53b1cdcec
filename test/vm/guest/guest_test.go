//go:build vmguest

package guest

import (
	"errors"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/qcow-csi/qcow-csi/test/vm/handover"
)

func TestFails(t *testing.T) { t.Error("as it should") }

func TestHangs(*testing.T) { time.Sleep(time.Hour) }

// TestHostIsSafe looks for places of the host that a guest could write to.
func TestHostIsSafe(t *testing.T) {
	for _, dir := range []string{"/", "/root", "/var/tmp", "/usr", "/etc", "/work"} {
		f, err := os.CreateTemp(dir, "")
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if !errors.Is(err, syscall.EROFS) {
			t.Errorf("%s: %v, want %v", dir, err, syscall.EROFS)
		}
		if err == nil {
			_ = os.Remove(f.Name())
		}
	}
	for _, dir := range []string{os.TempDir(), "/run", handover.DiskDir} {
		f, err := os.CreateTemp(dir, "")
		if err != nil {
			t.Error(err)
			continue
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}
	if os.Getpid() == 1 {
		t.Error("the test is process 1")
	}
}
