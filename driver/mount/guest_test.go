//go:build !vmguest

package mount_test

import (
	"testing"

	"github.com/qcow-csi/qcow-csi/test/vm"
)

// TestInGuest runs on another kernel, as a root that lacks nothing, what the Mounter does with mounted filesystems.
func TestInGuest(t *testing.T) {
	vm.Run(t, vm.Guest{
		Package: "driver/mount",
		Args:    []string{"-test.run=^(TestConformance|TestGrowKeepsData)$"},
		Modules: []string{"loop", "fuse"},
		Memory:  1024,
	})
}
