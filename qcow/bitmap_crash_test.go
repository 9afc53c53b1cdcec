package qcow_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/check"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// trackedBitmap is what is known of a bitmap since some operation on it.
type trackedBitmap struct {
	name        string
	granularity int64
	enabled     bool
	dirty       []bool   // by sector: what was dirty then
	content     []uint64 // of the disk then
	since       int      // index of the first request after it
}

// sectors returns how many sectors the granules of the first n bytes have.
func (b *trackedBitmap) sectors(n int64) int64 {
	return min((n+b.granularity-1)/b.granularity*b.granularity/sector, int64(len(b.dirty)))
}

// note makes the granules of n bytes at off dirty.
func (b *trackedBitmap) note(off, n int64) {
	if n > 0 {
		first, end := off/b.granularity*b.granularity/sector, b.sectors(off+n)
		copy(b.dirty[first:end], slices.Repeat([]bool{true}, int(end-first)))
	}
}

// bitmapWorld is the bitmaps between two operations on them.
type bitmapWorld struct {
	start, end int // of the operation that it begins with, in the log
	bitmaps    []trackedBitmap
	sizes      []int64
}

// bitmapRequest changes a range of the disk.
type bitmapRequest struct {
	start  int
	off, n int64
}

// A bitmapWorkload drives an image with bitmaps over a recorder.
type bitmapWorkload struct {
	t        *testing.T
	rng      *rand.Rand
	rec      *storage.Recorder
	img      *qcow.Image
	cluster  int64
	serial   uint64
	content  []uint64 // by sector, up to the largest size of the disk
	worlds   []bitmapWorld
	requests []bitmapRequest
	snapshot []uint64
	size     int64 // of the snapshot
	mem      *storage.Memory
}

// keptOpen is a file that an image does not close.
type keptOpen struct{ storage.File }

func (keptOpen) Close() error { return nil }

// newBitmapWorkload starts with an empty disk, which can grow to most bytes.
func newBitmapWorkload(t *testing.T, seed uint64, o qcow.CreateOptions, most int64) (w *bitmapWorkload, initial []byte) {
	mem := create(t, o)
	initial = mem.Bytes()
	w = &bitmapWorkload{
		t: t, rng: rand.New(rand.NewPCG(seed, 5)), rec: storage.NewRecorder(mem), mem: mem, cluster: int64(o.ClusterSize), content: make([]uint64, most/sector),
	}
	w.worlds = []bitmapWorld{{sizes: []int64{o.Size}}}
	w.open()
	return w, initial
}

func (w *bitmapWorkload) open() {
	w.img = open(w.t, keptOpen{w.rec}, qcow.Options{ReserveBytes: 8 * w.cluster})
}

// reopen closes the image and opens it again.
func (w *bitmapWorkload) reopen() {
	w.rec.Mark("close")
	do(w.t, w.img.Close())
	w.rec.Mark("open")
	w.open()
}

func (w *bitmapWorkload) world() *bitmapWorld { return &w.worlds[len(w.worlds)-1] }

// request does one that touches n bytes at off, after which those before end of each sector have a value.
func (w *bitmapWorkload) request(what string, off, n int64, value uint64, fn func() error) {
	w.rec.Mark(fmt.Sprintf("%s %d+%d", what, off, n))
	w.requests = append(w.requests, bitmapRequest{len(w.rec.Ops()), off, n})
	do(w.t, fn())
	first, end := off/sector, (off+n)/sector
	if what == "discard" {
		first = (off + w.cluster - 1) / w.cluster * w.cluster / sector
		if off+n != w.img.Size() {
			end = (off + n) / w.cluster * w.cluster / sector
		}
	}
	for s := first; s < end; s++ {
		w.content[s] = value
	}
}

// change does an operation after which the bitmaps are what edit makes of them. It is durable when it returns.
func (w *bitmapWorkload) change(what string, fn func() error, edit func(next *bitmapWorld)) {
	w.rec.Mark(what)
	next := bitmapWorld{start: len(w.rec.Ops()), bitmaps: slices.Clone(w.world().bitmaps), sizes: []int64{w.img.Size()}}
	do(w.t, fn())
	for i := range next.bitmaps { // what is dirty is known: the image file has it, or will be asked for it by Close
		next.bitmaps[i] = w.now(&next.bitmaps[i])
	}
	edit(&next)
	next.end = len(w.rec.Ops())
	next.sizes = []int64{w.img.Size()}
	w.worlds = append(w.worlds, next)
}

// now returns a bitmap as it is now.
func (w *bitmapWorkload) now(b *trackedBitmap) trackedBitmap {
	c := *b
	c.dirty = slices.Clone(b.dirty)
	for _, r := range w.requests[b.since:] {
		if c.enabled {
			c.note(r.off, r.n)
		}
	}
	c.content, c.since = slices.Clone(w.content), len(w.requests)
	return c
}

// step does something random.
func (w *bitmapWorkload) step() {
	ctx, size := w.t.Context(), w.img.Size()
	n := (w.rng.Int64N(4*w.cluster) + sector) / sector * sector
	off := w.rng.Int64N(size-n) / sector * sector
	world := w.world()
	name, pick := "", w.rng.IntN(max(len(world.bitmaps), 1))
	if len(world.bitmaps) > 0 {
		name = world.bitmaps[pick].name
	}
	switch k := w.rng.IntN(22); {
	case k < 7:
		w.serial++
		value := w.serial
		w.request("write", off, n, value, func() error {
			_, err := w.img.WriteAt(sectorsOf(value, n), off)
			return err
		})
	case k == 7:
		w.serial++
		value := w.serial
		w.request("write-sync", off, n, value, func() error {
			_, err := w.img.WriteSync(sectorsOf(value, n), off)
			return err
		})
	case k == 8:
		w.request("zero", off, n, 0, func() error { return w.img.WriteZeroes(off, n, w.rng.IntN(2) == 0) })
	case k == 9:
		w.request("discard", off, n, 0, func() error { return w.img.Discard(off, n) })
	case k == 10:
		off = off / w.cluster * w.cluster
		n = min((n+w.cluster-1)/w.cluster*w.cluster, size-off)
		w.serial++
		value := w.serial
		w.request("compressed", off, n, value, func() error { return w.img.WriteCompressed(sectorsOf(value, n), off) })
	case k == 11:
		w.rec.Mark("flush")
		do(w.t, w.img.Flush())
	case k == 12:
		w.reopen()
	case k == 13 || len(world.bitmaps) == 0:
		w.add()
	case k == 14 && len(world.bitmaps) > 2:
		w.change("remove "+name, func() error { return w.img.RemoveBitmap(ctx, name) }, func(next *bitmapWorld) {
			next.bitmaps = slices.Delete(next.bitmaps, pick, pick+1)
		})
	case k == 15:
		w.change("clear "+name, func() error { return w.img.ClearBitmap(ctx, name) }, func(next *bitmapWorld) {
			clear(next.bitmaps[pick].dirty)
		})
	case k == 16:
		w.change("disable "+name, func() error { return w.img.DisableBitmap(ctx, name) }, func(next *bitmapWorld) {
			next.bitmaps[pick].enabled = false
		})
	case k == 17:
		w.change("enable "+name, func() error { return w.img.EnableBitmap(ctx, name) }, func(next *bitmapWorld) {
			next.bitmaps[pick].enabled = true
		})
	case k == 18:
		w.merge(pick, w.rng.IntN(len(world.bitmaps)))
	case k == 19:
		most := int64(len(w.content)) * sector
		w.resize((w.rng.Int64N(most/2) + most/2) / sector * sector)
	case k == 20 && w.snapshot == nil:
		w.rec.Mark("snapshot")
		_, err := w.img.CreateSnapshot(ctx, "s", time.Unix(1, 0))
		do(w.t, err)
		w.snapshot, w.size = slices.Clone(w.content), size
	case k == 21 && w.snapshot != nil:
		w.applySnapshot()
	}
}

func (w *bitmapWorkload) add() {
	w.serial++
	b := trackedBitmap{
		name: fmt.Sprint("b", w.serial), granularity: 512 << w.rng.IntN(5), enabled: w.rng.IntN(4) != 0,
		dirty: make([]bool, len(w.content)), content: slices.Clone(w.content), since: len(w.requests),
	}
	w.change("add "+b.name, func() error {
		return w.img.AddBitmap(w.t.Context(), b.name, qcow.BitmapOptions{Granularity: b.granularity, Disabled: !b.enabled})
	}, func(next *bitmapWorld) { next.bitmaps = append(next.bitmaps, b) })
}

func (w *bitmapWorkload) merge(target, source int) {
	bitmaps := w.world().bitmaps
	what := "merge " + bitmaps[source].name + " into " + bitmaps[target].name
	w.change(what, func() error {
		return w.img.MergeBitmap(w.t.Context(), bitmaps[target].name, bitmaps[source].name)
	}, func(next *bitmapWorld) {
		from := next.bitmaps[source].dirty
		for s := range w.img.Size() / sector {
			if from[s] {
				next.bitmaps[target].note(s*sector, sector)
			}
		}
	})
}

func (w *bitmapWorkload) resize(size int64) {
	old := w.img.Size()
	w.change(fmt.Sprint("resize ", size), func() error { return w.img.Resize(w.t.Context(), size) }, func(next *bitmapWorld) {
		clear(w.content[min(size, old)/sector:])
		for i := range next.bitmaps {
			b := &next.bitmaps[i]
			b.content = slices.Clone(w.content)
			clear(b.dirty[b.sectors(size):]) // the granule that the disk ends in stays
			if b.enabled {
				b.note(old, max(size-old, 0))
			}
		}
	})
}

func (w *bitmapWorkload) applySnapshot() {
	old := w.img.Size()
	before := slices.Clone(w.content)
	w.change("apply", func() error { return w.img.ApplySnapshot(w.t.Context(), "s") }, func(next *bitmapWorld) {
		copy(w.content, w.snapshot)
		for i := range next.bitmaps {
			b := &next.bitmaps[i]
			clear(b.dirty[b.sectors(w.size):])
			for s := int64(0); s < w.size/sector && b.enabled; s++ {
				if s*sector >= old || before[s] != w.content[s] {
					b.note(s*sector, sector)
				}
			}
			b.content = slices.Clone(w.content)
		}
	})
	w.resync()
}

// resync takes over what bitmaps say after a snapshot was applied: it may be more than what is different, but not less.
func (w *bitmapWorkload) resync() {
	for i := range w.world().bitmaps {
		b := &w.world().bitmaps[i]
		got, err := dirtySectors(w.img, b.name)
		do(w.t, err)
		for s, dirty := range b.dirty[:w.img.Size()/sector] {
			if dirty && !got[s] {
				w.t.Fatalf("bitmap %q does not have sector %d, which the snapshot has changed", b.name, s)
			}
			if !b.enabled && got[s] != dirty {
				w.t.Fatalf("bitmap %q, which is disabled, says %v of sector %d", b.name, got[s], s)
			}
			if got[s] {
				b.note(int64(s)*sector, sector)
			}
		}
	}
}

func dirtySectors(img *qcow.Image, name string) ([]bool, error) {
	list, err := dirtyExtents(img, name)
	dirty := make([]bool, img.Size()/sector)
	for _, e := range list {
		for s := e.Offset / sector; s < (e.Offset+e.Length)/sector; s++ {
			dirty[s] = true
		}
	}
	return dirty, err
}

// expectExact holds every bitmap of the open image against what is known.
func (w *bitmapWorkload) expectExact() {
	w.t.Helper()
	for i := range w.world().bitmaps {
		b := w.now(&w.world().bitmaps[i])
		got, err := dirtySectors(w.img, b.name)
		do(w.t, err)
		if !slices.Equal(got, b.dirty[:len(got)]) {
			for s := range got {
				if got[s] != b.dirty[s] {
					w.t.Fatalf("bitmap %q says %v of sector %d\n%s", b.name, got[s], s, w.marks())
				}
			}
		}
	}
}

// marks returns what was done.
func (w *bitmapWorkload) marks() string {
	var b strings.Builder
	for _, op := range w.rec.Ops() {
		if op.Kind == storage.OpMark {
			fmt.Fprintln(&b, op.Mark)
		}
	}
	return b.String()
}

// verify holds one state against what is allowed.
func (w *bitmapWorkload) verify(s *storage.CrashState, withQEMU bool) error {
	report, err := check.Check(w.t.Context(), storage.NewMemoryFrom(s.Content), check.Options{})
	if err != nil {
		return err
	}
	if report.Corruptions > 0 {
		return fmt.Errorf("corrupt: %v", report.Findings)
	}
	img, err := qcow.Open(storage.NewMemoryFrom(s.Content), qcow.Options{ReadOnly: true})
	if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	content := make([]byte, img.Size())
	if _, err := img.ReadAt(content, 0); err != nil {
		return fmt.Errorf("read: %w", err)
	}
	returned := s.Issued
	if s.Kind == storage.Kill {
		returned = s.Durable
	}
	var failures []error
	for i := len(w.worlds) - 1; i >= 0; i-- {
		if w.worlds[i].start > s.Issued {
			continue
		}
		err := w.matches(img, &w.worlds[i], content, s.Issued)
		if failures = append(failures, err); err == nil {
			break
		}
		if w.worlds[i].end <= returned {
			return errors.Join(failures...)
		}
	}
	if withQEMU {
		if err := w.qemuAgrees(img, s); err != nil {
			return err
		}
	}
	return errors.Join(img.Close(), w.useAgain(s))
}

// matches tells why the image can't be in a world.
func (w *bitmapWorkload) matches(img *qcow.Image, world *bitmapWorld, content []byte, issued int) error {
	list, err := img.Bitmaps()
	if err != nil {
		return err
	}
	if len(list) != len(world.bitmaps) || !slices.Contains(world.sizes, img.Size()) {
		return fmt.Errorf("%d bitmaps on a disk of %d bytes, want %d on %v", len(list), img.Size(), len(world.bitmaps), world.sizes)
	}
	for i := range list {
		b := &world.bitmaps[i]
		if list[i].Name != b.name || list[i].Granularity != b.granularity || list[i].Enabled != b.enabled {
			return fmt.Errorf("bitmap %d is %+v, want %q, %d, enabled %v", i, list[i], b.name, b.granularity, b.enabled)
		}
		if list[i].Inconsistent {
			if !b.enabled {
				return fmt.Errorf("bitmap %q is inconsistent, though it is disabled", b.name)
			}
			continue
		}
		dirty, err := dirtySectors(img, b.name)
		if err != nil {
			return err
		}
		possible := *b
		possible.dirty = slices.Clone(b.dirty)
		for _, r := range w.requests[b.since:] {
			if r.start < issued && b.enabled {
				possible.note(r.off, r.n)
			}
		}
		for s := range dirty {
			value := binary.BigEndian.Uint64(content[s*sector:])
			switch {
			case !dirty[s] && b.dirty[s]:
				return fmt.Errorf("bitmap %q has lost sector %d", b.name, s)
			case !dirty[s] && b.enabled && value != b.content[s]:
				return fmt.Errorf("bitmap %q misses that sector %d has changed from %d to %d", b.name, s, b.content[s], value)
			case dirty[s] && !possible.dirty[s]:
				return fmt.Errorf("bitmap %q has sector %d, which nobody wrote to", b.name, s)
			}
		}
	}
	return nil
}

// qemuAgrees lets QEMU judge a state.
func (w *bitmapWorkload) qemuAgrees(img *qcow.Image, s *storage.CrashState) error {
	q := newQEMUFile(w.t, s.Content)
	cmd := exec.CommandContext(w.t.Context(), "qemu-img", "check", "-f", "qcow2", q.path)
	if out, err := cmd.CombinedOutput(); err != nil && cmd.ProcessState.ExitCode() != 3 {
		return fmt.Errorf("qemu-img check: %w\n%s", err, out)
	}
	list, err := img.Bitmaps()
	if err != nil {
		return err
	}
	theirs := q.bitmaps()
	if len(theirs) != len(list) {
		return fmt.Errorf("QEMU sees the bitmaps %v, not %v", theirs, list)
	}
	for i, b := range theirs {
		if b.Name != list[i].Name || slices.Contains(b.Flags, "in-use") != list[i].Inconsistent || slices.Contains(b.Flags, "auto") != list[i].Enabled {
			return fmt.Errorf("QEMU sees the bitmap %v, not %+v", b, list[i])
		}
	}
	return nil
}

// useAgain goes on with what has survived.
func (w *bitmapWorkload) useAgain(s *storage.CrashState) error {
	mem := storage.NewMemoryFrom(bytes.Clone(s.Content))
	img, err := qcow.Open(mem, qcow.Options{ReserveBytes: 4 * w.cluster})
	if err != nil {
		return fmt.Errorf("open again: %w", err)
	}
	list, err := img.Bitmaps()
	if err != nil {
		return err
	}
	off := img.Size() / 2 / sector * sector
	if _, err := img.WriteAt(sectorsOf(1<<40, 2*w.cluster), off); err != nil {
		return fmt.Errorf("write again: %w", err)
	}
	if len(list) > 1 {
		if err := img.RemoveBitmap(w.t.Context(), list[0].Name); err != nil {
			return fmt.Errorf("remove: %w", err)
		}
		list = list[1:]
	}
	if err := img.Close(); err != nil {
		return fmt.Errorf("close: %w", err)
	}
	report, err := check.Check(w.t.Context(), mem, check.Options{})
	if err != nil {
		return err
	}
	if report.Corruptions > 0 {
		return fmt.Errorf("corrupt after further use: %v", report.Findings)
	}
	if img, err = qcow.Open(mem, qcow.Options{ReadOnly: true}); err != nil {
		return err
	}
	for _, b := range list {
		dirty, err := dirtySectors(img, b.Name)
		switch {
		case b.Inconsistent && !errors.Is(err, qcow.ErrInvalid):
			return fmt.Errorf("bitmap %q was inconsistent, and is %w", b.Name, err)
		case b.Inconsistent:
		case err != nil:
			return err
		case b.Enabled && slices.Contains(dirty[off/sector:(off+2*w.cluster)/sector], false):
			return fmt.Errorf("bitmap %q has not recorded further use", b.Name)
		}
	}
	return img.Close()
}

// finish closes the image, which is clean then.
func (w *bitmapWorkload) finish() {
	w.rec.Mark("close")
	do(w.t, w.img.Close())
	expectClean(w.t, w.mem.Bytes())
}

func (w *bitmapWorkload) run(initial []byte, o storage.CrashOptions, everyQEMU int) (states int) {
	for s := range storage.CrashStates(initial, w.rec.Ops(), o) {
		states++
		if states%stride != 0 {
			continue
		}
		if err := w.verify(&s, states%everyQEMU == 0); err != nil {
			w.t.Fatalf("%s: %v\n%s", s.Name, err, storage.Trace(w.rec.Ops()[:min(s.Issued, len(w.rec.Ops()))]))
		}
	}
	return states
}

// TestCrashBitmaps enumerates what a crash leaves of random workloads on images with bitmaps. One that can be used misses no change since it
// was made, cleared or enabled; one that is disabled is never lost.
func TestCrashBitmaps(t *testing.T) {
	require.Tool(t, "qemu-img")
	seeds, o := 2, storage.CrashOptions{Exhaustive: 6, Random: 6}
	if long() {
		seeds, o = 100, storage.CrashOptions{Exhaustive: 10, Random: 40}
	}
	total := 0
	for _, cluster := range []int{512, 1024, 4096} {
		for seed := range uint64(seeds) {
			t.Run(fmt.Sprintf("cluster=%d/seed=%d", cluster, seed), func(t *testing.T) {
				w, initial := newBitmapWorkload(t, seed, qcow.CreateOptions{Size: 96 << 10, ClusterSize: cluster}, 128<<10)
				w.add()
				for range 35 {
					w.step()
					w.expectExact()
				}
				w.finish()
				o.Seed = seed
				total += w.run(initial, o, 100)
			})
		}
	}
	t.Logf("%d states", total)
}

// TestCrashBitmapsResize enumerates what a crash leaves of a disk that shrinks and grows, while its bitmaps get tables of another length, of more
// than one cluster too.
func TestCrashBitmapsResize(t *testing.T) {
	require.Tool(t, "qemu-img")
	const unit = 2 << 20 // bytes of the disk for each cluster of the bitmap with the smallest granularity
	w, initial := newBitmapWorkload(t, 1, qcow.CreateOptions{Size: unit, ClusterSize: 512}, 2*unit)
	for i, enabled := range []bool{true, false} {
		name := fmt.Sprint("b", i)
		w.change("add "+name, func() error {
			return w.img.AddBitmap(t.Context(), name, qcow.BitmapOptions{Granularity: 512, Disabled: !enabled})
		}, func(next *bitmapWorld) {
			next.bitmaps = append(next.bitmaps, trackedBitmap{name: name, granularity: 512, enabled: enabled, dirty: make([]bool, len(w.content)), content: slices.Clone(w.content)})
		})
	}
	for i, size := range []int64{unit + 512, unit, 2 * unit, unit/2 + 512} {
		for range 2 {
			w.serial++
			value, off := w.serial, w.img.Size()-int64(i+1)*1024
			w.request("write", off, 1024, value, func() error {
				_, err := w.img.WriteAt(sectorsOf(value, 1024), off)
				return err
			})
			w.merge(1, 0)
		}
		w.expectExact()
		w.resize(size)
		w.expectExact()
	}
	w.reopen()
	w.expectExact()
	w.finish()
	t.Logf("%d states", w.run(initial, storage.CrashOptions{Seed: 1, Exhaustive: 6, Random: 12}, 40))
}
