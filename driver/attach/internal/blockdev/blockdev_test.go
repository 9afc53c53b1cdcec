package blockdev_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/qcow-csi/qcow-csi/driver/attach"
	"github.com/qcow-csi/qcow-csi/driver/attach/internal/blockdev"
)

func TestOpenRefusesOtherFiles(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{file, "/dev/null", t.TempDir(), file + "x"} {
		if d, err := blockdev.Open(path); err == nil {
			t.Errorf("opened %s as a block device", path)
			_ = d.Close()
		}
	}
}

func TestAwait(t *testing.T) {
	calls := 0
	err := blockdev.Await(t.Context(), "the third call", func() (bool, error) {
		calls++
		return calls == 3, nil
	})
	if err != nil || calls != 3 {
		t.Errorf("%d calls, %v", calls, err)
	}
	broken := errors.New("broken")
	if err := blockdev.Await(t.Context(), "nothing", func() (bool, error) { return false, broken }); !errors.Is(err, broken) {
		t.Errorf("%v, want %v", err, broken)
	}
	ctx, cancel := context.WithTimeoutCause(t.Context(), time.Millisecond, attach.ErrBusy)
	defer cancel()
	if err := blockdev.Await(ctx, "what never comes", func() (bool, error) { return false, nil }); !errors.Is(err, attach.ErrBusy) {
		t.Errorf("%v, want %v", err, attach.ErrBusy)
	}
}

func TestAwaitNode(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	for _, path := range []string{filepath.Join(t.TempDir(), "nbd0"), "/dev/null"} { // absent, or something else
		if err := blockdev.AwaitNode(ctx, path, unix.Mkdev(1, 3)); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s: %v, want %v", path, err, context.DeadlineExceeded)
		}
	}
}
