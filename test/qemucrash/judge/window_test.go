package judge

import (
	"bytes"
	"math/rand/v2"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// randomOps returns what might have been done to two files.
func randomOps(rng *rand.Rand) []storage.Op {
	var ops []storage.Op
	for range 3 + rng.IntN(12) {
		op := storage.Op{File: rng.IntN(2), Offset: rng.Int64N(24 * sector)}
		n := rng.Int64N(3 * sector)
		if rng.IntN(2) == 0 {
			op.Offset, n = op.Offset/sector*sector, n/sector*sector
		}
		op.Length = n
		switch op.Kind = storage.OpKind(rng.IntN(int(storage.OpAllocate) + 1)); op.Kind {
		case storage.OpWrite, storage.OpWriteSync:
			op.Length = 0
			op.Data = bytes.Repeat([]byte{byte(1 + rng.IntN(200))}, int(n)+1)
		case storage.OpTruncate:
			op.Offset, op.Length = 0, rng.Int64N(24*sector)
		case storage.OpPunch, storage.OpAllocate:
		case storage.OpSync, storage.OpMark:
			op.Offset, op.Length = 0, 0
		}
		ops = append(ops, op)
	}
	return ops
}

// The states of the windows are those of the files, one by one.
func TestWindow(t *testing.T) {
	const seed = 7
	rng := rand.New(rand.NewPCG(seed, 0))
	states := 0
	for round := range 60 {
		trial := &Trial{Images: []Image{{}, {}}, Ops: randomOps(rng)}
		var initial [][]byte
		for i := range trial.Images {
			b := make([]byte, rng.IntN(20*sector))
			for k := range b {
				b[k] = byte(201 + rng.IntN(50))
			}
			trial.Images[i].Initial = b
			initial = append(initial, b)
		}
		p := newPopulation(trial, uint64(round))
		p.options.Random = 4
		p.options.Exhaustive = 6
		var want []storage.GroupCrashState
		for s := range storage.GroupCrashStates(initial, trial.Ops, p.options) {
			want = append(want, s)
		}
		count := 0
		for i, s := range p.states() {
			count++
			states++
			if i >= len(want) || s.Kind != want[i].Kind || s.Issued != want[i].Issued {
				t.Fatalf("seed %d, round %d: state %d is %q\n%s", seed, round, i, s.Name, storage.Trace(trial.Ops))
			}
			for f, w := range p.windows {
				if !bytes.Equal(w.full(s.Contents[f]), want[i].Contents[f]) {
					t.Fatalf("seed %d, round %d: file %d differs in state %d, %s\n%s", seed, round, f, i, want[i].Name, storage.Trace(trial.Ops))
				}
			}
		}
		if count != len(want) {
			t.Fatalf("seed %d, round %d: %d states, not %d", seed, round, count, len(want))
		}
	}
	t.Logf("%d states", states)
}

// A window is as large as what is touched, not as the file.
func TestWindowIsSmall(t *testing.T) {
	ops := []storage.Op{
		{Kind: storage.OpWrite, Offset: 1000, Data: make([]byte, 100)},
		{Kind: storage.OpPunch, Offset: 1 << 20, Length: 2 * sector},
		{Kind: storage.OpWrite, Offset: 4<<20 - 10, Data: make([]byte, 20)},
	}
	w := newWindow(make([]byte, 4<<20), ops, 0)
	if n := len(w.small()); n != 5*sector {
		t.Errorf("%d bytes", n)
	}
}
