package storage

import (
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
)

func writeSync(off int64, data string) Op {
	return Op{Kind: OpWriteSync, Offset: off, Data: []byte(data)}
}

// on returns op on the file with that number.
func on(file int, op Op) Op { op.File = file; return op }

// A synchronous write is missing while it runs, and there from then on; what was written before it may go missing all the same.
func TestCrashStatesOfSynchronousWrites(t *testing.T) {
	ops := []Op{
		write(0, "x"),
		writeSync(1, "y"),
		{Kind: OpMark, Mark: "not an operation"},
		{Kind: OpAllocate, Offset: 1, Length: 2},
		{Kind: OpSync},
		writeSync(0, "z"),
	}
	want := []string{
		`kill issued=1 durable=1 synced=1 "xb"`,
		`kill issued=2 durable=2 synced=2 "xy"`,
		`kill issued=4 durable=4 synced=4 "xy\x00"`,
		`kill issued=6 durable=6 synced=6 "zy\x00"`,

		`power loss issued=2 durable=0 synced=1 "ab"`, // in the first synchronous write
		`power loss issued=2 durable=0 synced=1 "xb"`,
		`power loss issued=4 durable=0 synced=4 "ay"`, // before the sync
		`power loss issued=4 durable=0 synced=4 "xy"`,
		`power loss issued=4 durable=0 synced=4 "ay\x00"`,
		`power loss issued=4 durable=0 synced=4 "xy\x00"`,
		`power loss issued=6 durable=5 synced=5 "xy\x00"`, // in the second
		`power loss issued=6 durable=5 synced=6 "zy\x00"`, // after it
	}
	var got []string
	for s := range CrashStates([]byte("ab"), ops, CrashOptions{}) {
		got = append(got, fmt.Sprintf("%v issued=%d durable=%d synced=%d %q", s.Kind, s.Issued, s.Durable, s.Synced, s.Content))
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%q\nwant\n%q", got, want)
	}
}

// A synchronous write is torn only while it runs.
func TestCrashStatesTearSynchronousWrites(t *testing.T) {
	data := string(bytes.Repeat([]byte{1}, 4*sector))
	ops := []Op{writeSync(0, data), write(8*sector, data)}
	torn := map[CrashKind]int{}
	for s := range CrashStates(make([]byte, 4*sector), ops, CrashOptions{}) {
		kept := bytes.Count(s.Content[:4*sector], []byte{1})
		switch {
		case kept%sector != 0:
			t.Fatalf("%s: %d bytes of the write", s.Name, kept)
		case s.Synced > 0 && kept != 4*sector:
			t.Errorf("%s: a completed synchronous write is not whole", s.Name)
		case s.Synced == 0 && kept != 0 && kept != 4*sector:
			torn[s.Kind]++
		}
	}
	if torn[Kill] == 0 || torn[PowerLoss] == 0 {
		t.Errorf("kinds with torn writes: %v", torn)
	}
}

// The states of two files, worked out by hand: a sync of one leaves the other's operations uncertain.
func TestGroupCrashStates(t *testing.T) {
	ops := []Op{
		write(0, "x"),
		on(1, write(0, "p")),
		{Kind: OpSync},
		write(1, "y"),
		on(1, Op{Kind: OpSync}),
	}
	want := []string{
		`kill 1 [1 1] 1 ["xb" "cd"]`,
		`kill 2 [2 2] 2 ["xb" "pd"]`,
		`kill 4 [4 4] 4 ["xy" "pd"]`,

		`power loss 2 [0 0] 2 ["ab" "cd"]`, // before the first sync
		`power loss 2 [0 0] 2 ["xb" "cd"]`,
		`power loss 2 [0 0] 2 ["ab" "pd"]`,
		`power loss 2 [0 0] 2 ["xb" "pd"]`,
		`power loss 4 [3 0] 4 ["xb" "cd"]`, // before the second
		`power loss 4 [3 0] 4 ["xb" "pd"]`,
		`power loss 4 [3 0] 4 ["xy" "cd"]`,
		`power loss 4 [3 0] 4 ["xy" "pd"]`,
		`power loss 5 [3 5] 5 ["xb" "pd"]`, // after it
		`power loss 5 [3 5] 5 ["xy" "pd"]`,
	}
	var got []string
	for s := range GroupCrashStates([][]byte{[]byte("ab"), []byte("cd")}, ops, CrashOptions{}) {
		got = append(got, fmt.Sprintf("%v %d %v %d %q", s.Kind, s.Issued, s.Durable, s.Synced, s.Contents))
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%q\nwant\n%q", got, want)
	}
}

// outcomes returns every content that the files can have when any of ops are lost except for those that are sure.
func outcomes(initial [][]byte, ops []Op, sure func(i int) bool) map[string]bool {
	all := map[string]bool{}
	for set := range 1 << len(ops) {
		c := newContents(initial)
		for i, op := range ops {
			if sure(i) || set>>i&1 != 0 {
				c.apply(op)
			}
		}
		all[fmt.Sprintf("%q", c.bytes())] = true
	}
	return all
}

// possible returns every content that the files can have after a power loss anywhere in ops, by the definition: at the moment when the
// first done operations have completed, and perhaps one more has begun, each is there or not, except for those that are
// surely there, because their file was synced behind them or because they are synchronous writes.
func possible(initial [][]byte, ops []Op) map[string]bool {
	all := map[string]bool{}
	for done := range len(ops) + 1 {
		maps.Copy(all, outcomes(initial, ops[:min(done+1, len(ops))], func(i int) bool {
			return i < done && (ops[i].Kind == OpWriteSync || slices.ContainsFunc(ops[i:done], func(later Op) bool {
				return later.Kind == OpSync && later.File == ops[i].File
			}))
		}))
	}
	return all
}

// randomOp returns an operation on one of some files of a few bytes. A write consists of value.
func randomOp(rng *rand.Rand, files int, value byte) Op {
	off, n := int64(rng.IntN(5)), 1+rng.IntN(4)
	data := string(bytes.Repeat([]byte{value}, n))
	ops := []Op{
		write(off, data),
		writeSync(off, data),
		{Kind: OpPunch, Offset: off, Length: int64(n)},
		{Kind: OpAllocate, Offset: off, Length: int64(n)},
		{Kind: OpTruncate, Length: off},
		{Kind: OpSync},
		{Kind: OpMark},
	}
	return on(rng.IntN(files), ops[rng.IntN(len(ops))])
}

// The enumeration against the definition, on random logs; and what each state says of itself.
func TestCrashStatesAgainstDefinition(t *testing.T) {
	const seed, rounds, length = 3, 100, 8
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	for i := range rounds {
		initial := make([][]byte, 1+i%3)
		for k := range initial {
			initial[k] = []byte("....")[:rng.IntN(5)]
		}
		ops := make([]Op, 1+rng.IntN(length))
		for k := range ops {
			ops[k] = randomOp(rng, len(initial), byte('a'+k))
		}
		got, agreed := map[string]bool{}, map[string]map[string]bool{}
		for s := range GroupCrashStates(initial, ops, CrashOptions{}) {
			if s.Kind != PowerLoss {
				continue
			}
			content := fmt.Sprintf("%q", s.Contents)
			got[content] = true
			claim := fmt.Sprint(s.Issued, s.Durable, s.Synced)
			if agreed[claim] == nil {
				agreed[claim] = outcomes(initial, ops[:s.Issued], func(i int) bool {
					return i < s.Durable[ops[i].File] || i < s.Synced && ops[i].Kind == OpWriteSync
				})
			}
			if !agreed[claim][content] {
				t.Fatalf("%s: %s contradicts issued %d, durable %d, synced %d, of %q and\n%s", s.Name, content, s.Issued, s.Durable, s.Synced, initial, Trace(ops))
			}
		}
		if want := possible(initial, ops); !maps.Equal(got, want) {
			t.Fatalf("got\n%q\nwant\n%q\nof %q and\n%s", slices.Sorted(maps.Keys(got)), slices.Sorted(maps.Keys(want)), initial, Trace(ops))
		}
	}
}

func TestGroupCrashStatesStop(t *testing.T) {
	ops := []Op{write(0, "a"), on(1, writeSync(0, "b")), {Kind: OpSync}, on(1, write(1, "c"))}
	initial := [][]byte{nil, nil}
	total := 0
	for range GroupCrashStates(initial, ops, CrashOptions{}) {
		total++
	}
	for limit := range total {
		n := 0
		for range GroupCrashStates(initial, ops, CrashOptions{}) {
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
