package judge

import (
	"crypto/sha256"
	"encoding/binary"
	"iter"
	"math/rand/v2"
	"slices"
	"strings"

	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// population is all that the images of a trial can hold after a crash.
type population struct {
	trial   *Trial
	ops     []storage.Op // the trial's, on the windows
	windows []*window
	options storage.CrashOptions
}

func newPopulation(t *Trial, seed uint64) *population {
	p := &population{trial: t, options: storage.CrashOptions{Seed: seed}}
	for i, image := range t.Images {
		p.windows = append(p.windows, newWindow(image.Initial, t.Ops, i))
	}
	for _, op := range t.Ops {
		p.ops = append(p.ops, p.windows[op.File].op(op))
	}
	return p
}

// states enumerates the population, with the windows' contents in place of the files'.
func (p *population) states() iter.Seq2[int, storage.GroupCrashState] {
	var initial [][]byte
	for _, w := range p.windows {
		initial = append(initial, w.small())
	}
	return func(yield func(int, storage.GroupCrashState) bool) {
		i := 0
		for s := range storage.GroupCrashStates(initial, p.ops, p.options) {
			if !yield(i, s) {
				return
			}
			i++
		}
	}
}

// moment tells when in the log a state came about: after how many syncs.
func (p *population) moment(s *storage.GroupCrashState) int {
	syncs := 0
	for _, op := range p.ops[:s.Issued] {
		if op.Kind == storage.OpSync {
			syncs++
		}
	}
	return syncs
}

// moments returns the states of each moment, by number.
func (p *population) moments() [][]int {
	var moments [][]int
	for i, s := range p.states() {
		m := p.moment(&s)
		for len(moments) <= m {
			moments = append(moments, nil)
		}
		moments[m] = append(moments[m], i)
	}
	return moments
}

// draw chooses n states, or all if there are not so many: one of each moment in turn, at random. So a moment in which
// much was under way, and which thus has most states, does not crowd the others out; a power cut does not wait for it.
func draw(moments [][]int, n int, seed uint64) []int {
	rng := rand.New(rand.NewPCG(seed, 1))
	left := make([][]int, len(moments))
	for i, m := range moments {
		left[i] = slices.Clone(m)
		rng.Shuffle(len(m), func(a, b int) { left[i][a], left[i][b] = left[i][b], left[i][a] })
	}
	var drawn []int
	for more := true; more; {
		more = false
		for i := range left {
			if len(left[i]) > 0 && len(drawn) < n {
				drawn = append(drawn, left[i][0])
				left[i] = left[i][1:]
				more = true
			}
		}
	}
	slices.Sort(drawn)
	return drawn
}

// key tells contents apart.
type key [sha256.Size]byte

func keyOf(contents [][]byte) key {
	h := sha256.New()
	for _, b := range contents {
		_ = binary.Write(h, binary.LittleEndian, int64(len(b))) // a hash has no error to give
		h.Write(b)
	}
	return key(h.Sum(nil))
}

// sampled are the drawn states that have the same contents.
type sampled struct {
	first  int // number of the first of them
	states []storage.GroupCrashState
}

// sample draws n states and puts those with the same contents together, in order. They come without contents.
func (p *population) sample(n int, seed uint64) (samples []*sampled, total int) {
	moments := p.moments()
	for _, m := range moments {
		total += len(m)
	}
	drawn := draw(moments, n, seed)
	known := map[key]*sampled{}
	for i, s := range p.states() {
		if _, chosen := slices.BinarySearch(drawn, i); !chosen {
			continue
		}
		k := keyOf(s.Contents)
		if known[k] == nil {
			known[k] = &sampled{first: i}
			samples = append(samples, known[k])
		}
		s.Contents = nil
		if s.Kind == storage.Kill { // the name tells of the operation where it happened
			at := s.Issued - 1
			s.Name = strings.Replace(s.Name, p.ops[at].String(), p.trial.Ops[at].String(), 1)
		}
		known[k].states = append(known[k].states, s)
	}
	return samples, total
}

// contents yields each sample with what it has in the files.
func (p *population) contents(samples []*sampled) iter.Seq2[*sampled, [][]byte] {
	return func(yield func(*sampled, [][]byte) bool) {
		for i, s := range p.states() {
			if len(samples) == 0 {
				return
			}
			if samples[0].first != i {
				continue
			}
			var full [][]byte
			for k, w := range p.windows {
				full = append(full, w.full(s.Contents[k]))
			}
			if !yield(samples[0], full) {
				return
			}
			samples = samples[1:]
		}
	}
}
