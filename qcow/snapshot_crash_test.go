package qcow_test

import (
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/check"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// A world is the time between two operations that change an image at one blow: the making of a snapshot, say. A crash leaves the
// image in the one world or the other.
type world struct {
	born    event             // the operation that it began with
	what    string            // of its kind: "create", "delete", "apply", "shrink"
	calm    bool              // nothing was left to be given back when the operation began
	sectors map[int64][]event // by sector number, in order
	sizes   []event
	kept    []keptSectors
}

// keptSectors are a snapshot, with the value of each sector.
type keptSectors struct {
	name   string
	values []uint64
}

// enter does an operation that changes the image at one blow, and begins the world that change makes of the present one.
func (w *crashWorkload) enter(what string, calm bool, fn func() error, change func(next *world)) {
	e := w.do(what, fn)
	w.past = append(w.past, w.world)
	next := world{born: e, what: what, calm: calm, sectors: map[int64][]event{}, kept: slices.Clone(w.kept)}
	for s, events := range w.sectors {
		next.sectors[s] = []event{{value: events[len(events)-1].value}}
	}
	change(&next)
	next.sizes = []event{{value: uint64(w.img.Size())}}
	maps.DeleteFunc(next.sectors, func(s int64, _ []event) bool { return s >= w.img.Size()/sector })
	w.world = next
}

func (w *crashWorkload) createSnapshot(calm bool) {
	w.serial++
	name := fmt.Sprint("disk ", w.serial)
	w.enter("create", calm, func() error {
		_, err := w.img.CreateSnapshot(w.t.Context(), name, time.Unix(1, 2))
		return err
	}, func(next *world) {
		values := make([]uint64, w.img.Size()/sector)
		for s, events := range next.sectors {
			values[s] = events[0].value
		}
		next.kept = append(next.kept, keptSectors{name, values})
	})
}

func (w *crashWorkload) deleteSnapshot(calm bool) {
	i := w.rng.IntN(len(w.kept))
	w.enter("delete", calm, func() error { return w.img.DeleteSnapshot(w.t.Context(), w.kept[i].name) },
		func(next *world) { next.kept = slices.Delete(next.kept, i, i+1) })
}

func (w *crashWorkload) applySnapshot(calm bool) {
	k := w.kept[w.rng.IntN(len(w.kept))]
	w.enter("apply", calm, func() error { return w.img.ApplySnapshot(w.t.Context(), k.name) }, func(next *world) {
		next.sectors = map[int64][]event{}
		for s, v := range k.values {
			next.sectors[int64(s)] = []event{{value: v}}
		}
	})
}

func (w *crashWorkload) shrink(size int64, calm bool) {
	w.enter("shrink", calm, func() error { return w.img.Resize(w.t.Context(), size) }, func(*world) {})
}

// writeCompressed writes some whole clusters compressed.
func (w *crashWorkload) writeCompressed() {
	n := (1 + w.rng.Int64N(4)) * w.cluster
	off := w.rng.Int64N((w.img.Size()-n)/w.cluster) * w.cluster
	w.serial++
	value := w.serial
	e := w.do(fmt.Sprintf("write compressed %d+%d", off, n), func() error { return w.img.WriteCompressed(sectorsOf(value, n), off) })
	w.note(e, off, n, value)
}

// calmDown gives back what was unlinked, durably, and says so; or does nothing.
func (w *crashWorkload) calmDown() bool {
	if w.rng.IntN(2) == 0 {
		return false
	}
	w.flush()
	w.flush()
	return true
}

// worldsAt returns the worlds that a state may be in.
func (w *crashWorkload) worldsAt(s *storage.CrashState) []world {
	var worlds []world
	for _, v := range append(slices.Clone(w.past), w.world) {
		if v.what != "" && v.born.start >= s.Issued {
			break
		}
		if v.born.end <= returned(s) {
			worlds = worlds[:0]
		}
		worlds = append(worlds, v)
	}
	return worlds
}

// in returns the workload as it was in a world.
func (w *crashWorkload) in(v world) *crashWorkload {
	then := *w
	then.world = v
	return &then
}

// inside returns the world whose making the crash interrupted.
func (w *crashWorkload) inside(s *storage.CrashState) (world, bool) {
	for _, v := range append(slices.Clone(w.past), w.world) {
		if v.what != "" && v.born.start < s.Issued && s.Issued <= v.born.end {
			return v, true
		}
	}
	return world{}, false
}

// verifyLeaks expects an operation that changes the image at one blow to leak nothing: what a crash leaks then is the reserve, and the
// reference that keeps a cluster open for more compressed data.
func (w *crashWorkload) verifyLeaks(s *storage.CrashState, report *check.Report) error {
	if v, is := w.inside(s); is && v.calm && int64(report.Leaks) > w.reserve+1 {
		return fmt.Errorf("%s leaks: %d clusters, with a reserve of %d: %v", v.what, report.Leaks, w.reserve, report.Findings)
	}
	return nil
}

// verifyKept holds the snapshots of a state against those of the world.
func (w *crashWorkload) verifyKept(img *qcow.Image, image []byte) error {
	list := img.Snapshots()
	if len(list) != len(w.kept) {
		return fmt.Errorf("%d snapshots instead of %d", len(list), len(w.kept))
	}
	for i, k := range w.kept {
		if list[i].Name != k.name {
			return fmt.Errorf("snapshot %d is %q instead of %q", i, list[i].Name, k.name)
		}
		old, err := qcow.Open(storage.NewMemoryFrom(image), qcow.Options{ReadOnly: true, Snapshot: list[i].ID})
		if err != nil {
			return fmt.Errorf("open snapshot %q: %w", k.name, err)
		}
		if err := k.verify(old); err != nil {
			return err
		}
	}
	return nil
}

// verify reads a disk that must be exactly as it was when the snapshot was made.
func (k *keptSectors) verify(img *qcow.Image) error {
	if img.Size() != int64(len(k.values))*sector {
		return fmt.Errorf("snapshot %q has %d bytes instead of %d sectors", k.name, img.Size(), len(k.values))
	}
	content := make([]byte, img.Size())
	if _, err := img.ReadAt(content, 0); err != nil {
		return fmt.Errorf("read snapshot %q: %w", k.name, err)
	}
	for s, want := range k.values {
		for at := 0; at < sector; at += 8 {
			if got := binary.BigEndian.Uint64(content[s*sector+at:]); got != want {
				return fmt.Errorf("snapshot %q: sector %d says %d instead of %d", k.name, s, got, want)
			}
		}
	}
	return nil
}

// useKept looks at the snapshots again, when the image was used and closed, and then uses them up.
func (w *crashWorkload) useKept(file *storage.Memory) error {
	if len(w.kept) == 0 {
		return nil
	}
	img, err := qcow.Open(file, qcow.Options{})
	if err != nil {
		return fmt.Errorf("open after further use: %w", err)
	}
	if err := w.verifyKept(img, file.Bytes()); err != nil {
		return fmt.Errorf("after further use: %w", err)
	}
	ctx := w.t.Context()
	last := w.kept[len(w.kept)-1]
	if err := img.ApplySnapshot(ctx, last.name); err != nil {
		return fmt.Errorf("apply after further use: %w", err)
	}
	if err := last.verify(img); err != nil {
		return fmt.Errorf("applied after further use: %w", err)
	}
	for _, k := range w.kept {
		if err := img.DeleteSnapshot(ctx, k.name); err != nil {
			return fmt.Errorf("delete after further use: %w", err)
		}
	}
	if err := last.verify(img); err != nil {
		return fmt.Errorf("without snapshots: %w", err)
	}
	if err := img.Close(); err != nil {
		return fmt.Errorf("close: %w", err)
	}
	report, err := check.Check(ctx, file, check.Options{})
	if err == nil && report.Corruptions > 0 {
		err = fmt.Errorf("corrupt without snapshots: %v", report.Findings)
	}
	return err
}

// runWorlds verifies every state inside an operation that changes the image at one blow, and one of so many others. It counts the
// former by the operation.
func (w *crashWorkload) runWorlds(initial []byte, o storage.CrashOptions, others, everyQEMU int, counts map[string]int) {
	path := w.t.TempDir() + "/state.qcow2"
	states := 0
	for s := range storage.CrashStates(initial, w.rec.Ops(), o) {
		states++
		v, is := w.inside(&s)
		if is {
			counts[v.what]++
		}
		if states%stride != 0 || !is && states%others != 0 {
			continue
		}
		if states/stride%everyQEMU == 0 {
			w.qemuCheck(path, &s)
		}
		if err := w.verify(&s); err != nil {
			w.t.Fatalf("%s, in %q: %v\n%s", s.Name, v.what, err, storage.Trace(w.rec.Ops()[:min(s.Issued, len(w.rec.Ops()))]))
		}
	}
}

// expectStates wants enough of each kind.
func expectStates(t *testing.T, counts map[string]int, kinds ...string) {
	t.Logf("states: %v", counts)
	for _, k := range kinds {
		if counts[k] < 2000 {
			t.Errorf("only %d states inside %q", counts[k], k)
		}
	}
}

// snapshotStep does a random operation on snapshots.
func (w *crashWorkload) snapshotStep() {
	calm := w.calmDown()
	switch n := w.rng.IntN(10); {
	case len(w.kept) == 0 || n < 2 && len(w.kept) < 3:
		w.createSnapshot(calm)
	case n < 5:
		w.applySnapshot(calm)
	default:
		w.deleteSnapshot(calm)
	}
}

// TestCrashSnapshot enumerates what a kill or a power loss leaves of random workloads in which snapshots come, go, and are applied.
func TestCrashSnapshot(t *testing.T) {
	require.Tool(t, "qemu-img")
	seeds, o := 1, storage.CrashOptions{Exhaustive: 8, Random: 12}
	if long() {
		seeds, o = 60, storage.CrashOptions{}
	}
	counts := map[string]int{}
	for _, shape := range []struct {
		image   qcow.CreateOptions
		reserve int64 // clusters
		filled  int64
		rounds  int
	}{
		{qcow.CreateOptions{Size: 40 << 10, ClusterSize: 512, RefcountBits: 64}, 4, 9 << 10, 26},
		{qcow.CreateOptions{Size: 70 << 10, ClusterSize: 512, RefcountBits: 16}, 8, 0, 26},
		{qcow.CreateOptions{Size: 60 << 10, ClusterSize: 1024, RefcountBits: 8}, 3, 20 << 10, 20},
		{qcow.CreateOptions{Size: 80 << 10, ClusterSize: 4096, RefcountBits: 8}, 2, 40 << 10, 12},
	} {
		for seed := range uint64(seeds) {
			t.Run(fmt.Sprintf("cluster=%d/refcount=%d/seed=%d", shape.image.ClusterSize, shape.image.RefcountBits, seed), func(t *testing.T) {
				w, initial := newCrashWorkload(t, seed+100, shape.image, shape.reserve*int64(shape.image.ClusterSize), shape.filled)
				for range shape.rounds {
					for range w.rng.IntN(5) {
						w.random()
					}
					if w.rng.IntN(4) == 0 {
						w.writeCompressed()
					}
					w.snapshotStep()
				}
				w.random()
				w.resize(w.img.Size() + 3*w.cluster)
				w.write(w.img.Size()-w.cluster, w.cluster)
				w.snapshotStep()
				w.do("close", w.img.Close)
				o.Seed = seed
				w.runWorlds(initial, o, 7, 100, counts)
			})
		}
	}
	expectStates(t, counts, "create", "delete", "apply")
}

// TestCrashSnapshotOfQEMU does the same with images that QEMU has made: its snapshots share L2 tables with the active disk.
func TestCrashSnapshotOfQEMU(t *testing.T) {
	require.Tool(t, "qemu-img")
	o := storage.CrashOptions{Exhaustive: 6, Random: 8}
	counts := map[string]int{}
	for seed, shape := range []struct {
		cluster    int64
		size       int64
		options    string
		compressed bool
	}{
		{512, 40 << 10, "refcount_bits=16", true},
		{512, 60 << 10, "compat=0.10", false},
		{1024, 60 << 10, "refcount_bits=8", false},
		{16384, 128 << 10, "extended_l2=on", false},
	} {
		t.Run(fmt.Sprintf("cluster=%d,%s,compressed=%v", shape.cluster, shape.options, shape.compressed), func(t *testing.T) {
			s := newShelf(t, 1, shape.size, shape.cluster, shape.options, false)
			filled := shape.size * 2 / 3 / shape.cluster * shape.cluster
			s.convert(append(sectorsOf(1, filled), make([]byte, shape.size-filled)...), shape.options, shape.compressed)
			s.run("qemu-img", "snapshot", "-c", "of QEMU", s.path)
			s.run("qemu-img", "snapshot", "-c", "of QEMU, too", s.path)
			initial := s.load()
			w := startCrashWorkload(t, uint64(seed), initial, 4*shape.cluster, filled)
			values := make([]uint64, shape.size/sector)
			for i := range filled / sector {
				values[i] = 1
			}
			w.kept = []keptSectors{{"of QEMU", values}, {"of QEMU, too", values}}
			for range 9 {
				for range 1 + w.rng.IntN(4) {
					w.random()
				}
				w.snapshotStep()
			}
			w.shrink(w.img.Size()/3/sector*sector, w.calmDown())
			w.do("close", w.img.Close)
			o.Seed = uint64(seed)
			w.runWorlds(initial, o, 12, 100, counts)
		})
	}
	t.Logf("states: %v", counts)
}

// TestCrashSnapshotTableGrowth enumerates what a crash leaves of a snapshot for which the refcount table has to grow.
func TestCrashSnapshotTableGrowth(t *testing.T) {
	// A refcount table of one cluster has 64 entries for blocks of 64 refcounts: it covers 2 MiB, and the data fills nearly all of it.
	const size, covered = 3 << 20, 2 << 20
	w, initial := newCrashWorkload(t, 1, qcow.CreateOptions{Size: size, ClusterSize: 512, RefcountBits: 64}, 4*512, 1960<<10)
	if len(initial) > covered {
		t.Fatalf("the file has %d bytes already", len(initial))
	}
	w.createSnapshot(true)
	if w.img.Info().FileSize <= covered {
		t.Fatalf("the file has only %d bytes", w.img.Info().FileSize)
	}
	w.write(0, 5<<10)
	w.deleteSnapshot(false)
	w.do("close", w.img.Close)
	counts := map[string]int{}
	kinds := map[string]int{}
	for s := range storage.CrashStates(initial, w.rec.Ops(), storage.CrashOptions{Exhaustive: 4, Random: 4}) {
		v, is := w.inside(&s)
		if kinds[v.what]++; !is || kinds[v.what]%(40*stride) != 0 {
			continue
		}
		counts[v.what]++
		if err := w.verify(&s); err != nil {
			t.Fatalf("%s, in %q: %v", s.Name, v.what, err)
		}
	}
	t.Logf("states: %v", counts)
}
