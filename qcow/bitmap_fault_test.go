package qcow_test

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/check"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// bitmapFaults drives an image whose file fails at some point, with a model of its bitmaps on which an operation that fails has no effect.
type bitmapFaults struct {
	t        *testing.T
	img      *qcow.Image
	rng      *rand.Rand
	fault    error
	forever  bool
	bitmaps  map[string]*faultBitmap
	failures int
	dead     bool // nothing can be changed any more
}

type faultBitmap struct {
	enabled   bool
	must, may *dirtyModel // a request that failed may be recorded
}

func (f *faultBitmap) clone() *faultBitmap {
	c := *f
	for _, m := range []**dirtyModel{&c.must, &c.may} {
		copied := **m
		copied.dirty = slices.Clone(copied.dirty)
		*m = &copied
	}
	return &c
}

// ok judges the result of something.
func (w *bitmapFaults) ok(err error) bool {
	w.t.Helper()
	if err == nil {
		return true
	}
	w.failures++
	if !errors.Is(err, w.fault) {
		w.t.Fatalf("a fault surfaces as %v", err)
	}
	w.dead = w.dead || strings.Contains(err.Error(), "read-only from now on")
	return false
}

func (w *bitmapFaults) step() {
	size := w.img.Size()
	n := (w.rng.Int64N(3000) + sector) / sector * sector
	off := w.rng.Int64N(size-n) / sector * sector
	name := fmt.Sprint("b", w.rng.IntN(3))
	b, ctx := w.bitmaps[name], w.t.Context()
	switch k := w.rng.IntN(12); {
	case k < 5:
		w.request(off, n, func() error {
			_, err := w.img.WriteAt(repeated(byte(k+1), n), off)
			return err
		})
	case k == 5:
		w.request(off, n, func() error { return w.img.Discard(off, n) })
	case k == 6:
		w.ok(w.img.Flush())
	case b == nil:
		o := qcow.BitmapOptions{Granularity: 512, Disabled: k == 7}
		if w.ok(w.img.AddBitmap(ctx, name, o)) {
			w.bitmaps[name] = &faultBitmap{!o.Disabled, newDirtyModel(size, 512), newDirtyModel(size, 512)}
		}
	case k == 7:
		if w.ok(w.img.ClearBitmap(ctx, name)) {
			clear(b.must.dirty)
			clear(b.may.dirty)
		}
	case k == 8:
		if w.ok(w.img.DisableBitmap(ctx, name)) {
			b.enabled = false
		}
	case k == 9:
		if w.ok(w.img.EnableBitmap(ctx, name)) {
			b.enabled = true
		}
	case k == 10 && len(w.bitmaps) > 1:
		if w.ok(w.img.RemoveBitmap(ctx, name)) {
			delete(w.bitmaps, name)
		}
	default:
		source := slices.Sorted(maps.Keys(w.bitmaps))[0]
		if from := w.bitmaps[source].clone(); w.ok(w.img.MergeBitmap(ctx, name, source)) {
			for i := range b.must.dirty {
				b.must.dirty[i] = b.must.dirty[i] || from.must.dirty[i]
				b.may.dirty[i] = b.may.dirty[i] || from.may.dirty[i]
			}
		}
	}
}

func (w *bitmapFaults) request(off, n int64, fn func() error) {
	err := fn()
	done := w.ok(err)
	if err != nil && strings.Contains(err.Error(), "mark bitmaps") && !w.dead && !w.forever {
		w.t.Fatalf("a guest's request fails because of bitmaps: %v", err)
	}
	for _, b := range w.bitmaps {
		if b.enabled {
			b.may.note(off, n)
			if done {
				b.must.note(off, n)
			}
		}
	}
}

// verify holds bitmaps against the model. Those that are inconsistent it accepts when lost is true.
func (w *bitmapFaults) verify(img *qcow.Image, lost bool) error {
	list, err := img.Bitmaps()
	if err != nil {
		return err
	}
	if len(list) != len(w.bitmaps) && !(lost && len(list) == 0) {
		return fmt.Errorf("bitmaps %+v, want %v", list, slices.Sorted(maps.Keys(w.bitmaps)))
	}
	for _, info := range list {
		b := w.bitmaps[info.Name]
		if b == nil || b.enabled != info.Enabled {
			return fmt.Errorf("unexpected: %+v", info)
		}
		if info.Inconsistent && lost {
			continue
		}
		dirty, err := dirtySectors(img, info.Name)
		if err != nil {
			return err
		}
		for s, d := range dirty {
			if d && !b.may.dirty[s] || !d && b.must.dirty[s] {
				return fmt.Errorf("bitmap %q says %v of sector %d", info.Name, d, s)
			}
		}
	}
	return nil
}

// TestFaultBitmaps lets the k-th change of the file fail, for every k. Requests go on if the image is not poisoned; what can be read
// of a bitmap is right, before and after the image is opened again.
func TestFaultBitmaps(t *testing.T) {
	for _, kind := range []struct {
		name  string
		fault storage.Fault
	}{
		{"EIO once", storage.Fault{Err: syscall.EIO}},
		{"EIO for ever", storage.Fault{Err: syscall.EIO, Forever: true}},
		{"ENOSPC once", storage.Fault{Err: fmt.Errorf("%w: %w", storage.ErrNoSpace, syscall.ENOSPC)}},
		{"short write once", storage.Fault{Err: syscall.EIO, Short: true}},
		{"short write for ever", storage.Fault{Err: syscall.ENOSPC, Short: true, Forever: true}},
	} {
		t.Run(kind.name, func(t *testing.T) {
			kept, lost := 0, 0
			for at := 0; ; at += stride {
				fault := kind.fault
				fault.At = at
				injected, intact := bitmapFaultCase(t, fault)
				if injected == 0 {
					break
				}
				if intact {
					kept++
				} else {
					lost++
				}
			}
			t.Logf("%d faults: all bitmaps valid after %d, some lost after %d", kept+lost, kept, lost)
		})
	}
}

// bitmapFaultCase runs one workload with one fault. It returns how many operations failed, and whether every bitmap can be used afterwards.
func bitmapFaultCase(t *testing.T, fault storage.Fault) (injected int, intact bool) {
	mem := create(t, qcow.CreateOptions{Size: 64 << 10, ClusterSize: 512})
	faults := storage.NewFaults(mem, &fault)
	w := &bitmapFaults{t: t, rng: rand.New(rand.NewPCG(2, 2)), fault: fault.Err, forever: fault.Forever, bitmaps: map[string]*faultBitmap{}}
	w.img = open(t, faults, qcow.FilledByTakers(qcow.Options{ReserveBytes: 4096}))
	for range 60 {
		w.step()
	}
	if err := w.verify(w.img, false); err != nil {
		t.Fatalf("fault at %d: %v", fault.At, err)
	}
	closed := w.ok(w.img.Close())
	_, injected = faults.Count()
	report, err := check.Check(t.Context(), mem, check.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if report.Corruptions > 0 || w.failures == 0 && !report.Clean() {
		t.Fatalf("fault at %d: %v", fault.At, report)
	}
	again := open(t, mem, qcow.Options{})
	if w.dead { // what a crash would leave
		do(t, again.Close())
		return injected, false
	}
	if err := w.verify(again, !closed); err != nil {
		t.Fatalf("fault at %d, after opening again: %v", fault.At, err)
	}
	list, err := again.Bitmaps()
	do(t, err)
	intact = len(list) == len(w.bitmaps) && !slices.ContainsFunc(list, func(b qcow.BitmapInfo) bool { return b.Inconsistent })
	do(t, again.Close())
	return injected, intact
}
