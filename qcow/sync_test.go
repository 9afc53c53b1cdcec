package qcow

import (
	"bytes"
	"context"
	"errors"
	"syscall"
	"testing"
	"testing/synctest"

	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// A sync that began before the call may not cover what the caller wrote; one that begins after it serves everybody who waits.
func TestGroupSync(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newGroupSync()
		calls, proceed := 0, make(chan struct{})
		do := func() {
			if err := s.do(func() error { calls++; <-proceed; return nil }); err != nil {
				t.Error(err)
			}
		}
		first := background(do)
		if first() {
			t.Fatal("the first caller did not wait for its sync")
		}
		second, third, fourth := background(do), background(do), background(do)
		proceed <- struct{}{}
		if !first() || second() || third() || fourth() {
			t.Errorf("after one sync the callers have returned: %v, %v, %v, %v", first(), second(), third(), fourth())
		}
		proceed <- struct{}{}
		if !second() || !third() || !fourth() || calls != 2 {
			t.Errorf("after the second sync the callers have returned: %v, %v, %v; %d syncs", second(), third(), fourth(), calls)
		}
		last := background(do)
		proceed <- struct{}{}
		if !last() || calls != 3 {
			t.Errorf("a caller that comes when nothing is under way has returned: %v; %d syncs", last(), calls)
		}
	})
}

func TestGroupSyncError(t *testing.T) {
	s := newGroupSync()
	for _, want := range []error{syscall.EIO, nil} {
		if err := s.do(func() error { return want }); !errors.Is(err, want) {
			t.Errorf("%v; want %v", err, want)
		}
	}
}

// stuckSync is a file whose syncs wait for their result.
type stuckSync struct {
	storage.File

	results chan error
}

func (f *stuckSync) Sync() error { return <-f.results }

// Whoever shares a sync that fails, fails.
func TestSharedSyncFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mem := storage.NewMemory()
		if err := Create(mem, CreateOptions{Size: 1 << 20}); err != nil {
			t.Fatal(err)
		}
		f := &stuckSync{File: mem, results: make(chan error)}
		img, err := Open(f, Options{})
		if err != nil {
			t.Fatal(err)
		}
		var errs [3]error
		var ended [3]func() bool
		for i := range errs {
			ended[i] = background(func() { errs[i] = img.Flush() })
		}
		f.results <- nil // the first one's
		if !ended[0]() || errs[0] != nil || ended[1]() || ended[2]() {
			t.Fatalf("the first flush: %v; others ended: %v, %v", errs[0], ended[1](), ended[2]())
		}
		f.results <- syscall.EIO
		if !ended[1]() || !ended[2]() || !errors.Is(errs[1], syscall.EIO) || !errors.Is(errs[2], syscall.EIO) {
			t.Errorf("flushes that shared a failed sync: %v, %v", errs[1], errs[2])
		}
		if err := img.Close(); !errors.Is(err, syscall.EIO) {
			t.Errorf("close: %v", err)
		}
	})
}

// After a failed sync every change fails, although the file would take it, and nothing is written; reads go on.
func TestPoison(t *testing.T) {
	const size = 1 << 20
	mem := storage.NewMemory()
	if err := Create(mem, CreateOptions{Size: size, ClusterSize: 4096}); err != nil {
		t.Fatal(err)
	}
	f := &stuckSync{File: mem, results: make(chan error, 1)}
	img, err := Open(f, Options{})
	if err != nil {
		t.Fatal(err)
	}
	want := bytes.Repeat([]byte{1}, 10000)
	f.results <- nil // of the reserve
	if _, err := img.WriteAt(want, 100); err != nil {
		t.Fatal(err)
	}
	before := mem.Bytes()
	f.results <- syscall.EIO
	if err := img.Flush(); !errors.Is(err, syscall.EIO) {
		t.Fatalf("flush: %v", err)
	}
	close(f.results) // from now on every sync succeeds
	_, inPlace := img.WriteAt([]byte{2}, 100)
	_, allocating := img.WriteAt([]byte{2}, size/2)
	for what, err := range map[string]error{
		"write":            inPlace,
		"allocating write": allocating,
		"discard":          img.Discard(0, size),
		"zeroes":           img.WriteZeroes(0, size, false),
		"flush":            img.Flush(),
		"resize":           img.Resize(context.Background(), 2*size),
	} {
		if !errors.Is(err, syscall.EIO) {
			t.Errorf("%s after a failed sync: %v", what, err)
		}
	}
	got := make([]byte, len(want))
	if _, err := img.ReadAt(got, 100); err != nil || !bytes.Equal(got, want) {
		t.Errorf("read after a failed sync: %v", err)
	}
	if err := img.Close(); !errors.Is(err, syscall.EIO) {
		t.Errorf("close after a failed sync: %v", err)
	}
	if !bytes.Equal(mem.Bytes(), before) {
		t.Error("the file was changed after a failed sync")
	}
}
