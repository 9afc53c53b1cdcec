package pool

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow/repair"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// journalEnv holds the directories of a pool and of its journals, for the process that TestJournalOutlivesProcess kills.
const journalEnv = "QCOW_CSI_TEST_JOURNAL"

func withJournals(t testing.TB, dir string) Options {
	t.Helper()
	journals, err := storage.OpenJournals(dir)
	if err != nil {
		t.Fatal(err)
	}
	return Options{Journals: journals}
}

// TestJournalOutlivesProcess kills a process that has written to a volume, and not flushed.
func TestJournalOutlivesProcess(t *testing.T) {
	if spec := os.Getenv(journalEnv); spec != "" {
		writeAndDie(t, spec)
	}
	dir, v := oldPool(t)
	journals := t.TempDir()
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestJournalOutlivesProcess$")
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%s:%s:%s", journalEnv, dir, journals, v.ID))
	if out, err := cmd.CombinedOutput(); err == nil || cmd.ProcessState.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		t.Fatalf("%v: %s", err, out)
	}
	if left := tree(t, journals); len(left) != 1 {
		t.Fatalf("journals: %v", left)
	}

	p, err := Open(t.Context(), dir, withJournals(t, journals))
	if err != nil {
		t.Fatal(err)
	}
	h, err := p.Acquire(t.Context(), v.ID, false)
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, mebibyte)
	if _, err := h.Image().ReadAt(got, mebibyte); err != nil || !bytes.Equal(got, bytes.Repeat([]byte{7}, mebibyte)) {
		t.Errorf("what was written is gone: %v", err)
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	if left := tree(t, journals); len(left) > 0 {
		t.Errorf("journals after the image was closed: %v", left)
	}
	// The reserve of the process is all that is lost.
	f := openHead(t, dir, v)
	r, err := repair.Run(t.Context(), f, repair.Options{Mode: repair.Leaks})
	if err := errors.Join(err, f.Close()); err != nil {
		t.Errorf("%+v, %v", r, err)
	}
}

func openHead(t *testing.T, dir string, v Volume) *storage.OSFile {
	t.Helper()
	f, err := storage.Open(filepath.Join(dir, "volumes", v.ID, "head.qcow2"), storage.ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func writeAndDie(t *testing.T, spec string) {
	parts := filepath.SplitList(spec)
	p, err := Open(context.Background(), parts[0], withJournals(t, parts[1]))
	if err != nil {
		t.Fatal(err)
	}
	h, err := p.Acquire(context.Background(), parts[2], false)
	if err != nil {
		t.Fatal(err)
	}
	for off := int64(mebibyte); off < 2*mebibyte; off += 4096 {
		if _, err := h.Image().WriteAt(bytes.Repeat([]byte{7}, 4096), off); err != nil {
			t.Fatal(err)
		}
	}
	_ = syscall.Kill(os.Getpid(), syscall.SIGKILL) // never fails
	select {}
}

// TestJournalOfDeletedVolume has a volume that is deleted after its process was killed.
func TestJournalOfDeletedVolume(t *testing.T) {
	dir, v := oldPool(t)
	journals := t.TempDir()
	options := withJournals(t, journals)
	f := openHead(t, dir, v)
	j, err := options.Journals.Open(f)
	if err != nil {
		t.Fatal(err)
	}
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	p, err := Open(t.Context(), dir, options)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Delete(t.Context(), v.ID); err != nil {
		t.Error(err)
	}
	if left := tree(t, journals); len(left) > 0 {
		t.Errorf("journals of a deleted volume: %v", left)
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
}
