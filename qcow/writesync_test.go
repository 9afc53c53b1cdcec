package qcow_test

import (
	"errors"
	"fmt"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// A durable write costs one durable write of the file where nothing else has to be durable, and a sync where something has.
func TestWriteSyncCost(t *testing.T) {
	rec := storage.NewRecorder(create(t, qcow.CreateOptions{Size: 1 << 20, ClusterSize: 4096}))
	img := open(t, rec, qcow.Options{})
	p := repeated(1, 8192)
	count := func(what string, off int64, syncs, direct int) {
		t.Helper()
		before := len(rec.Ops())
		if n, err := img.WriteSync(p, off); err != nil || n != len(p) {
			t.Fatalf("%s: %d, %v", what, n, err)
		}
		gotSyncs, gotDirect := 0, 0
		for _, op := range rec.Ops()[before:] {
			switch op.Kind {
			case storage.OpSync:
				gotSyncs++
			case storage.OpWriteSync:
				gotDirect++
			case storage.OpWrite, storage.OpPunch, storage.OpTruncate, storage.OpAllocate, storage.OpMark:
			}
		}
		if gotSyncs != syncs || gotDirect != direct {
			t.Errorf("%s: %d syncs and %d durable writes instead of %d and %d", what, gotSyncs, gotDirect, syncs, direct)
		}
	}
	count("first, fills the reserve too", 0, 2, 0)
	count("in place", 0, 0, 1)
	writeAt(t, img, p, 64<<10)
	count("in place, after a link elsewhere that is not durable", 0, 1, 0)
	count("in place again", 0, 0, 1)
	count("in part new", 4096, 1, 0)
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
}

// What WriteSync has answered is there after every crash.
func TestCrashWriteSync(t *testing.T) {
	w, initial := newCrashWorkload(t, 5, qcow.CreateOptions{Size: 96 << 10, ClusterSize: 512}, 8*512, 16<<10)
	for range 60 {
		w.random()
		n := (w.rng.Int64N(3*w.cluster) + sector) / sector * sector
		off := w.rng.Int64N(w.img.Size()-n) / sector * sector
		w.serial++
		value := w.serial
		e := w.do(fmt.Sprintf("write and sync %d+%d", off, n), func() error {
			_, err := w.img.WriteSync(sectorsOf(value, n), off)
			return err
		})
		e.durable = true
		w.note(e, off, n, value)
	}
	w.do("close", w.img.Close)
	t.Logf("%d states", w.run(initial, storage.CrashOptions{Seed: 5, Exhaustive: 6, Random: 8}, 200))
}

// A durable write that fails leaves in doubt what is on disk: nothing is written after it.
func TestWriteSyncFails(t *testing.T) {
	prepare := func(fault *storage.Fault) (*storage.Faults, *qcow.Image) {
		f := storage.NewFaults(create(t, qcow.CreateOptions{Size: 1 << 20}), fault)
		img := open(t, f, qcow.Options{})
		writeAt(t, img, repeated(1, 4096), 0)
		if err := img.Flush(); err != nil {
			t.Fatal(err)
		}
		return f, img
	}
	f, img := prepare(nil)
	total, _ := f.Count()
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	_, img = prepare(&storage.Fault{At: total, Err: errInjected})
	if _, err := img.WriteSync(repeated(2, 4096), 0); !errors.Is(err, errInjected) {
		t.Fatalf("write: %v", err)
	}
	if _, err := img.WriteAt(repeated(3, 4096), 0); !errors.Is(err, errInjected) {
		t.Errorf("write after the failure: %v", err)
	}
	if err := img.Close(); !errors.Is(err, errInjected) {
		t.Errorf("close after the failure: %v", err)
	}
}
