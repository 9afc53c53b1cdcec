package repair_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow/check"
	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/repair"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/seed"
)

// repaired returns what Run makes of an image.
func repaired(image []byte, o repair.Options) ([]byte, *repair.Report, error) {
	f := storage.NewMemoryFrom(bytes.Clone(image))
	report, err := repair.Run(context.Background(), f, o)
	return f.Bytes(), report, err
}

func mustRepair(t testing.TB, image []byte, mode repair.Mode) ([]byte, *repair.Report) {
	t.Helper()
	b, report, err := repaired(image, repair.Options{Mode: mode})
	if err != nil {
		t.Fatal(err)
	}
	return b, report
}

// findings checks an image with the independent checker.
func findings(image []byte) (*check.Report, error) {
	return check.Check(context.Background(), storage.NewMemoryFrom(bytes.Clone(image)), check.Options{})
}

// unclean says what is wrong with an image, "" if nothing is.
func unclean(image []byte) string {
	r, err := findings(image)
	switch {
	case err != nil:
		return err.Error()
	case !r.Clean() || r.Dirty || r.MarkedCorrupt:
		return fmt.Sprintf("dirty %t, marked corrupt %t, %v", r.Dirty, r.MarkedCorrupt, r)
	}
	return ""
}

// different says how what can be seen of two images differs. Clusters that nothing refers to cannot be seen.
func different(a, b []byte) string {
	if len(a) != len(b) {
		return fmt.Sprintf("%d and %d bytes", len(a), len(b))
	}
	if lost := contentOf(a).lost(contentOf(b)); lost != "" {
		return lost
	}
	was, errA := findings(a)
	is, errB := findings(b)
	if fmt.Sprint(errA) != fmt.Sprint(errB) || errA == nil && was.String() != is.String() {
		return fmt.Sprintf("%v, error %v; now %v, error %v", was, errA, is, errB)
	}
	return ""
}

// TestCleanImagesStayAsTheyAre repairs images without fault, in both modes.
func TestCleanImagesStayAsTheyAre(t *testing.T) {
	for _, s := range subjects {
		t.Run(s.name, func(t *testing.T) {
			w := s.open(t)
			if s := unclean(w.image); s != "" {
				t.Fatal(s)
			}
			for _, mode := range []repair.Mode{repair.Leaks, repair.All} {
				got, report := mustRepair(t, w.image, mode)
				if !report.Clean() || !bytes.Equal(got, w.image) {
					t.Errorf("changed: %v", report)
				}
			}
		})
	}
}

// TestDamage damages images at random places, and repairs them.
func TestDamage(t *testing.T) {
	seed, rounds, everyQEMU := seed.Of(t), 60, 12
	if long() {
		rounds, everyQEMU = 4000, 10
	}
	for _, s := range subjects {
		t.Run(s.name, func(t *testing.T) {
			w := s.open(t)
			d := newDamager(w.image)
			verdicts := make(map[string]int)
			for round := range rounds {
				rng := rand.New(rand.NewPCG(seed, uint64(round)))
				image := bytes.Clone(w.image)
				var done []string
				for range 1 + rng.IntN(3) {
					var what string
					image, what = d.anything(image, rng)
					done = append(done, what)
				}
				verdict := w.repairDamage(t, image, round%everyQEMU == 0)
				verdicts[verdict]++
				if t.Failed() {
					t.Fatalf("seed %d, round %d, after\n%s", seed, round, strings.Join(done, "\n"))
				}
			}
			t.Log(verdicts)
		})
	}
}

// repairDamage repairs an image and holds the result against what was there.
func (w *workshop) repairDamage(t *testing.T, image []byte, askQEMU bool) string {
	t.Helper()
	before := contentOf(image)
	got, report, err := repaired(image, repair.Options{Mode: repair.All})
	if err != nil {
		if why := different(image, got); why != "" {
			t.Errorf("failed, but changed the image: %v: %s", err, why)
		}
		if !errors.Is(err, format.ErrCorrupt) && !errors.Is(err, format.ErrUnsupported) {
			t.Error(err)
		}
		if exit, said := w.qemuRepair(t, image); exit == 0 {
			t.Errorf("%v, but QEMU repairs the image: %s", err, said)
		}
		return "beyond repair"
	}
	if s := unclean(got); s != "" {
		t.Errorf("after the repair, %v: %s", report, s)
	}
	if lost := before.lost(contentOf(got)); lost != "" && report.Count(repair.SnapshotDropped) == 0 {
		t.Errorf("after the repair, %v: %s", report, lost)
	}
	if again, second := mustRepair(t, got, repair.All); !second.Clean() || !bytes.Equal(again, got) {
		t.Errorf("the second repair found %v after %v", second, report)
	}
	if report.Clean() {
		return "clean"
	}
	if !askQEMU {
		return "repaired"
	}
	// What lies behind the end of the file QEMU reads as zeroes: an L2 table there makes the backing file show through.
	lost := report.Lost() > 0 || w.has("data")
	return w.compareWithQEMU(t, image, got, lost)
}

// compareWithQEMU holds a repaired image against QEMU's own repair.
func (w *workshop) compareWithQEMU(t *testing.T, image, got []byte, lost bool) string {
	t.Helper()
	if exit, said := w.qemuCheck(t, got); exit != 0 {
		t.Errorf("qemu-img check: %d\n%s", exit, said)
	}
	ours, ok := w.convert(t, got)
	if !ok {
		// Only the data itself tells that a cluster is not compressed.
		if len(contentOf(got)[""].lost) == 0 {
			t.Error("QEMU cannot read the repaired image")
		}
		return "repaired, but it has clusters that cannot be decompressed"
	}
	if theirs, ok := w.convert(t, image); ok && !lost && !bytes.Equal(ours, theirs) {
		t.Error("QEMU read something else from the damaged image")
	}
	if exit, _ := w.qemuRepair(t, image); exit != 0 {
		return "repaired, not by QEMU"
	}
	return "repaired, by QEMU too"
}
