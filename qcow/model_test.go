package qcow_test

import (
	"context"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/qcow-csi/qcow-csi/test/require"
	"github.com/qcow-csi/qcow-csi/test/seed"
)

// TestModel does random operations of every sort, of any alignment, on every kind of image, and holds it against a model of the disk, of its
// snapshots and of its bitmaps, and against QEMU. Sometimes the image is left without being closed.
func TestModel(t *testing.T) {
	require.Tool(t, "qemu-img")
	steps, seeds := 110, 1
	if stride > 1 {
		steps = 25 // one goroutine each, where the race detector finds little
	}
	if long() {
		steps, seeds = 3000, 6
	}
	base := seed.Of(t)
	for _, k := range modelKinds() {
		for i := range uint64(seeds) {
			seed := base + i
			t.Run(fmt.Sprintf("%s/seed=%d", k.name, seed), func(t *testing.T) {
				t.Parallel()
				name := fnv.New64()
				_, _ = name.Write([]byte(k.name))
				rng := rand.New(rand.NewPCG(seed, name.Sum64()))
				s := newScenario(t, k.start(t, rng), rng, steps)
				s.test(t, fmt.Sprintf("QCOW_CSI_SEED=%d go test -run '^TestModel$/^%s$' ./qcow", seed, strings.ReplaceAll(k.name, "/", "$/^")))
			})
		}
	}
}

// TestModelSoak runs scenarios over random kinds of images, and many requests at once on every fourth of them, for as long as QCOW_CSI_SOAK
// says; without it one for each processor.
func TestModelSoak(t *testing.T) {
	require.Tool(t, "qemu-img")
	limit := time.Duration(0)
	if value := os.Getenv("QCOW_CSI_SOAK"); value != "" {
		var err error
		if limit, err = time.ParseDuration(value); err != nil {
			t.Fatalf("QCOW_CSI_SOAK: %v", err)
		}
	}
	var next, scenarios, steps, crews, requests atomic.Uint64
	next.Store(seed.Of(t))
	end := time.Now().Add(limit)
	t.Run("workers", func(t *testing.T) {
		for range runtime.GOMAXPROCS(0) {
			t.Run("worker", func(t *testing.T) {
				t.Parallel()
				for first := true; (first || time.Now().Before(end)) && !t.Failed(); first = false {
					seed := next.Add(1) - 1
					rng := rand.New(rand.NewPCG(seed, 0))
					replay := fmt.Sprintf("QCOW_CSI_SOAK=1ns QCOW_CSI_SEED=%d go test -run '^TestModelSoak$' ./qcow", seed)
					t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
						k := randomModelKind(rng)
						if rng.IntN(4) == 0 {
							crews.Add(1)
							requests.Add(runCrew(t, k, rng, replay))
							return
						}
						s := newScenario(t, k.start(t, rng), rng, 50+rng.IntN(300))
						s.test(t, replay)
						scenarios.Add(1)
						steps.Add(uint64(len(s.steps)))
					})
				}
			})
		}
	})
	t.Logf("%d scenarios of %d steps together, %d concurrent ones of %d requests", scenarios.Load(), steps.Load(), crews.Load(), requests.Load())
}

// A scenario is a list of operations on an image. Each of its steps can be done whatever was done before, so that every part of a scenario
// is one too.
type scenario struct {
	start *modelStart
	dir   string // where QEMU finds files
	open  uint64 // how the image is opened first
	kills bool   // the image is left without being closed
	steps []modelStep
}

func newScenario(t testing.TB, start *modelStart, rng *rand.Rand, steps int) scenario {
	s := scenario{start: start, dir: t.TempDir(), open: rng.Uint64(), kills: rng.IntN(2) == 0}
	for range steps {
		s.steps = append(s.steps, randomStep(rng))
	}
	return s
}

// test runs the scenario, and tells of the smallest part of it that it can find to fail.
func (s scenario) test(t *testing.T, replay string) {
	t.Helper()
	err := s.run(t.Context())
	if err == nil || t.Context().Err() != nil {
		return
	}
	part, partErr := s.reduce(t.Context(), err, 300)
	t.Fatalf("%v\n%s\nwith %d of %d steps, kills %v, opened with %#x: %v\n%+v\n%s",
		err, replay, len(part.steps), len(s.steps), s.kills, s.open, partErr, s.start.kind, part)
}

// reduce leaves steps out as long as it fails still, and tries so often at most.
func (s scenario) reduce(ctx context.Context, err error, tries int) (scenario, error) {
	for n := (len(s.steps) + 1) / 2; n > 0; {
		shorter := false
		for i := 0; i < len(s.steps) && tries > 0; tries-- {
			part := s
			part.steps = slices.Delete(slices.Clone(s.steps), i, min(i+n, len(s.steps)))
			if partErr := part.run(ctx); partErr != nil {
				s, err, shorter = part, partErr, true
				continue
			}
			i += n
		}
		if !shorter || n > 1 {
			n /= 2
		}
		if tries == 0 {
			break
		}
	}
	return s, err
}

func (s scenario) String() string {
	var b strings.Builder
	for _, step := range s.steps {
		fmt.Fprintf(&b, "\t{%q, %#x, %#x},\n", step.what, step.a, step.b)
	}
	return b.String()
}

// run does all steps, compares everything at the end, closes the image, and asks QEMU.
func (s scenario) run(ctx context.Context) (err error) {
	defer func() {
		if r := recover(); r != nil {
			stack := make([]byte, 4096)
			err = fmt.Errorf("panic: %v\n%s", r, stack[:runtime.Stack(stack, false)])
		}
	}()
	m := newModel(ctx, s.start, s.kills)
	if err := m.open(s.open); err != nil {
		return err
	}
	for i, step := range s.steps {
		if err := m.do(step); err != nil {
			return fmt.Errorf("step %d, %s: %w", i, step.what, err)
		}
	}
	if err := m.compare(); err != nil {
		return fmt.Errorf("at last: %w", err)
	}
	if err := m.close(); err != nil {
		return fmt.Errorf("at last: %w", err)
	}
	if err := m.repair(0); err != nil {
		return fmt.Errorf("at last: %w", err)
	}
	if err := m.askQEMU(s.dir); err != nil {
		return fmt.Errorf("QEMU: %w", err)
	}
	if err := m.open(0); err != nil {
		return fmt.Errorf("open again: %w", err)
	}
	if err := m.compare(); err != nil {
		return fmt.Errorf("opened again: %w", err)
	}
	return m.close()
}

// modelStep is what to do, with two numbers that everything about it is made of.
type modelStep struct {
	what string
	a, b uint64
}

// modelOperations are what the steps of a scenario do, and how often of so many.
var modelOperations = []struct {
	what   string
	weight int
	do     func(m *model, a, b uint64) error
}{
	{"write", 26, (*model).write},
	{"write durably", 4, (*model).writeSync},
	{"write zeroes as data", 4, (*model).writeZeroData},
	{"zero", 5, (*model).zero},
	{"discard", 8, (*model).discard},
	{"write compressed", 5, (*model).writeCompressed},
	{"flush", 4, func(m *model, _, _ uint64) error { return m.img.Flush() }},
	{"read", 4, (*model).read},
	{"reach outside", 1, (*model).reachOutside},
	{"create snapshot", 4, (*model).createSnapshot},
	{"apply snapshot", 3, (*model).applySnapshot},
	{"delete snapshot", 3, (*model).deleteSnapshot},
	{"read snapshot", 2, (*model).readSnapshot},
	{"resize", 5, (*model).resize},
	{"resize preallocated", 2, (*model).resizePreallocated},
	{"compact", 2, (*model).compact},
	{"add bitmap", 3, (*model).addBitmap},
	{"clear bitmap", 1, (*model).clearBitmap},
	{"enable bitmap", 1, (*model).enableBitmap},
	{"disable bitmap", 1, (*model).disableBitmap},
	{"merge bitmaps", 2, (*model).mergeBitmaps},
	{"remove bitmap", 2, (*model).removeBitmap},
	{"commit", 2, (*model).commit},
	{"rebase", 2, (*model).rebase},
	{"stream", 1, (*model).stream},
	{"amend", 3, (*model).amend},
	{"check", 1, func(m *model, _, _ uint64) error { return m.check() }},
	{"compare", 1, func(m *model, _, _ uint64) error { return m.compare() }},
	{"repair", 1, (*model).repairStep},
	{"reopen", 2, (*model).reopen},
	{"kill", 2, (*model).kill},
}

func randomStep(rng *rand.Rand) modelStep {
	sum := 0
	for _, o := range modelOperations {
		sum += o.weight
	}
	i, n := 0, rng.IntN(sum)
	for ; n >= modelOperations[i].weight; i++ {
		n -= modelOperations[i].weight
	}
	return modelStep{modelOperations[i].what, rng.Uint64(), rng.Uint64()}
}

func (m *model) do(s modelStep) error {
	for _, o := range modelOperations {
		if o.what == s.what {
			return o.do(m, s.a, s.b)
		}
	}
	return fmt.Errorf("there is no operation %q", s.what)
}
