package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/qcow-csi/qcow-csi/test/require"
)

func TestDemo(t *testing.T) {
	require.Root(t)
	require.Tool(t, "mkfs.ext4", "mkfs.xfs", "blkid", "qemu-img")
	program := filepath.Join(t.TempDir(), "qcow-csi")
	build := exec.CommandContext(t.Context(), "go", "build", "-o", program, "../../cmd/qcow-csi")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	t.Setenv("TMPDIR", t.TempDir())
	if err := run(t.Context(), program, "auto"); err != nil {
		t.Error(err)
	}
	wantNothingIn(t, os.Getenv("TMPDIR"))
}

func TestDemoFails(t *testing.T) {
	require.Root(t)
	t.Setenv("TMPDIR", t.TempDir())
	for _, program := range []string{"/nonexistent", "/bin/false"} {
		if err := run(t.Context(), program, "auto"); err == nil {
			t.Errorf("it works with %s", program)
		}
		wantNothingIn(t, os.Getenv("TMPDIR"))
	}
}

func wantNothingIn(t *testing.T, dir string) {
	t.Helper()
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}
