package interop_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/qcow-csi/qcow-csi/test/require"
)

// A condition holds for combinations with, or without, one of some values of a factor.
type condition struct {
	f      factor
	values []string
	not    bool
}

func is(f factor, values ...string) condition    { return condition{f: f, values: values} }
func isNot(f factor, values ...string) condition { return condition{f: f, values: values, not: true} }

// A rule leaves combinations out: those for which all of its conditions hold.
type rule struct {
	when []condition
	why  string
	// refused says that the program whose turn it is refuses to do it, which TestMatrixLeavesOutWhatIsRefused proves. The other rules are
	// those of this test.
	refused bool
}

// refused returns the rule that combinations are left out since a program refuses them.
func refused(why string, when ...condition) rule { return rule{when: when, why: why, refused: true} }

// senseless returns the rule that combinations are left out since they say nothing, or nothing new.
func senseless(why string, when ...condition) rule { return rule{when: when, why: why} }

var (
	withCompressed = is(byCompression, "zlib", "zstd")
	fewCounts      = is(byRefcount, "2", "4") // widths in which several compressed clusters in one host cluster leave no room for snapshots
)

var commonRules = []rule{
	refused("version 2 has refcounts of 16 bits", is(byVersion, "2"), isNot(byRefcount, "16")),
	refused("version 2 has no lazy refcounts", is(byVersion, "2"), is(byLazy, "on")),
	refused("version 2 has no extended L2 entries", is(byVersion, "2"), is(byExtended, "on")),
	refused("version 2 has no compression types", is(byVersion, "2"), is(byCompression, "zstd", "zstd-unused")),
	refused("version 2 has no external data files", is(byVersion, "2"), isNot(byData, "none")),
	refused("version 2 has no bitmaps", is(byVersion, "2"), isNot(byBitmaps, "0")),
	refused("extended L2 entries need clusters of 16 KiB", is(byExtended, "on"), is(byCluster, "512", "1K", "2K", "4K", "8K")),
	refused("a raw data file has no place for a backing file", is(byData, "raw"), isNot(byBacking, "none")),
	refused("no compressed clusters with a data file", isNot(byData, "none"), withCompressed),
	refused("no snapshots with a data file", isNot(byData, "none"), isNot(bySnapshots, "0")),
	refused("clusters that are allocated would hide the backing file", isNot(byPreallocation, "off"), isNot(byBacking, "none"), is(byExtended, "off")),
	refused("refcounts of 1 bit count no snapshot", is(byRefcount, "1"), isNot(bySnapshots, "0")),
	refused("a raw data file gets no backing file", is(byData, "raw"), is(byChange, "rebase")),
	refused("a raw data file gets no backing file", is(byData, "raw"), is(byThen, "rebase")),
	refused("no snapshots with a data file", isNot(byData, "none"), is(byThen, "snapshot")),
	refused("refcounts of 1 bit count no snapshot", is(byRefcount, "1"), is(byThen, "snapshot"), isNot(byChange, "amend")),
	refused("no compressed clusters with a data file", isNot(byData, "none"), is(byThen, "compress")),

	senseless("it depends on how compressed clusters are packed", fewCounts, withCompressed, isNot(bySnapshots, "0")),
	senseless("it depends on how compressed clusters are packed", is(byRefcount, "1", "2", "4"), withCompressed, is(byThen, "snapshot")),
	senseless("it depends on the width to which the refcounts are amended", is(byRefcount, "1"), is(byChange, "amend"), is(byThen, "snapshot")),
	senseless("it depends on whether some cluster has all references", is(byRefcount, "2"), is(bySnapshots, "2"), is(byThen, "snapshot")),
	senseless("every disk is a number of clusters", is(byCluster, "512"), is(bySize, "ragged")),
	senseless("snapshots of the old backing file read otherwise with the new one", is(byChange, "rebase"), isNot(bySnapshots, "0")),
	senseless("snapshots of the old backing file read otherwise with the new one", is(byThen, "rebase"), isNot(bySnapshots, "0")),
	senseless("there is no snapshot", is(byThen, "apply", "delete"), is(bySnapshots, "0")),
}

const (
	// rebaseLosesZeroes is a bug of QEMU 7.2: what shall read as zeroes is unlinked, as it may be while there is no backing file.
	rebaseLosesZeroes = "QEMU shows the backing file that it puts behind an image of version 2 that had none"
	compressesOnce    = "QEMU compresses only what has no cluster, and version 2 can't make it so"
)

var rulesOfQEMU = []rule{
	refused("the engine stores nothing in an encrypted image that is not encrypted, as compressed clusters are", is(byEncryption, "luks"), is(byThen, "compress")),
	refused("the legacy encryption is only read", is(byEncryption, "aes"), isNot(byThen, "none")),
	refused("QEMU does not resize images of version 2 with snapshots", is(byVersion, "2"), isNot(bySnapshots, "0"), is(byChange, "grow", "shrink")),
	senseless(rebaseLosesZeroes, is(byVersion, "2"), is(byBacking, "none"), is(byChange, "rebase")),
	senseless("there is nothing to pull in", is(byThen, "stream"), is(byBacking, "none")),
	refused("snapshots need the backing file", is(byThen, "stream"), isNot(bySnapshots, "0")),
}

var rulesOfEngine = []rule{
	refused("the engine stores nothing in an encrypted image that is not encrypted, as compressed clusters are", is(byEncryption, "luks"), withCompressed),
	refused("QEMU does not resize images of version 2 with snapshots", is(byVersion, "2"), isNot(bySnapshots, "0"), is(byThen, "grow", "shrink")),
	refused("QEMU does not go back to a snapshot where there are bitmaps", is(byThen, "apply"), isNot(byBitmaps, "0")),
	refused("QEMU can't cover with zeroes what a backing file has behind the old end", is(byVersion, "2"), is(byBacking, "qcow2", "raw"), is(byChange, "shrink"), is(byThen, "grow")),
	senseless("it depends on where the disk ends", is(byVersion, "2"), is(byBacking, "two"), is(byChange, "shrink"), is(byThen, "grow")),
	refused("QEMU does not resize images of version 2 with snapshots", is(byVersion, "2"), is(byThen, "apply"), is(byChange, "grow", "shrink")),
	senseless(rebaseLosesZeroes, is(byVersion, "2"), is(byBacking, "none"), is(byThen, "rebase")),
	senseless(rebaseLosesZeroes, is(byVersion, "2"), is(byChange, "rebase"), is(byThen, "rebase")),
	senseless("QEMU counts one reference more before it counts one less", is(byRefcount, "2"), is(bySnapshots, "2"), is(byThen, "apply")),
	senseless(compressesOnce, is(byVersion, "2"), isNot(byBacking, "none"), is(byThen, "compress")),
	senseless(compressesOnce, is(byVersion, "2"), is(byChange, "rebase"), is(byThen, "compress")),
}

// test is a condition as a matrix has it: one bit for each value that meets it.
type test struct {
	f      factor
	values uint32
}

func (t test) met(c *combination) bool { return c.at[t.f] >= 0 && t.values>>c.at[t.f]&1 != 0 }

func (m *matrix) test(w condition) test {
	t := test{f: w.f}
	for i, v := range m.values[w.f] {
		if slices.Contains(w.values, v) != w.not {
			t.values |= 1 << i
		}
	}
	return t
}

// withRules returns the matrix with these rules.
func (m matrix) withRules(rules []rule) *matrix {
	m.rules, m.tests = rules, nil
	for _, r := range rules {
		var tests []test
		for _, w := range r.when {
			tests = append(tests, m.test(w))
		}
		m.tests = append(m.tests, tests)
	}
	return &m
}

// allowed says whether no rule leaves the combination out, whatever is decided later.
func (c *combination) allowed() bool {
	return !slices.ContainsFunc(c.m.tests, func(all []test) bool {
		return !slices.ContainsFunc(all, func(t test) bool { return !t.met(c) })
	})
}

// plainest returns the plainest combination that breaks the rule with a number, and no other.
func (m *matrix) plainest(i int) (combination, bool) {
	var find func(c combination, all []test) (combination, bool)
	find = func(c combination, all []test) (combination, bool) {
		if len(all) == 0 {
			return c.complete(nil)
		}
		for v := range c.m.values[all[0].f] {
			c.at[all[0].f] = int8(v)
			if all[0].met(&c) {
				if done, ok := find(c, all[1:]); ok {
					return done, true
				}
			}
		}
		return c, false
	}
	return find(m.withRules(slices.Delete(slices.Clone(m.rules), i, i+1)).undecided(), m.tests[i])
}

// TestMatrixLeavesOutWhatIsRefused makes an image for each rule that says that a program refuses something: else the matrix would leave out
// what there is.
func TestMatrixLeavesOutWhatIsRefused(t *testing.T) {
	require.Tool(t, "qemu-img", "qemu-io")
	for _, d := range directions {
		b := newBench(t, d)
		t.Run(d.name, func(t *testing.T) {
			for i, r := range b.matrix.rules {
				if !r.refused {
					continue
				}
				t.Run(strings.ReplaceAll(r.why, " ", "_"), func(t *testing.T) {
					t.Parallel()
					c, ok := b.matrix.plainest(i)
					if !ok {
						t.Fatal("no combination breaks this rule only")
					}
					s := b.newSubject(t, i, c)
					err := s.make()
					if err == nil {
						err = s.goOn()
					}
					if err == nil {
						t.Fatalf("nobody refuses %v", c)
					}
					t.Log(err)
				})
			}
		})
	}
}
