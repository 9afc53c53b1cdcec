package repair_test

import (
	"bytes"
	"errors"
	"maps"
	"runtime"
	"runtime/debug"
	"slices"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/repair"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/edit"
)

// FuzzRepair repairs damaged images. Whatever they hold it must not panic, hang or take much memory; a repair that says it
// succeeded leaves a clean image, which says what was readable before; one that failed leaves what was there.
//
// The fuzzer does not mutate whole images, most of whose bytes mean nothing: it chooses a valid one and edits for it.
func FuzzRepair(f *testing.F) {
	before := debug.SetMemoryLimit(128 << 20) // or copies of images pile up until they are collected
	f.Cleanup(func() { debug.SetMemoryLimit(before) })
	var bases []edit.Base
	for _, s := range fuzzSubjects {
		bases = append(bases, newBase(s.build()))
	}
	for i := range bases {
		f.Add(uint8(i), []byte{})
		f.Add(uint8(i), bytes.Repeat([]byte{0, byte(i), 3, 0, 0, 0, 0, 0, 0, 0, 2, 0}, 3))
		f.Add(uint8(i), bytes.Repeat([]byte{2, 0, byte(i), 1, 0, 0, 0, 0, 0, 0, 0, 9}, 2))
		f.Add(uint8(i), []byte{3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x11, 1})
	}
	f.Fuzz(func(t *testing.T, i uint8, edits []byte) {
		image := bases[int(i)%len(bases)].Apply(edits)
		const memory, room = 32 << 20, 4 << 20
		run := func(o repair.Options) ([]byte, *repair.Report, error) {
			f := storage.NewMemoryFrom(bytes.Clone(image))
			f.Limit(int64(len(image)) + room) // the largest tables would only take time
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			report, err := repair.Run(t.Context(), f, o)
			runtime.ReadMemStats(&after)
			if took := after.TotalAlloc - before.TotalAlloc; took > 4*memory {
				t.Fatalf("the repair of %d bytes allocated %d", len(image), took)
			}
			return f.Bytes(), report, err
		}
		for _, mode := range []repair.Mode{repair.Leaks, repair.All} {
			dry, planned, dryErr := run(repair.Options{Mode: mode, MaxMemory: memory, DryRun: true})
			if !bytes.Equal(dry, image) {
				t.Fatalf("mode %d: a dry run changed the image", mode)
			}
			got, report, err := run(repair.Options{Mode: mode, MaxMemory: memory})
			if err != nil {
				full := errors.Is(err, storage.ErrNoSpace)
				if report != nil || dryErr == nil && !full {
					t.Fatalf("mode %d: %v, a dry run said %v; with report %v", mode, err, dryErr, report)
				}
				if why := different(image, got); why != "" {
					t.Fatalf("mode %d: %v, but the image has changed: %s", mode, err, why)
				}
				if !full && !errors.Is(err, format.ErrCorrupt) && !errors.Is(err, format.ErrUnsupported) {
					t.Fatal(err)
				}
				continue
			}
			if dryErr != nil || planned.String() != report.String() {
				t.Fatalf("mode %d: planned %v, error %v; did %v", mode, planned, dryErr, report)
			}
			if lost := contentOf(image).lost(contentOf(got)); lost != "" && report.Count(repair.SnapshotDropped) == 0 {
				t.Fatalf("mode %d, after %v: %s", mode, report, lost)
			}
			if mode == repair.Leaks {
				continue
			}
			if s := unclean(got); s != "" {
				t.Fatalf("after %v: %s", report, s)
			}
			if again, second, err := repaired(got, repair.Options{Mode: mode}); err != nil || !second.Clean() || !bytes.Equal(again, got) {
				t.Fatalf("a second repair found %v, error %v", second, err)
			}
		}
	})
}

func newBase(image []byte) edit.Base {
	return edit.NewBase(image, slices.Concat(slices.Collect(maps.Values(words(image)))...))
}
