package repair_test

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow/check"
	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/repair"
	"github.com/qcow-csi/qcow-csi/test/seed"
)

// TestLeaksOnly gives images refcounts for clusters that are not in use, and takes them away again.
func TestLeaksOnly(t *testing.T) {
	seed, rounds := seed.Of(t), 30
	if long() {
		rounds = 1000
	}
	for _, s := range subjects {
		t.Run(s.name, func(t *testing.T) {
			w := s.open(t)
			d := newDamager(w.image)
			for round := range rounds {
				rng := rand.New(rand.NewPCG(seed, uint64(round)))
				image := bytes.Clone(w.image)
				for range 1 + rng.IntN(8) {
					image, _ = d.leaks(image, rng)
				}
				if rng.IntN(2) == 0 {
					image = append(image, make([]byte, rng.IntN(4)*w.clusterSize)...)
				}
				was, err := findings(image)
				if err != nil {
					t.Fatal(err)
				}
				if was.Corruptions > 0 {
					t.Fatalf("seed %d, round %d: more than leaks: %v", seed, round, was)
				}
				got, report := mustRepair(t, image, repair.Leaks)
				if report.Leaks() != was.Leaks || report.Count() != was.Leaks {
					t.Errorf("%d leaks, the repair says %v", was.Leaks, report)
				}
				if s := unclean(got); s != "" {
					t.Errorf("after the repair, %v: %s", report, s)
				}
				if lost := contentOf(image).lost(contentOf(got)); lost != "" {
					t.Error(lost)
				}
				if len(got) > (len(image)+w.clusterSize-1)/w.clusterSize*w.clusterSize+3*w.clusterSize {
					t.Errorf("the file grew from %d to %d", len(image), len(got))
				}
				if t.Failed() {
					t.Fatalf("seed %d, round %d", seed, round)
				}
			}
		})
	}
}

// TestSharedClustersBecomeOwn takes away a snapshot's entry in the snapshot table: all it shared with the disk has one reference too
// many, and COPIED must be set with the refcount.
func TestSharedClustersBecomeOwn(t *testing.T) {
	w := subjects[9].open(t) // extended L2, a snapshot, compressed
	image := bytes.Clone(w.image)
	clear(image[60:64]) // the number of snapshots
	was, err := findings(image)
	if err == nil && (was.Corruptions > 0 || was.Leaks == 0) {
		t.Fatal(was)
	}
	got, report := mustRepair(t, image, repair.Leaks)
	if report.Count(repair.CopiedSet) == 0 || report.Leaks() == 0 || report.Lost() > 0 {
		t.Error(report)
	}
	if s := unclean(got); s != "" {
		t.Error(s)
	}
	if exit, said := w.qemuCheck(t, got); exit != 0 {
		t.Error(said)
	}
	if lost := contentOf(image).lost(contentOf(got)); lost != "" {
		t.Error(lost)
	}
}

// TestLeaksOfCorruptImages repairs the leaks of images that have more wrong with them. What mode All can save before it can
// save after.
func TestLeaksOfCorruptImages(t *testing.T) {
	seed, rounds := seed.Of(t), 60
	if long() {
		rounds = 4000
	}
	for _, s := range smallSubjects {
		t.Run(s.name, func(t *testing.T) {
			w := s.open(t)
			d := newDamager(w.image)
			verdicts := make(map[string]int)
			for round := range rounds {
				rng := rand.New(rand.NewPCG(seed, uint64(round)))
				image := bytes.Clone(w.image)
				image, done := d.anything(image, rng)
				for range rng.IntN(4) {
					image, _ = d.leaks(image, rng)
				}
				verdicts[leaksOfCorrupt(t, image)]++
				if t.Failed() {
					t.Fatalf("seed %d, round %d, after %s", seed, round, done)
				}
			}
			t.Log(verdicts)
		})
	}
}

func leaksOfCorrupt(t *testing.T, image []byte) string {
	t.Helper()
	was, err := findings(image)
	if err != nil {
		return "not an image"
	}
	got, report, err := repaired(image, repair.Options{Mode: repair.Leaks})
	if err != nil {
		if !bytes.Equal(got, image) || !errors.Is(err, format.ErrCorrupt) {
			t.Errorf("failed: %v", err)
		}
		if strings.Contains(err.Error(), "all errors") {
			return "needs mode All"
		}
		return "beyond repair"
	}
	is, err := findings(got)
	if err != nil {
		t.Fatal(err)
	}
	if report.Count() != report.Count(repair.LeakRepaired, repair.LeakKept) && was.Corruptions > 0 {
		t.Errorf("more than leaks were repaired: %v", report)
	}
	if report.Count(repair.LeakKept) > 0 && !bytes.Equal(got, image) {
		t.Errorf("not everything can be followed, but the image has changed: %v", report)
	}
	// The checker does not follow a table that lies on another one.
	overlap := slices.ContainsFunc(was.Findings, func(f check.Finding) bool { return f.Kind == check.Overlap })
	if report.Leaks() > 0 && is.Leaks > 0 && !overlap {
		t.Errorf("leaks remain: %v", is)
	}
	before, after := contentOf(image), contentOf(got)
	if lost := before.lost(after); lost != "" {
		t.Error(lost)
	}
	// What comes of the image is what would have come of it before.
	all, _, errBefore := repaired(image, repair.Options{Mode: repair.All})
	later, _, errAfter := repaired(got, repair.Options{Mode: repair.All})
	if (errBefore == nil) != (errAfter == nil) {
		t.Errorf("mode All: %v, after mode Leaks %v", errBefore, errAfter)
	}
	if lost := contentOf(all).lost(contentOf(later)); lost != "" {
		t.Errorf("mode All saves less after mode Leaks: %s", lost)
	}
	switch {
	case was.Corruptions == 0:
		return "leaks only"
	case report.Count(repair.LeakKept) > 0:
		return "leaks kept"
	}
	return "corrupt"
}
