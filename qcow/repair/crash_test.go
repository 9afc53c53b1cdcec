package repair_test

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow/repair"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/seed"
)

// crashCase is a repair to be interrupted.
type crashCase struct {
	image  []byte
	mode   repair.Mode
	leaks  bool // is all that is wrong
	before content
}

// states repairs the image while it is recorded, and verifies what a crash at any point leaves.
func (c *crashCase) states(t *testing.T, o storage.CrashOptions, each func(s *storage.CrashState) error) (n int) {
	t.Helper()
	rec := storage.NewRecorder(storage.NewMemoryFrom(bytes.Clone(c.image)))
	report, err := repair.Run(context.Background(), rec, repair.Options{Mode: c.mode})
	if err != nil {
		return 0 // such are the subject of other tests
	}
	for s := range storage.CrashStates(c.image, rec.Ops(), o) {
		n++
		if err := each(&s); err != nil {
			t.Fatalf("%s: %v\nrepair: %v\n%s", s.Name, err, report, storage.Trace(rec.Ops()))
		}
	}
	return n
}

// verify holds one state against what was there.
func (c *crashCase) verify(s *storage.CrashState) error {
	if lost := c.before.lost(contentOf(s.Content)); lost != "" {
		return fmt.Errorf("content: %s", lost)
	}
	if c.leaks {
		if r, err := findings(s.Content); err != nil || r.Corruptions > 0 {
			return fmt.Errorf("corrupt: %v, %w", r, err)
		}
	}
	again, report, err := repaired(s.Content, repair.Options{Mode: c.mode})
	if err != nil {
		return fmt.Errorf("repair again: %w", err)
	}
	if s := unclean(again); s != "" && (c.mode == repair.All || c.leaks) {
		return fmt.Errorf("after the second repair, %v: %s", report, s)
	}
	if lost := c.before.lost(contentOf(again)); lost != "" && report.Count(repair.SnapshotDropped) == 0 {
		return fmt.Errorf("content after the second repair, %v: %s", report, lost)
	}
	return nil
}

// TestCrash interrupts repairs of random damage.
func TestCrash(t *testing.T) {
	seed, rounds, o := seed.Of(t), 24, storage.CrashOptions{Exhaustive: 8, Random: 10}
	if long() {
		rounds, o = 300, storage.CrashOptions{Exhaustive: 10, Random: 40}
	}
	total := 0
	for _, s := range smallSubjects {
		t.Run(s.name, func(t *testing.T) {
			w := s.open(t)
			d := newDamager(w.image)
			for round := range rounds {
				rng := rand.New(rand.NewPCG(seed, uint64(round)))
				image := bytes.Clone(w.image)
				c := crashCase{mode: repair.All}
				damage, times := d.anything, 1+rng.IntN(3)
				switch round % 3 {
				case 1:
					damage, times, c.leaks = d.leaks, 1+rng.IntN(6), true
					c.mode = repair.Mode(rng.IntN(2))
				case 2:
					c.mode = repair.Leaks
				}
				var done []string
				for range times {
					var what string
					image, what = damage(image, rng)
					done = append(done, what)
				}
				c.image, c.before = image, contentOf(image)
				o.Seed = rng.Uint64()
				total += c.states(t, o, c.verify)
				if t.Failed() {
					t.Fatalf("seed %d, round %d, after\n%s", seed, round, strings.Join(done, "\n"))
				}
			}
		})
	}
	t.Logf("%d states", total)
	if !t.Failed() && total < 2000 {
		t.Errorf("only %d states", total)
	}
}
