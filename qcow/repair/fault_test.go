package repair_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"syscall"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow/repair"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/seed"
)

// TestFault lets the k-th change of the file fail, for every k. Afterwards the image can be repaired, and nothing is lost.
func TestFault(t *testing.T) {
	full := fmt.Errorf("%w: %w", storage.ErrNoSpace, syscall.ENOSPC)
	kinds := []struct {
		name  string
		fault storage.Fault
	}{
		{"EIO once", storage.Fault{Err: syscall.EIO}},
		{"EIO for ever", storage.Fault{Err: syscall.EIO, Forever: true}},
		{"ENOSPC once", storage.Fault{Err: full}},
		{"ENOSPC for ever", storage.Fault{Err: full, Forever: true}},
		{"short write once", storage.Fault{Err: syscall.EIO, Short: true}},
		{"short write for ever", storage.Fault{Err: full, Short: true, Forever: true}},
	}
	seed, rounds := seed.Of(t), 6
	if long() {
		rounds = 300
	}
	for _, kind := range kinds {
		t.Run(kind.name, func(t *testing.T) {
			injected := 0
			for _, s := range smallSubjects {
				w := s.open(t)
				d := newDamager(w.image)
				for round := range rounds {
					rng := rand.New(rand.NewPCG(seed, uint64(round)))
					image, done := d.anything(bytes.Clone(w.image), rng)
					for at := 0; ; at++ {
						fault := kind.fault
						fault.At = at
						n := faultCase(t, image, fault)
						if t.Failed() {
							t.Fatalf("%s: seed %d, round %d, operation %d, after %s", s.name, seed, round, at, done)
						}
						if n == 0 {
							break
						}
						injected += n
					}
				}
			}
			if injected == 0 {
				t.Error("no operation failed")
			}
			t.Logf("%d operations failed", injected)
		})
	}
}

func faultCase(t *testing.T, image []byte, fault storage.Fault) (injected int) {
	t.Helper()
	before := contentOf(image)
	mem := storage.NewMemoryFrom(bytes.Clone(image))
	f := storage.NewFaults(mem, &fault)
	report, err := repair.Run(context.Background(), f, repair.Options{Mode: repair.All})
	if _, injected = f.Count(); injected == 0 {
		return 0
	}
	switch {
	case err == nil:
		t.Error("a failure went unnoticed")
	case !errors.Is(err, fault.Err):
		t.Errorf("the error does not say why: %v", err)
	case report != nil:
		if s := unclean(mem.Bytes()); s != "" {
			t.Errorf("%v, but %s", err, s)
		}
	case !fault.Forever && !fault.Short && len(mem.Bytes()) != len(image):
		// Only the last sync of the switch may fail behind the point of no return.
		if s := unclean(mem.Bytes()); s != "" {
			t.Errorf("%v: the file has %d bytes, had %d", err, len(mem.Bytes()), len(image))
		}
	}
	if lost := before.lost(contentOf(mem.Bytes())); lost != "" && (report == nil || report.Count(repair.SnapshotDropped) == 0) {
		t.Errorf("%v: %s", err, lost)
	}
	again, report, err := repaired(mem.Bytes(), repair.Options{Mode: repair.All})
	if err != nil {
		t.Error(err)
		return injected
	}
	if s := unclean(again); s != "" {
		t.Errorf("after the second repair, %v: %s", report, s)
	}
	if lost := before.lost(contentOf(again)); lost != "" && report.Count(repair.SnapshotDropped) == 0 {
		t.Errorf("after the second repair, %v: %s", report, lost)
	}
	return injected
}

// TestFullDisk repairs where the file cannot grow: either there is room inside it, or nothing changes.
func TestFullDisk(t *testing.T) {
	seed, rounds := seed.Of(t), 60
	outcomes := make(map[string]int)
	for _, s := range smallSubjects {
		w := s.open(t)
		d := newDamager(w.image)
		for round := range rounds {
			rng := rand.New(rand.NewPCG(seed, uint64(round)))
			image, done := d.anything(bytes.Clone(w.image), rng)
			if round%2 == 0 { // clusters nothing refers to
				image = append(image, make([]byte, 4*w.clusterSize)...)
			}
			mem := storage.NewMemoryFrom(bytes.Clone(image))
			mem.Limit(int64(len(image)))
			_, err := repair.Run(context.Background(), mem, repair.Options{Mode: repair.All})
			switch {
			case errors.Is(err, storage.ErrNoSpace):
				outcomes["full"]++
				if len(mem.Bytes()) != len(image) {
					t.Errorf("the file has %d bytes, had %d", len(mem.Bytes()), len(image))
				}
				if lost := contentOf(image).lost(contentOf(mem.Bytes())); lost != "" {
					t.Error(lost)
				}
				mem.Limit(0)
				if _, err := repair.Run(context.Background(), mem, repair.Options{Mode: repair.All}); err != nil {
					t.Errorf("with room: %v", err)
				}
				fallthrough
			case err == nil:
				outcomes["repaired"]++
				if s := unclean(mem.Bytes()); s != "" {
					t.Error(s)
				}
			default:
				outcomes["beyond repair"]++
			}
			if t.Failed() {
				t.Fatalf("%s: seed %d, round %d, after %s", s.name, seed, round, done)
			}
		}
	}
	t.Log(outcomes)
	if outcomes["full"] == 0 || outcomes["repaired"] == 0 {
		t.Error("the test tests nothing")
	}
}
