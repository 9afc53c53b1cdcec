package storage

import (
	"bytes"
	"fmt"
	"slices"
	"testing"
)

func write(off int64, data string) Op { return Op{Kind: OpWrite, Offset: off, Data: []byte(data)} }

func describe(s CrashState) string {
	return fmt.Sprintf("%v issued=%d durable=%d %q", s.Kind, s.Issued, s.Durable, s.Content)
}

// The states of a small log, worked out by hand.
func TestCrashStatesOfASmallLog(t *testing.T) {
	ops := []Op{
		write(0, "x"),
		{Kind: OpSync},
		{Kind: OpMark, Mark: "not an operation"},
		write(1, "y"),
		{Kind: OpPunch, Offset: 0, Length: 1},
		{Kind: OpTruncate, Length: 1},
	}
	want := []string{
		`kill issued=1 durable=1 "xb"`,
		`kill issued=4 durable=4 "xy"`,
		`kill issued=5 durable=5 "\x00y"`,
		`kill issued=6 durable=6 "\x00"`,

		`power loss issued=1 durable=0 "ab"`,
		`power loss issued=1 durable=0 "xb"`,

		`power loss issued=6 durable=2 "xb"`,    // nothing of write, punch and truncate
		`power loss issued=6 durable=2 "xy"`,    // write
		`power loss issued=6 durable=2 "\x00b"`, // punch
		`power loss issued=6 durable=2 "\x00y"`, // write, punch
		`power loss issued=6 durable=2 "x"`,     // truncate
		`power loss issued=6 durable=2 "x"`,     // write, truncate
		`power loss issued=6 durable=2 "\x00"`,  // punch, truncate
		`power loss issued=6 durable=2 "\x00"`,  // all
	}
	var got []string
	for s := range CrashStates([]byte("ab"), ops, CrashOptions{}) {
		got = append(got, describe(s))
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%q\nwant\n%q", got, want)
	}
}

// A truncate can be durable before a write that came earlier, and the write without the truncate that made room for it.
func TestCrashStatesReorderTruncates(t *testing.T) {
	ops := []Op{{Kind: OpTruncate, Length: 0}, write(2, "z"), {Kind: OpTruncate, Length: 4}}
	want := map[string]bool{
		"ab": true, "": true, "abz": true, "\x00\x00z": true,
		"ab\x00\x00": true, "\x00\x00\x00\x00": true, "abz\x00": true, "\x00\x00z\x00": true,
	}
	for s := range CrashStates([]byte("ab"), ops, CrashOptions{}) {
		if s.Kind == PowerLoss {
			if !want[string(s.Content)] {
				t.Errorf("%s twice, or not possible", describe(s))
			}
			delete(want, string(s.Content))
		}
	}
	if len(want) != 0 {
		t.Errorf("missing: %v", want)
	}
}

// manyWrites returns n writes of one byte each.
func manyWrites(n int) (ops []Op) {
	for i := range n {
		ops = append(ops, write(int64(i), "x"))
	}
	return ops
}

// An interval that is too long to be enumerated is sampled: the corners always, the rest at random.
func TestCrashStatesOfALongInterval(t *testing.T) {
	const n, random = 20, 7
	states := map[string]int{}
	total := 0
	for s := range CrashStates(make([]byte, n), manyWrites(n), CrashOptions{Exhaustive: 4, Random: random}) {
		if s.Kind == PowerLoss {
			states[string(s.Content)]++
			total++
		}
	}
	if total != 2*n+2+random {
		t.Errorf("%d states", total)
	}
	none, all := make([]byte, n), bytes.Repeat([]byte("x"), n)
	corners := [][]byte{none, all}
	for i := range n {
		one, others := slices.Clone(none), slices.Clone(all)
		one[i], others[i] = 'x', 0
		corners = append(corners, one, others)
	}
	for _, c := range corners {
		if states[string(c)] == 0 {
			t.Errorf("%q is missing", c)
		}
	}
}

func TestCrashStatesAreDeterminedBySeed(t *testing.T) {
	ops := append(manyWrites(20), write(100, string(bytes.Repeat([]byte("y"), 3000))))
	all := func(seed uint64) (states []string) {
		for s := range CrashStates(make([]byte, 20), ops, CrashOptions{Seed: seed, Random: 8}) {
			states = append(states, s.Name+describe(s))
		}
		return states
	}
	if !slices.Equal(all(1), all(1)) {
		t.Error("one seed gave different states")
	}
	if slices.Equal(all(1), all(2)) {
		t.Error("different seeds gave the same states")
	}
}

// Of a write, every sector of the disk is there as a whole or not at all, whatever the write's alignment.
func TestCrashStatesTearBetweenSectors(t *testing.T) {
	const size, off, n = 8 * sector, 300, 4*sector + 100
	ops := []Op{write(off, string(bytes.Repeat([]byte{1}, n)))}
	after := make([]byte, size)
	copy(after[off:], ops[0].Data)
	torn := map[CrashKind]bool{}
	for s := range CrashStates(make([]byte, size), ops, CrashOptions{Random: 100}) {
		kept := 0
		for at := 0; at < size; at += sector {
			got := s.Content[at:][:sector]
			switch {
			case bytes.Equal(got, make([]byte, sector)):
			case bytes.Equal(got, after[at:][:sector]):
				kept++
			default:
				t.Fatalf("%s: the sector at %d is torn", s.Name, at)
			}
		}
		torn[s.Kind] = torn[s.Kind] || kept > 0 && kept < 5
		if s.Kind == Kill && s.Durable == 0 && s.Content[off] == 0 {
			t.Errorf("%s: a killed process leaves the beginning of its write", s.Name)
		}
	}
	if !torn[Kill] || !torn[PowerLoss] {
		t.Errorf("kinds with torn writes: %v", torn)
	}
}

// States are the receiver's: changing one changes no other.
func TestCrashStatesAreIndependent(t *testing.T) {
	initial := []byte("ab")
	var first, second []string
	for s := range CrashStates(initial, manyWrites(2), CrashOptions{}) {
		first = append(first, string(s.Content))
	}
	for s := range CrashStates(initial, manyWrites(2), CrashOptions{}) {
		second = append(second, string(s.Content))
		clear(s.Content[:cap(s.Content)])
	}
	if !slices.Equal(first, second) || string(initial) != "ab" {
		t.Errorf("%q became %q", first, second)
	}
}

func TestCrashStatesStop(t *testing.T) {
	total := 0
	for range CrashStates(nil, manyWrites(3), CrashOptions{}) {
		total++
	}
	for limit := range total {
		n := 0
		for range CrashStates(nil, manyWrites(3), CrashOptions{}) {
			if n == limit {
				break
			}
			n++
		}
		if n != limit {
			t.Errorf("stopped after %d states, not %d", n, limit)
		}
	}
}
