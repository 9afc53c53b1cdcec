package interop_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
)

// imagesInEachDirection is how many images a covering set has, at least.
const imagesInEachDirection = 400

// coveringSets returns a set of combinations for each direction in which every pair of values occurs that no rule forbids, and as many
// triples as fit in. They are the same in every run; the long form has random ones besides.
var coveringSets = sync.OnceValue(func() map[string][]combination {
	sets := map[string][]combination{}
	for _, d := range directions {
		sets[d.name] = newCover(d.matrix()).set(imagesInEachDirection)
	}
	return sets
})

// cover is what a growing set of combinations has not yet got.
type cover struct {
	m       *matrix
	rng     *rand.Rand
	ids     [factors]int // number of the first value of each factor
	n       int          // of values
	scarce  []bool
	pairs   map[[2]int]bool
	triples []bool // got already; impossible ones never are
}

func newCover(m *matrix) *cover {
	k := &cover{m: m, rng: rand.New(rand.NewPCG(1, 1)), pairs: map[[2]int]bool{}}
	for f, values := range m.values {
		k.ids[f] = k.n
		k.n += len(values)
		for v := range values {
			k.scarce = append(k.scarce, slices.ContainsFunc(m.scarce, func(t test) bool { return t.f == factor(f) && t.values>>v&1 != 0 }))
		}
	}
	k.triples = make([]bool, k.n*k.n*k.n)
	for _, p := range m.pairs() {
		k.pairs[k.pair(p)] = true
	}
	return k
}

// pairs returns combinations of two values each, that some image has.
func (m *matrix) pairs() []combination {
	var list []combination
	for f := range factors {
		for g := range f {
			for v := range m.values[f] {
				for w := range m.values[g] {
					c := m.undecided()
					c.at[f], c.at[g] = int8(v), int8(w)
					if _, ok := c.complete(nil); ok {
						list = append(list, c)
					}
				}
			}
		}
	}
	return list
}

// decided returns the numbers of the values that are decided, in the order of the factors.
func (k *cover) decided(c combination) []int {
	var list []int
	for f, v := range c.at {
		if v >= 0 {
			list = append(list, k.ids[f]+int(v))
		}
	}
	return list
}

func (k *cover) pair(c combination) [2]int { return [2]int(k.decided(c)) }

// triple returns the place of a triple. The values are in the order of the factors, or the one that is not is the first: then it is
// put in its place.
func (k *cover) triple(a, b, c int) int {
	if a > b {
		a, b = b, a
	}
	if b > c {
		b, c = c, b
	}
	return (a*k.n+b)*k.n + c
}

// set returns combinations that have every pair between them, at least n of them.
func (k *cover) set(n int) []combination {
	var list []combination
	for len(k.pairs) > 0 || len(list) < n {
		best, most := combination{}, -1
		for range 8 {
			if c, gain, ok := k.candidate(); ok && gain > most && !slices.Contains(list, c) {
				best, most = c, gain
			}
		}
		if most >= 0 {
			k.take(best)
			list = append(list, best)
		}
	}
	return list
}

// candidate builds a combination from a missing pair, one value after the other, each the one that gains most. The gain of a pair
// outweighs that of all triples. A scarce value comes from the pair only.
func (k *cover) candidate() (c combination, gain int, ok bool) {
	c = k.m.undecided()
	if missing := k.missing(); len(missing) > 0 {
		if i := slices.IndexFunc(missing, func(p [2]int) bool { return !k.scarce[p[0]] && !k.scarce[p[1]] }); i > 0 {
			missing = missing[:i]
		}
		c = k.decide(missing[k.rng.IntN(len(missing))])
	}
	for _, f := range k.rng.Perm(int(factors)) {
		if c.at[f] >= 0 {
			continue
		}
		best, most := -1, -1
		others := k.decided(c)
		for _, v := range k.rng.Perm(len(k.m.values[f])) {
			c.at[f] = int8(v)
			if g := k.gain(others, k.ids[f]+v); g > most && !k.scarce[k.ids[f]+v] && c.allowed() {
				best, most = v, g
			}
		}
		if best < 0 {
			return c, 0, false
		}
		c.at[f] = int8(best)
		gain += most
	}
	return c, gain, true
}

// pairGain is more than the number of triples in a combination, and scarceGain more than that of pairs.
const (
	pairGain   = 1000
	scarceGain = 200 * pairGain
)

// gain returns how much is new with a value beside others.
func (k *cover) gain(others []int, value int) int {
	sum := 0
	for i, a := range others {
		if k.pairs[[2]int{min(a, value), max(a, value)}] {
			sum += pairGain
			if k.scarce[a] {
				sum += scarceGain
			}
		}
		for _, b := range others[:i] {
			if !k.triples[k.triple(value, b, a)] {
				sum++
			}
		}
	}
	return sum
}

// missing returns the pairs that the set has not got, in an order that is always the same: those with scarce values first.
func (k *cover) missing() [][2]int {
	list := make([][2]int, 0, len(k.pairs))
	for p := range k.pairs {
		list = append(list, p)
	}
	slices.SortFunc(list, func(a, b [2]int) int {
		if x, y := k.scarce[a[0]] || k.scarce[a[1]], k.scarce[b[0]] || k.scarce[b[1]]; x != y {
			return map[bool]int{true: -1, false: 1}[x]
		}
		return slices.Compare(a[:], b[:])
	})
	return list
}

// decide returns the combination of two values.
func (k *cover) decide(pair [2]int) combination {
	c := k.m.undecided()
	for _, id := range pair {
		for f := range factors {
			if v := id - k.ids[f]; v >= 0 && v < len(k.m.values[f]) {
				c.at[f] = int8(v)
			}
		}
	}
	return c
}

// take notes what the set has with a combination more.
func (k *cover) take(c combination) {
	list := k.decided(c)
	for i, a := range list {
		for j, b := range list[:i] {
			delete(k.pairs, [2]int{b, a})
			for _, d := range list[:j] {
				k.triples[k.triple(d, b, a)] = true
			}
		}
	}
}

// TestMatrixCovers holds the covering sets against what they are for, without the code that made them.
func TestMatrixCovers(t *testing.T) {
	for _, d := range directions {
		set := coveringSets()[d.name]
		has := func(f factor, v int8, g factor, w int8) bool {
			return slices.ContainsFunc(set, func(c combination) bool { return c.at[f] == v && c.at[g] == w })
		}
		distinct := map[[factors]int8]bool{}
		for _, c := range set {
			distinct[c.at] = true
			if done, ok := c.complete(nil); !ok || done.at != c.at {
				t.Errorf("%s: %v breaks a rule, or is not decided", d.name, c)
			}
		}
		if len(distinct) < imagesInEachDirection {
			t.Errorf("%s: %d different images, want %d", d.name, len(distinct), imagesInEachDirection)
		}
		m, possible, refused := d.matrix(), 0, 0
		for f := range factors {
			for g := range f {
				for v := range m.values[f] {
					for w := range m.values[g] {
						c := m.undecided()
						c.at[f], c.at[g] = int8(v), int8(w)
						_, ok := c.complete(nil)
						switch {
						case !ok && f == byRefcount && g == byCluster:
							t.Errorf("%s: no image has %v", d.name, c)
						case !ok:
							refused++
						case !has(f, int8(v), g, int8(w)):
							t.Errorf("%s: no image of the set has %s=%s with %s=%s", d.name, factorNames[f], c.value(f), factorNames[g], c.value(g))
						}
						possible++
					}
				}
			}
		}
		luks := 0
		for _, c := range set {
			if c.is(byEncryption, "luks") {
				luks++
			}
		}
		t.Logf("%s: %d images, %d of them with LUKS, %d pairs of values of which %d are left out, %s", d.name, len(set), luks, possible, refused, triplesOf(m, set))
	}
}

// triplesOf says how many triples of values the set has.
func triplesOf(m *matrix, set []combination) string {
	k := newCover(m)
	for _, c := range set {
		k.take(c)
	}
	got := 0
	for _, is := range k.triples {
		if is {
			got++
		}
	}
	possible := 0
	for f := range factors {
		for g := range f {
			for h := range g {
				possible += len(m.values[f]) * len(m.values[g]) * len(m.values[h])
			}
		}
	}
	return fmt.Sprintf("%d of at most %d triples", got, possible)
}
