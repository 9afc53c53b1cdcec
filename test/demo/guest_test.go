//go:build vmguest

package main

import (
	"os"
	"testing"

	"github.com/qcow-csi/qcow-csi/test/vm/handover"
)

func TestInGuest(t *testing.T) {
	if fs, err := growable(); fs != "ext4" {
		t.Errorf("a guest's root may do everything, but the demo would take %q (%v)", fs, err)
	}
	t.Setenv("TMPDIR", handover.DiskDir)
	if err := run(t.Context(), os.Getenv(handover.ProgramVariable), "nbd"); err != nil {
		t.Error(err)
	}
}
