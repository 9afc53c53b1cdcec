package vm_test

import (
	"testing"

	"github.com/qcow-csi/qcow-csi/test/vm"
	"github.com/qcow-csi/qcow-csi/test/vm/handover"
)

// TestAttachNBD runs the tests of attach/nbd on a kernel with NBD.
func TestAttachNBD(t *testing.T) {
	t.Parallel()
	vm.Run(t, vm.Guest{Package: "driver/attach/nbd", Modules: []string{"nbd"}})
}

// TestAttachFUSE runs on the guest's kernel what attach/fuse needs most of a kernel; its own tests run on this one.
func TestAttachFUSE(t *testing.T) {
	t.Parallel()
	vm.Run(t, vm.Guest{
		Package: "driver/attach/fuse",
		Args:    []string{"-test.run=^TestConformance$/^(probe|resize|long_requests|discard_and_write_zeroes|a_killed_process.*)$|^Test[^C]"},
		Modules: []string{"fuse", "loop"},
	})
}

// TestVolumes takes volumes through their lives on a kernel with NBD, on every filesystem.
func TestVolumes(t *testing.T) {
	t.Parallel()
	vm.Run(t, vm.Guest{
		Package: "test/vm/volume",
		Args:    []string{"-attacher=nbd", "-directory=" + handover.DiskDir},
		Modules: []string{"nbd"},
		Memory:  1024,
		Disk:    2 << 30,
	})
}

// TestDemo runs the demo where it has everything: the kernel's NBD client, and the right to grow a mounted ext4.
func TestDemo(t *testing.T) {
	t.Parallel()
	vm.Run(t, vm.Guest{
		Package: "test/demo",
		Args:    []string{"-test.run=^TestInGuest$"},
		Program: "cmd/qcow-csi",
		Modules: []string{"nbd"},
		Memory:  1024,
		Disk:    4 << 30,
	})
}
