package interop_test

import (
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// A factor is a property in which the images of a matrix differ. The first value of each is the plainest.
type factor int

const (
	byVersion factor = iota
	byCluster
	byRefcount
	byLazy
	byExtended
	byCompression // of the clusters that are written compressed; "zstd-unused" has none, but the type in its header
	byEncryption
	byBacking // "short" is an image with half of the disk's size, "two" an image on an image
	byData    // the external data file
	byPreallocation
	bySnapshots
	byBitmaps
	byZeroes  // requests to write zeroes: none, such that keep the clusters, or such that may unmap them
	byDiscard // requests to discard
	bySize    // whether the disk ends with a cluster
	byChange  // what the first author does to the image as a whole
	byThen    // what the second one does
	factors
)

var factorNames = [factors]string{
	"version", "cluster", "refcount", "lazy", "extended", "compression", "encryption", "backing", "data", "preallocation", "snapshots",
	"bitmaps", "zeroes", "discard", "size", "change", "then",
}

// A matrix is a set of images: those that have a value of each factor, and break none of the rules.
type matrix struct {
	values [factors][]string
	rules  []rule
	tests  [][]test // of each rule
	// scarce are values that cost time: a covering set has no more of them than it needs for its pairs.
	scarce []test
}

// newMatrix returns what both directions have in common.
func newMatrix() *matrix {
	return &matrix{values: [factors][]string{
		byVersion:       {"3", "2"},
		byCluster:       {"64K", "512", "1K", "2K", "4K", "8K", "16K", "32K", "128K", "256K", "512K", "1M", "2M"},
		byRefcount:      {"16", "1", "2", "4", "8", "32", "64"},
		byLazy:          {"off", "on"},
		byExtended:      {"off", "on"},
		byCompression:   {"none", "zlib", "zstd", "zstd-unused"},
		byEncryption:    {"none", "luks"},
		byBacking:       {"none", "qcow2", "raw", "short", "two"},
		byData:          {"none", "file", "raw"},
		byPreallocation: {"off", "metadata", "falloc", "full"},
		bySnapshots:     {"0", "1", "2"},
		byBitmaps:       {"0", "1", "3"},
		byZeroes:        {"none", "kept", "unmapped"},
		byDiscard:       {"no", "yes"},
		bySize:          {"whole", "ragged"},
		byChange:        {"none", "grow", "shrink", "amend", "rebase"},
		byThen:          {"none", "grow", "shrink", "snapshot", "apply", "delete", "compress", "amend", "rebase"},
	}}
}

// matrixOfQEMU is what QEMU makes and the engine goes on with. QEMU takes a second for each key that it makes.
func matrixOfQEMU() *matrix {
	m := newMatrix()
	m.values[byEncryption] = append(m.values[byEncryption], "aes")
	m.values[byThen] = append(m.values[byThen], "compact", "stream")
	m.scarce = []test{m.test(is(byEncryption, "luks"))}
	return m.withRules(slices.Concat(commonRules, rulesOfQEMU))
}

// matrixOfEngine is what the engine makes and QEMU goes on with.
func matrixOfEngine() *matrix {
	m := newMatrix()
	m.values[byChange] = append(m.values[byChange], "compact")
	return m.withRules(slices.Concat(commonRules, rulesOfEngine))
}

// A combination is a point of a matrix: the index of a value of each factor, or -1 where that is not decided.
type combination struct {
	m  *matrix
	at [factors]int8
}

// undecided returns the combination in which nothing is decided.
func (m *matrix) undecided() combination {
	c := combination{m: m}
	for f := range c.at {
		c.at[f] = -1
	}
	return c
}

// value returns the value of a factor; "" where it is not decided.
func (c combination) value(f factor) string {
	if c.at[f] < 0 {
		return ""
	}
	return c.m.values[f][c.at[f]]
}

func (c combination) is(f factor, value string) bool { return c.value(f) == value }

// number returns the value of a factor that is a number, with K or M behind it perhaps.
func (c combination) number(f factor) int {
	digits, unit := c.value(f), 1
	switch digits[len(digits)-1] {
	case 'K':
		digits, unit = digits[:len(digits)-1], 1<<10
	case 'M':
		digits, unit = digits[:len(digits)-1], 1<<20
	}
	n, err := strconv.Atoi(digits)
	if err != nil {
		panic(err)
	}
	return n * unit
}

// String names every value that is not the plainest, and the cluster size and the refcount width always.
func (c combination) String() string {
	var parts []string
	for f := range factors {
		if c.at[f] > 0 || f == byCluster || f == byRefcount {
			parts = append(parts, factorNames[f]+"="+c.value(f))
		}
	}
	return strings.Join(parts, ",")
}

// parse returns the combination that String describes.
func (m *matrix) parse(t *testing.T, values string) combination {
	t.Helper()
	c := m.undecided()
	for part := range strings.SplitSeq(values, ",") {
		name, value, _ := strings.Cut(part, "=")
		f := slices.Index(factorNames[:], name)
		if f < 0 || !slices.Contains(m.values[f], value) {
			t.Fatalf("there is no %s", part)
		}
		c.at[f] = int8(slices.Index(m.values[f], value))
	}
	c, ok := c.complete(nil)
	if !ok {
		t.Fatalf("%s breaks a rule", values)
	}
	return c
}

// complete decides what is undecided: for the plainest values that break no rule, or with rng for random ones. It returns
// false where no values do.
func (c combination) complete(rng *rand.Rand) (combination, bool) {
	if !c.allowed() {
		return c, false
	}
	open := slices.Index(c.at[:], -1)
	if open < 0 {
		return c, true
	}
	for _, v := range order(len(c.m.values[open]), rng) {
		c.at[open] = int8(v)
		if done, ok := c.complete(rng); ok {
			return done, true
		}
	}
	return c, false
}

// order returns the numbers below n, in their order or, with rng, in a random one.
func order(n int, rng *rand.Rand) []int {
	if rng != nil {
		return rng.Perm(n)
	}
	list := make([]int, n)
	for i := range list {
		list[i] = i
	}
	return list
}
