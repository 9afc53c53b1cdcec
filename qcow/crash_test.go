package qcow_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/check"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/require"
)

const sector = 512

// A crashWorkload drives an image over a recorder and remembers, for every sector of the virtual disk, which values it may have
// after a crash at any point of the log. Every write gives its sectors a value that no other write uses.
type crashWorkload struct {
	t       *testing.T
	rng     *rand.Rand
	rec     *storage.Recorder
	img     *qcow.Image
	cluster int64
	serial  uint64
	reserve int64 // clusters
	flushes []event
	world           // the present one
	past    []world // before that
}

// event is something that happened between two points of the log. value is a sector's content or the size of the disk.
type event struct {
	start, end int
	value      uint64
	durable    bool // once it has ended
}

// newCrashWorkload starts with an image in which the first filled bytes, whole sectors, were written and flushed.
func newCrashWorkload(t *testing.T, seed uint64, o qcow.CreateOptions, reserve, filled int64) (w *crashWorkload, initial []byte) {
	mem := storage.NewMemory()
	if err := qcow.Create(mem, o); err != nil {
		t.Fatal(err)
	}
	fill(t, mem, filled)
	initial = mem.Bytes()
	return startCrashWorkload(t, seed, initial, reserve, filled), initial
}

// startCrashWorkload starts with an image in which the first filled bytes have the value 1. With an odd seed the order of operations is the
// same each time; with an even one the reserve is filled in the background, whenever that happens.
func startCrashWorkload(t *testing.T, seed uint64, initial []byte, reserve, filled int64) *crashWorkload {
	w := &crashWorkload{t: t, rng: rand.New(rand.NewPCG(seed, 1)), rec: storage.NewRecorder(storage.NewMemoryFrom(bytes.Clone(initial)))}
	o := qcow.Options{ReserveBytes: reserve}
	if seed%2 == 1 {
		o = qcow.FilledByTakers(o)
	}
	var err error
	if w.img, err = qcow.Open(w.rec, o); err != nil {
		t.Fatal(err)
	}
	w.cluster = int64(w.img.Info().ClusterSize)
	w.reserve = reserve / w.cluster
	w.world = world{sectors: map[int64][]event{}, sizes: []event{{value: uint64(w.img.Size())}}}
	w.serial++
	w.note(event{}, 0, filled, w.serial)
	return w
}

// fill writes the value 1 to the first n bytes of the disk.
func fill(t *testing.T, f storage.File, n int64) {
	t.Helper()
	img, err := qcow.Open(f, qcow.Options{ReserveBytes: 8 << 10})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := img.WriteAt(sectorsOf(1, n), 0); err != nil {
		t.Fatal(err)
	}
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
}

func (w *crashWorkload) do(what string, fn func() error) event {
	w.rec.Mark(what)
	e := event{start: len(w.rec.Ops())}
	if err := fn(); err != nil {
		w.t.Fatalf("%s: %v", what, err)
	}
	e.end = len(w.rec.Ops())
	return e
}

func (w *crashWorkload) note(e event, off, n int64, value uint64) {
	e.value = value
	for s := off / sector; s < (off+n)/sector; s++ {
		w.sectors[s] = append(w.sectors[s], e)
	}
}

func (w *crashWorkload) write(off, n int64) {
	w.serial++
	value := w.serial
	e := w.do(fmt.Sprintf("write %d+%d", off, n), func() error {
		_, err := w.img.WriteAt(sectorsOf(value, n), off)
		return err
	})
	w.note(e, off, n, value)
}

func (w *crashWorkload) zero(off, n int64, mayUnmap bool) {
	e := w.do(fmt.Sprintf("zero %d+%d unmap=%v", off, n, mayUnmap), func() error { return w.img.WriteZeroes(off, n, mayUnmap) })
	w.note(e, off, n, 0)
}

func (w *crashWorkload) discard(off, n int64) {
	e := w.do(fmt.Sprintf("discard %d+%d", off, n), func() error { return w.img.Discard(off, n) })
	first, end := (off+w.cluster-1)/w.cluster*w.cluster, (off+n)/w.cluster*w.cluster
	if off+n == w.img.Size() {
		end = off + n
	}
	if first < end {
		w.note(e, first, end-first, 0)
	}
}

func (w *crashWorkload) flush() { w.flushes = append(w.flushes, w.do("flush", w.img.Flush)) }

func (w *crashWorkload) resize(size int64) {
	e := w.do(fmt.Sprintf("resize %d", size), func() error { return w.img.Resize(context.Background(), size) })
	e.value = uint64(size)
	w.sizes = append(w.sizes, e)
}

// random does one random request.
func (w *crashWorkload) random() {
	size := w.img.Size()
	most := 3 * w.cluster
	if w.rng.IntN(6) == 0 {
		most = min(24*w.cluster, size/2)
	}
	n := (w.rng.Int64N(most) + sector) / sector * sector
	off := w.rng.Int64N(size-n) / sector * sector
	switch w.rng.IntN(12) {
	case 0:
		w.zero(off, n, w.rng.IntN(2) == 0)
	case 1, 2, 3:
		w.discard(off, min(4*n, size-off))
	case 4, 5:
		w.flush()
	default:
		w.write(off, n)
	}
}

// sectorsOf returns n bytes in which every sector says value.
func sectorsOf(value uint64, n int64) []byte {
	b := make([]byte, n)
	for i := 0; i < len(b); i += 8 {
		binary.BigEndian.PutUint64(b[i:], value)
	}
	return b
}

// allowed returns which values may be found after the crash: the last one that must have survived, and every one since.
func allowed(events []event, survived, issued int) []uint64 {
	values := []uint64{0}
	for _, e := range events {
		if e.start >= issued {
			break
		}
		if e.end <= survived || e.durable && e.end < issued {
			values = values[:0]
		}
		values = append(values, e.value)
	}
	return values
}

// survived returns the point of the log up to which requests that had been answered must have survived.
func (w *crashWorkload) survived(s *storage.CrashState) int {
	if s.Kind == storage.Kill {
		return s.Durable
	}
	point := 0
	for _, f := range w.flushes {
		if f.end <= s.Issued {
			point = f.start
		}
	}
	return point
}

// verify holds one state against what is allowed.
func (w *crashWorkload) verify(s *storage.CrashState) error {
	report, err := check.Check(w.t.Context(), storage.NewMemoryFrom(s.Content), check.Options{})
	if err != nil {
		return err
	}
	if report.Corruptions > 0 {
		return fmt.Errorf("corrupt: %v", report.Findings)
	}
	file := storage.NewMemoryFrom(s.Content)
	img, err := qcow.Open(file, qcow.Options{ReserveBytes: 8 * w.cluster})
	if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	if err := w.verifyLeaks(s, report); err != nil {
		return err
	}
	var mismatches []error
	for _, v := range w.worldsAt(s) {
		content, err := w.in(v).verifyContent(img, s)
		if err == nil {
			err = w.in(v).verifyKept(img, s.Content)
		}
		if err != nil {
			mismatches = append(mismatches, err)
			continue
		}
		if err := w.useAgain(img, file, content); err != nil {
			return err
		}
		return w.in(v).useKept(file)
	}
	return errors.Join(mismatches...)
}

// returned is the point of the log up to which maintenance that had returned is durable.
func returned(s *storage.CrashState) int {
	if s.Kind == storage.Kill {
		return s.Durable
	}
	return s.Issued
}

func (w *crashWorkload) verifyContent(img *qcow.Image, s *storage.CrashState) ([]byte, error) {
	if sizes := allowed(w.sizes, returned(s), s.Issued); !slices.Contains(sizes, uint64(img.Size())) {
		return nil, fmt.Errorf("size %d, allowed: %v", img.Size(), sizes)
	}
	content := make([]byte, img.Size())
	if _, err := img.ReadAt(content, 0); err != nil {
		return nil, fmt.Errorf("read: %w", err)
	}
	survived := w.survived(s)
	for n := int64(0); n < img.Size()/sector; n++ {
		got := content[n*sector:][:sector]
		value := binary.BigEndian.Uint64(got)
		if !bytes.Equal(got, sectorsOf(value, sector)) {
			return nil, fmt.Errorf("sector %d is torn: % x", n, got[:16])
		}
		if values := allowed(w.sectors[n], survived, s.Issued); !slices.Contains(values, value) {
			return nil, fmt.Errorf("sector %d has value %d, allowed: %v", n, value, values)
		}
	}
	return content, nil
}

// useAgain goes on with a surviving image: what it does must find the image in order, and leave it so.
func (w *crashWorkload) useAgain(img *qcow.Image, file *storage.Memory, content []byte) error {
	size := int64(len(content))
	p := sectorsOf(1<<40, 2*w.cluster)
	for off := int64(0); off+4*w.cluster <= size; off += 4 * w.cluster {
		if _, err := img.WriteAt(p, off+w.cluster/2/sector*sector); err != nil {
			return fmt.Errorf("write again: %w", err)
		}
		copy(content[off+w.cluster/2/sector*sector:], p)
		if err := img.Discard(off+3*w.cluster, w.cluster); err != nil {
			return fmt.Errorf("discard again: %w", err)
		}
		clear(content[off+3*w.cluster:][:w.cluster])
		if off%(16*w.cluster) == 0 {
			if err := img.Flush(); err != nil {
				return fmt.Errorf("flush again: %w", err)
			}
		}
	}
	got := make([]byte, size)
	if _, err := img.ReadAt(got, 0); err != nil {
		return fmt.Errorf("read again: %w", err)
	}
	if !bytes.Equal(got, content) {
		return errors.New("content differs after further use")
	}
	if err := img.Close(); err != nil {
		return fmt.Errorf("close: %w", err)
	}
	report, err := check.Check(w.t.Context(), file, check.Options{})
	if err != nil {
		return err
	}
	if report.Corruptions > 0 {
		return fmt.Errorf("corrupt after further use: %v", report.Findings)
	}
	return nil
}

// run verifies every state of the workload, and lets QEMU judge some.
func (w *crashWorkload) run(initial []byte, o storage.CrashOptions, everyQEMU int) (states int) {
	dir := w.t.TempDir()
	for s := range storage.CrashStates(initial, w.rec.Ops(), o) {
		states++
		if states%stride != 0 {
			continue
		}
		if states%everyQEMU == 0 {
			w.qemuCheck(filepath.Join(dir, "state.qcow2"), &s)
		}
		if err := w.verify(&s); err != nil {
			w.t.Fatalf("%s: %v\n%s", s.Name, err, storage.Trace(w.rec.Ops()[:min(s.Issued, len(w.rec.Ops()))]))
		}
	}
	return states
}

// qemuCheck accepts what a crash may leave: a clean image, or leaked clusters.
func (w *crashWorkload) qemuCheck(path string, s *storage.CrashState) {
	w.t.Helper()
	if err := os.WriteFile(path, s.Content, 0o600); err != nil {
		w.t.Fatal(err)
	}
	cmd := exec.CommandContext(w.t.Context(), "qemu-img", "check", "-f", "qcow2", path)
	if out, err := cmd.CombinedOutput(); err != nil && cmd.ProcessState.ExitCode() != 3 {
		w.t.Fatalf("%s: qemu-img check: %v\n%s", s.Name, err, out)
	}
}

func long() bool { return os.Getenv("QCOW_CSI_LONG") != "" }

// TestCrash enumerates what a kill or a power loss leaves of random workloads.
func TestCrash(t *testing.T) {
	require.Tool(t, "qemu-img")
	seeds, o := 2, storage.CrashOptions{Exhaustive: 8, Random: 12}
	if long() {
		seeds, o = 200, storage.CrashOptions{} // up to 12 operations exhaustively
	}
	shapes := []struct {
		image   qcow.CreateOptions
		reserve int64 // clusters
		steps   int
	}{
		{qcow.CreateOptions{Size: 96 << 10, ClusterSize: 512, RefcountBits: 64}, 4, 70},
		{qcow.CreateOptions{Size: 96 << 10, ClusterSize: 512, RefcountBits: 16}, 16, 60},
		{qcow.CreateOptions{Size: 256 << 10, ClusterSize: 1024, RefcountBits: 1}, 8, 40},
		{qcow.CreateOptions{Size: 512 << 10, ClusterSize: 4096, RefcountBits: 4}, 64, 30},
		{qcow.CreateOptions{Size: 1<<20 + 512, ClusterSize: 65536, RefcountBits: 16}, 4, 30},
	}
	total := 0
	for _, shape := range shapes {
		for seed := range uint64(seeds) {
			name := fmt.Sprintf("cluster=%d/refcount=%d/seed=%d", shape.image.ClusterSize, shape.image.RefcountBits, seed)
			t.Run(name, func(t *testing.T) {
				w, initial := newCrashWorkload(t, seed, shape.image, shape.reserve*int64(shape.image.ClusterSize), 0)
				for range shape.steps {
					w.random()
				}
				w.resize(w.img.Size() + 3*w.cluster)
				w.write(w.img.Size()-w.cluster, w.cluster)
				if w.cluster <= 4096 { // larger ones map too much to read it all in each state
					w.resize(w.img.Size() + w.cluster*w.cluster/8*3) // beyond the L1 table
					w.write(w.img.Size()-w.cluster, w.cluster)
				}
				w.random()
				w.do("close", w.img.Close)
				o.Seed = seed
				total += w.run(initial, o, 40)
			})
		}
	}
	t.Logf("%d states", total)
}

// TestCrashTableGrowth enumerates what a crash leaves while the refcount table and the L1 table move to larger places.
func TestCrashTableGrowth(t *testing.T) {
	require.Tool(t, "qemu-img")
	// A refcount table of one cluster has 64 entries for blocks of 64 refcounts: it covers 2 MiB, and the data fills
	// all but a little of that.
	o := qcow.CreateOptions{Size: 3 << 20, ClusterSize: 512, RefcountBits: 64}
	w, initial := newCrashWorkload(t, 1, o, 32*512, 1900<<10)
	before := int64(len(initial))
	for off := int64(1900 << 10); off < 2100<<10; off += 13 << 10 {
		w.write(off, 13<<10)
	}
	w.discard(64<<10, 16<<10)
	w.flush()
	w.resize(o.Size + 512)
	w.resize(o.Size + 3<<20)
	w.write(w.img.Size()-512, 512)
	w.write(64<<10, 8<<10)
	w.do("close", w.img.Close)
	if info := w.img.Info(); info.FileSize < 2<<20 || before > 2<<20 {
		t.Fatalf("the file grew from %d to %d bytes: the refcount table did not have to move", before, info.FileSize)
	}
	t.Logf("%d states", w.run(initial, storage.CrashOptions{Seed: 1, Exhaustive: 6, Random: 4}, 50))
}
