package storage

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// newOSFile returns a new file, which the test closes.
func newOSFile(t *testing.T) (f *OSFile, path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "file")
	f, err := Create(path)
	if err != nil {
		t.Fatal(err)
	}
	return f, path
}

func closeFile(t *testing.T, f File) {
	t.Helper()
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

func mustDo(t *testing.T, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

func mustWrite(t *testing.T, f File, p []byte, off int64) {
	t.Helper()
	if n, err := f.WriteAt(p, off); err != nil || n != len(p) {
		t.Fatalf("write %d bytes at %d: %d, %v", len(p), off, n, err)
	}
}

// expectContent expects that f holds want and ends there.
func expectContent(t *testing.T, f File, want []byte) {
	t.Helper()
	size, err := f.Size()
	if err != nil || size != int64(len(want)) {
		t.Fatalf("size %d, %v; want %d", size, err, len(want))
	}
	got := make([]byte, len(want)+1)
	if n, err := f.ReadAt(got, 0); n != len(want) || !errors.Is(err, io.EOF) {
		t.Fatalf("read past the end: %d, %v", n, err)
	}
	if !bytes.Equal(got[:len(want)], want) {
		t.Fatalf("content is % x, want % x", got[:min(len(want), 64)], want[:min(len(want), 64)])
	}
}

func TestPunchHoleGivesSpaceBack(t *testing.T) {
	const size = 1 << 20
	f, _ := newOSFile(t)
	defer closeFile(t, f)
	mustWrite(t, f, bytes.Repeat([]byte{1}, size), 0)
	mustDo(t, f.Sync())
	full, err := f.AllocatedBytes()
	if err != nil || full < size {
		t.Fatalf("a file of %d bytes takes %d, %v", size, full, err)
	}
	mustDo(t, f.PunchHole(size/4, size/2), f.Sync())
	rest, err := f.AllocatedBytes()
	if err != nil || rest > full-size/2+64<<10 { // some file systems give large blocks back only
		t.Errorf("after a punch of %d bytes the file takes %d of %d, %v", size/2, rest, full, err)
	}
	want := bytes.Repeat([]byte{1}, size)
	clear(want[size/4:][:size/2])
	expectContent(t, f, want)
}

// A file system without holes gets zeroes.
func TestWriteZeroes(t *testing.T) {
	const size = 3<<20 + 5
	f := NewMemoryFrom(bytes.Repeat([]byte{1}, size))
	mustDo(t, writeZeroes(f, 1, size-2))
	want := make([]byte, size)
	want[0], want[size-1] = 1, 1
	expectContent(t, f, want)
}

func TestOpenRefuses(t *testing.T) {
	dir := t.TempDir()
	target, link, fifo := filepath.Join(dir, "file"), filepath.Join(dir, "link"), filepath.Join(dir, "fifo")
	mustDo(t, os.WriteFile(target, []byte("x"), 0o600), os.Symlink(target, link), unix.Mkfifo(fifo, 0o600))
	for _, mode := range []Mode{ReadOnly, ReadWrite} {
		for path, want := range map[string]error{
			link:                          unix.ELOOP,
			fifo:                          nil, // no system call fails
			dir:                           nil, // read-only none does
			filepath.Join(dir, "missing"): fs.ErrNotExist,
		} {
			f, err := Open(path, mode)
			if err == nil {
				closeFile(t, f)
				t.Errorf("%s was opened", path)
			} else if want != nil && !errors.Is(err, want) {
				t.Errorf("open %s: %v; want %v", path, err, want)
			}
		}
	}
	for _, path := range []string{target, link, fifo, dir} {
		if _, err := Create(path); !errors.Is(err, fs.ErrExist) {
			t.Errorf("create %s, which exists: %v", path, err)
		}
	}
	if b, err := os.ReadFile(target); err != nil || string(b) != "x" {
		t.Errorf("the file that a link pointed to holds %q, %v", b, err)
	}
}

func TestCreateIsPrivate(t *testing.T) {
	f, path := newOSFile(t)
	defer closeFile(t, f)
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm()&0o077 != 0 {
		t.Errorf("mode %v, %v: others can read the guest's disk", info.Mode(), err)
	}
}

func TestOSFileErrors(t *testing.T) {
	f, path := newOSFile(t)
	mustWrite(t, f, []byte("x"), 0)
	closeFile(t, f)
	f, err := Open(path, ReadOnly)
	mustDo(t, err)
	if _, err := f.WriteAt([]byte("y"), 0); !errors.Is(err, syscall.EBADF) {
		t.Errorf("write to a file open read-only: %v", err)
	}
	if _, err := f.WriteSync([]byte("y"), 0); !errors.Is(err, syscall.EBADF) {
		t.Errorf("synchronous write to a file open read-only: %v", err)
	}
	if err := f.Allocate(0, 1); !errors.Is(err, syscall.EBADF) || errors.Is(err, ErrUnsupported) {
		t.Errorf("allocation in a file open read-only: %v", err)
	}
	expectContent(t, f, []byte("x"))
	closeFile(t, f)
	_, sizeErr := f.Size()
	_, allocatedErr := f.AllocatedBytes()
	_, writeErr := f.WriteAt([]byte("y"), 0)
	_, writeSyncErr := f.WriteSync([]byte("y"), 0)
	_, readErr := f.ReadAt(make([]byte, 1), 0)
	_, _, dataErr := f.NextData(0)
	for what, err := range map[string]error{
		"size": sizeErr, "allocated": allocatedErr, "read": readErr, "write": writeErr,
		"write-sync": writeSyncErr, "allocate": f.Allocate(0, 1), "data": dataErr, "truncate": f.Truncate(0), "punch": f.PunchHole(0, 1), "sync": f.Sync(), "close": f.Close(),
	} {
		if err == nil {
			t.Errorf("%s of a closed file succeeded", what)
		}
	}
}
