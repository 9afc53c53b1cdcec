package qcow_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/check"
	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// create returns a file with a new image.
func create(t testing.TB, o qcow.CreateOptions) *storage.Memory {
	t.Helper()
	f := storage.NewMemory()
	if err := qcow.Create(f, o); err != nil {
		t.Fatalf("create %+v: %v", o, err)
	}
	return f
}

// open opens the image in f, which must be sound.
func open(t testing.TB, f storage.File, o qcow.Options) *qcow.Image {
	t.Helper()
	img, err := qcow.Open(f, o)
	if err != nil {
		t.Fatalf("open: %v", err)
	}
	return img
}

// change opens the image in f, lets do change it, and closes it.
func change(t testing.TB, f storage.File, do func(img *qcow.Image)) {
	t.Helper()
	img := open(t, f, qcow.Options{})
	do(img)
	if err := img.Close(); err != nil {
		t.Fatalf("close: %v", err)
	}
}

func writeAt(t testing.TB, img *qcow.Image, p []byte, off int64) {
	t.Helper()
	if n, err := img.WriteAt(p, off); err != nil || n != len(p) {
		t.Fatalf("write %d bytes at %d: %d, %v", len(p), off, n, err)
	}
}

func expectAt(t testing.TB, img *qcow.Image, want []byte, off int64) {
	t.Helper()
	got := make([]byte, len(want))
	if n, err := img.ReadAt(got, off); err != nil || n != len(want) {
		t.Fatalf("read %d bytes at %d: %d, %v", len(want), off, n, err)
	}
	if i := firstDifference(got, want); i >= 0 {
		t.Fatalf("byte %d of the disk is %#x instead of %#x", off+int64(i), got[i], want[i])
	}
}

// firstDifference returns the index of the first byte that differs, -1 when all are alike.
func firstDifference(a, b []byte) int {
	if bytes.Equal(a, b) {
		return -1
	}
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i
		}
	}
	return min(len(a), len(b))
}

// repeated returns n bytes of value v.
func repeated(v byte, n int64) []byte { return bytes.Repeat([]byte{v}, int(n)) }

// expectClean holds an image at rest against the checker, and against QEMU's where there is one.
func expectClean(t testing.TB, content []byte) {
	t.Helper()
	report, err := check.Check(t.Context(), storage.NewMemoryFrom(content), check.Options{})
	if err != nil {
		t.Fatalf("check: %v", err)
	}
	if !report.Clean() {
		t.Fatalf("the image is not clean: %v", report)
	}
	if _, err := exec.LookPath("qemu-img"); err != nil {
		return
	}
	path := filepath.Join(t.TempDir(), "image.qcow2")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), "qemu-img", "check", "-f", "qcow2", path).CombinedOutput(); err != nil {
		t.Fatalf("qemu-img check: %v\n%s", err, out)
	}
}

// A handmade is an image at rest, whose bytes a test changes.
type handmade struct {
	t testing.TB
	b []byte
	h *format.Header
}

// newHandmade makes an image and writes to it what do says. The file is hardly longer than that needs.
func newHandmade(t testing.TB, o qcow.CreateOptions, do func(img *qcow.Image)) *handmade {
	t.Helper()
	f := create(t, o)
	if do != nil {
		img := open(t, f, qcow.Options{ReserveBytes: 1})
		do(img)
		if err := img.Close(); err != nil {
			t.Fatalf("close: %v", err)
		}
	}
	m := &handmade{t: t, b: f.Bytes()}
	var err error
	if m.h, err = format.DecodeHeader(m.b); err != nil {
		t.Fatal(err)
	}
	return m
}

func (m *handmade) entry(off format.HostOffset) uint64  { return format.Entry(m.b[off:], 0) }
func (m *handmade) put(off format.HostOffset, v uint64) { format.PutEntry(m.b[off:], 0, v) }

// l1Entry returns where the L1 entry for guest cluster c is.
func (m *handmade) l1Entry(c uint64) format.HostOffset {
	return m.h.L1Offset + format.HostOffset(c>>m.h.L2Bits()*format.EntrySize)
}

// l2Table returns where the L2 table for guest cluster c is.
func (m *handmade) l2Table(c uint64) format.HostOffset {
	table := format.L1Entry(m.entry(m.l1Entry(c))).Offset()
	if table == 0 {
		m.t.Fatalf("guest cluster %d has no L2 table", c)
	}
	return table
}

// l2Entry returns where the L2 entry of guest cluster c is.
func (m *handmade) l2Entry(c uint64) format.HostOffset {
	return m.l2Table(c) + format.HostOffset(c%m.h.L2Entries()*format.EntrySize)
}

// host returns the host cluster of guest cluster c.
func (m *handmade) host(c uint64) format.HostOffset {
	return format.L2Entry(m.entry(m.l2Entry(c))).Offset()
}

// block returns where the first refcount block is.
func (m *handmade) block() format.HostOffset {
	return format.RefcountTableEntry(m.entry(m.h.RefcountTableOffset)).Offset()
}

// setRefcount sets the refcount of the host cluster at off, which the first block describes.
func (m *handmade) setRefcount(off format.HostOffset, v uint64) {
	format.PutRefcount(m.b[m.block():], m.h.RefcountOrder, uint64(m.h.ClusterOf(off)), v)
}

// file returns a file of its own with the image.
func (m *handmade) file() *storage.Memory { return storage.NewMemoryFrom(bytes.Clone(m.b)) }

// A hooked is a file whose operations a test can hold up or make fail. A hook that returns an error takes the place of the
// operation.
type hooked struct {
	storage.File

	mu                      sync.Mutex
	beforeRead, beforeWrite func(p []byte, off int64) error
	beforePunch             func(off, n int64) error
	beforeSync              func() error
}

func hook[F any](h *hooked, f *F) F {
	h.mu.Lock()
	defer h.mu.Unlock()
	return *f
}

func (h *hooked) set(change func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	change()
}

func (h *hooked) ReadAt(p []byte, off int64) (int, error) {
	if before := hook(h, &h.beforeRead); before != nil {
		if err := before(p, off); err != nil {
			return 0, err
		}
	}
	return h.File.ReadAt(p, off)
}

func (h *hooked) WriteAt(p []byte, off int64) (int, error) {
	if before := hook(h, &h.beforeWrite); before != nil {
		if err := before(p, off); err != nil {
			return 0, err
		}
	}
	return h.File.WriteAt(p, off)
}

func (h *hooked) PunchHole(off, n int64) error {
	if before := hook(h, &h.beforePunch); before != nil {
		if err := before(off, n); err != nil {
			return err
		}
	}
	return h.File.PunchHole(off, n)
}

func (h *hooked) Sync() error {
	if before := hook(h, &h.beforeSync); before != nil {
		if err := before(); err != nil {
			return err
		}
	}
	return h.File.Sync()
}

// expectClass fails the test unless err has the class.
func expectClass(t testing.TB, what string, err, class error) {
	t.Helper()
	if !errors.Is(err, class) {
		t.Fatalf("%s: %v; want the class %q", what, err, class)
	}
}

var errInjected = fmt.Errorf("injected: %w", os.ErrDeadlineExceeded)
