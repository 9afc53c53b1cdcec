package interop_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/check"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/seed"
)

// shape is a point of the matrix.
type shape struct {
	clusterSize, refcountBits int
}

func (s shape) String() string {
	return fmt.Sprintf("cluster=%d/refcount=%d", s.clusterSize, s.refcountBits)
}

// options returns the shape as options of qemu-img create, with further ones.
func (s shape) options(more ...string) string {
	return strings.Join(append([]string{fmt.Sprintf("cluster_size=%d,refcount_bits=%d", s.clusterSize, s.refcountBits)}, more...), ",")
}

// diskSize returns a size of the virtual disk that makes several L2 tables and refcount blocks where that is cheap, and ends
// inside a cluster where that is possible.
func (s shape) diskSize() int64 { return max(4<<20, 20*int64(s.clusterSize)) + 512*1000 }

func long() bool { return os.Getenv("QCOW_CSI_LONG") != "" }

func shapes() []shape {
	if !long() {
		return []shape{{512, 1}, {512, 64}, {4096, 2}, {4096, 16}, {65536, 4}, {65536, 16}, {65536, 64}, {2 << 20, 8}, {2 << 20, 32}}
	}
	var all []shape
	for size := 512; size <= 2<<20; size *= 2 {
		for bits := 1; bits <= 64; bits *= 2 {
			all = append(all, shape{size, bits})
		}
	}
	return all
}

// random returns the source of randomness of a test.
func random(t *testing.T) *rand.Rand {
	t.Helper()
	return rand.New(rand.NewPCG(seed.Of(t), 0))
}

// try runs a program and returns what it writes to both outputs, and whether it succeeded.
func try(t testing.TB, name string, args ...string) (string, bool) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		t.Fatalf("%s: %v", name, err)
	}
	return string(out), err == nil
}

func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, ok := try(t, name, args...)
	if !ok {
		t.Fatalf("%s %s failed:\n%s", name, strings.Join(args, " "), out)
	}
	return out
}

// qemuIO runs commands of qemu-io on the image, in order. Reads and writes that fail there fail the test.
func qemuIO(t testing.TB, path string, commands ...string) {
	t.Helper()
	args := []string{"-f", "qcow2", "-t", "writeback", "-d", "unmap", path}
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	out := run(t, "qemu-io", args...)
	if strings.Contains(out, "failed") {
		t.Fatalf("qemu-io %q:\n%s", commands, out)
	}
}

// mustBeClean checks the image with QEMU and with package check.
func mustBeClean(t testing.TB, path string) {
	t.Helper()
	if out, ok := try(t, "qemu-img", "check", "-f", "qcow2", path); !ok {
		t.Fatalf("qemu-img check:\n%s", out)
	}
	reportOf(t, path)
}

// reportOf checks the image with package check alone, which is many times faster than QEMU where tables are many.
func reportOf(t testing.TB, path string) *check.Report {
	t.Helper()
	f, err := storage.Open(path, storage.ReadOnly)
	if err != nil {
		t.Fatal(err)
	}
	report, err := check.Check(t.Context(), f, check.Options{})
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	if !report.Clean() {
		t.Fatalf("check: %v", report)
	}
	return report
}

func open(t testing.TB, path string, mode storage.Mode) *qcow.Image {
	t.Helper()
	f, err := storage.Open(path, mode)
	if err != nil {
		t.Fatal(err)
	}
	img, err := qcow.Open(f, qcow.Options{ReadOnly: mode == storage.ReadOnly})
	if err != nil {
		t.Fatal(errors.Join(err, f.Close()))
	}
	return img
}

func closeImage(t testing.TB, img *qcow.Image) {
	t.Helper()
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
}

// create makes an image with the engine.
func create(t testing.TB, path string, o qcow.CreateOptions) {
	t.Helper()
	f, err := storage.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(qcow.Create(f, o), f.Close()); err != nil {
		t.Fatal(err)
	}
}

// disk is what a virtual disk should hold.
type disk []byte

// mustEqualHere reads the image with the engine.
func (d disk) mustEqualHere(t testing.TB, path string) {
	t.Helper()
	img := open(t, path, storage.ReadOnly)
	defer closeImage(t, img)
	if img.Size() != int64(len(d)) {
		t.Fatalf("the disk has %d bytes, want %d", img.Size(), len(d))
	}
	got := make([]byte, len(d))
	if _, err := img.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	d.mustEqual(t, got)
}

// mustEqualThere reads the image with QEMU: once by comparing it with a raw file, once by converting it.
func (d disk) mustEqualThere(t testing.TB, path string) {
	t.Helper()
	raw, converted := path+".raw", path+".converted"
	if err := os.WriteFile(raw, d, 0o600); err != nil {
		t.Fatal(err)
	}
	run(t, "qemu-img", "compare", "-f", "qcow2", "-F", "raw", path, raw)
	run(t, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, converted)
	got, err := os.ReadFile(converted)
	if err != nil {
		t.Fatal(err)
	}
	d.mustEqual(t, got)
	if err := errors.Join(os.Remove(raw), os.Remove(converted)); err != nil {
		t.Fatal(err)
	}
}

func (d disk) mustEqual(t testing.TB, got []byte) {
	t.Helper()
	if bytes.Equal(got, d) {
		return
	}
	for i := range min(len(d), len(got)) {
		if d[i] != got[i] {
			t.Fatalf("byte %#x (sector %d) is %#x, want %#x", i, i/512, got[i], d[i])
		}
	}
	t.Fatalf("%d bytes, want %d", len(got), len(d))
}

// extent is an element of qemu-img map --output=json.
type extent struct {
	Start, Length       int64
	Present, Zero, Data bool
	Offset              int64
}

// join joins neighbours that say the same, and drops what only QEMU says: that a data cluster is a hole of the file, where a
// zeroed cluster is kept.
func join(extents []extent) []extent {
	var joined []extent
	for _, e := range extents {
		if e.Data {
			e.Zero = false
		} else {
			e.Offset = 0
		}
		if n := len(joined); n > 0 {
			last := &joined[n-1]
			if last.Present == e.Present && last.Zero == e.Zero && last.Data == e.Data && (!e.Data || last.Offset+last.Length == e.Offset) {
				last.Length += e.Length
				continue
			}
		}
		joined = append(joined, e)
	}
	return joined
}

// mustMapAlike compares Extents with qemu-img map.
func mustMapAlike(t testing.TB, path string) {
	t.Helper()
	var want []extent
	if err := json.Unmarshal([]byte(run(t, "qemu-img", "map", "-f", "qcow2", "--output=json", path)), &want); err != nil {
		t.Fatal(err)
	}
	img := open(t, path, storage.ReadOnly)
	defer closeImage(t, img)
	var got []extent
	for e, err := range img.Extents(0, img.Size()) {
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, extent{
			Start: e.Offset, Length: e.Length, Offset: int64(e.Host),
			Present: e.Kind != qcow.ExtentUnallocated, Zero: e.Kind != qcow.ExtentData, Data: e.Kind == qcow.ExtentData,
		})
	}
	if g, w := fmt.Sprint(join(got)), fmt.Sprint(join(want)); g != w {
		t.Fatalf("Extents:      %s\nqemu-img map: %s", g, w)
	}
}

func imagePath(t testing.TB) string { return filepath.Join(t.TempDir(), "disk.qcow2") }
