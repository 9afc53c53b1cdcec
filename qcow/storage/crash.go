package storage

import (
	"fmt"
	"iter"
	"math/rand/v2"
)

// CrashKind is how a process ended.
type CrashKind uint8

const (
	// Kill: the process died. Everything it had written is there, the last write perhaps in part.
	Kill CrashKind = iota
	// PowerLoss: the machine died. What was not synced is there or not, in any combination, writes torn between sectors.
	PowerLoss
)

func (k CrashKind) String() string {
	if k == Kill {
		return "kill"
	}
	return "power loss"
}

// CrashState is one content that a file can have after a crash.
type CrashState struct {
	Kind CrashKind
	// Issued is how many operations of the log had been issued: none after it has left a trace.
	Issued int
	// Durable is how many operations of the log are surely in the content, whatever their kind: all up to the last
	// completed sync after a power loss, all issued ones after a kill.
	Durable int
	// Content belongs to the receiver.
	Content []byte
	// Name tells states of one log apart, for messages.
	Name string
}

// CrashOptions bound an enumeration.
type CrashOptions struct {
	Seed       uint64 // of every random choice
	Exhaustive int    // intervals between syncs with at most so many operations are enumerated whole; default 12
	Random     int    // random subsets of every longer interval, and randomly torn states of each; default 64
}

const sector = 512

// CrashStates enumerates what a file that held initial can hold after a crash somewhere in ops: every prefix, as
// a kill leaves it, and for every interval between two syncs the subsets of its operations, as a power loss leaves them, all
// of them when the interval is short, else none, each one alone, all but each one, all, and random ones; and of each interval
// states in which writes are torn at 512-byte boundaries.
func CrashStates(initial []byte, ops []Op, o CrashOptions) iter.Seq[CrashState] {
	if o.Exhaustive == 0 {
		o.Exhaustive = 12
	}
	if o.Random == 0 {
		o.Random = 64
	}
	return func(yield func(CrashState) bool) {
		rng := rand.New(rand.NewPCG(o.Seed, 0))
		_ = kills(initial, ops, rng, yield) && powerLosses(initial, ops, o, rng, yield)
	}
}

func kills(initial []byte, ops []Op, rng *rand.Rand, yield func(CrashState) bool) bool {
	content := NewMemoryFrom(append([]byte(nil), initial...))
	for i, op := range ops {
		if op.Kind == OpMark || op.Kind == OpSync {
			continue
		}
		if op.Kind == OpWrite && sectors(op) > 1 {
			torn := NewMemoryFrom(content.Bytes())
			cut := 1 + rng.IntN(sectors(op)-1)
			applyTorn(torn, op, func(s int) bool { return s < cut })
			if !yield(CrashState{Kind: Kill, Issued: i + 1, Durable: i, Content: torn.b, Name: fmt.Sprintf("kill inside op %d (%v) after %d sectors", i, op, cut)}) {
				return false
			}
		}
		apply(content, op)
		if !yield(CrashState{Kind: Kill, Issued: i + 1, Durable: i + 1, Content: content.Bytes(), Name: fmt.Sprintf("kill after op %d (%v)", i, op)}) {
			return false
		}
	}
	return true
}

func powerLosses(initial []byte, ops []Op, o CrashOptions, rng *rand.Rand, yield func(CrashState) bool) bool {
	base := NewMemoryFrom(append([]byte(nil), initial...))
	for start := 0; start < len(ops); {
		end := start
		for end < len(ops) && ops[end].Kind != OpSync {
			end++
		}
		if !interval(base.Bytes(), ops, start, end, o, rng, yield) {
			return false
		}
		for _, op := range ops[start:end] {
			apply(base, op)
		}
		start = end + 1
	}
	return true
}

// interval yields the states of a power loss after ops[:start] became durable and before the sync at end did.
func interval(base []byte, ops []Op, start, end int, o CrashOptions, rng *rand.Rand, yield func(CrashState) bool) bool {
	var idx []int
	for i := start; i < end; i++ {
		if ops[i].Kind != OpMark {
			idx = append(idx, i)
		}
	}
	emit := func(name string, keep func(k int) bool, tear bool) bool {
		m := NewMemoryFrom(append([]byte(nil), base...))
		set := make([]byte, len(idx))
		for k, i := range idx {
			set[k] = '-'
			if !keep(k) {
				continue
			}
			set[k] = '+'
			if tear && ops[i].Kind == OpWrite && sectors(ops[i]) > 1 && rng.IntN(2) == 0 {
				set[k] = '~'
				applyTorn(m, ops[i], func(int) bool { return rng.IntN(2) == 0 })
				continue
			}
			apply(m, ops[i])
		}
		return yield(CrashState{Kind: PowerLoss, Issued: end, Durable: start, Content: m.b, Name: fmt.Sprintf("power loss in ops %d..%d, %s [%s]", start, end, name, set)})
	}
	n := len(idx)
	if n <= o.Exhaustive {
		for mask := range 1 << n {
			if !emit("subset", func(k int) bool { return mask>>k&1 != 0 }, false) {
				return false
			}
		}
	} else {
		for only := range n {
			if !emit("one", func(k int) bool { return k == only }, false) || !emit("all but one", func(k int) bool { return k != only }, false) {
				return false
			}
		}
		if !emit("none", func(int) bool { return false }, false) || !emit("all", func(int) bool { return true }, false) {
			return false
		}
		for range o.Random {
			if !emit("random", func(int) bool { return rng.IntN(2) == 0 }, false) {
				return false
			}
		}
	}
	torn := false
	for _, i := range idx {
		torn = torn || ops[i].Kind == OpWrite && sectors(ops[i]) > 1
	}
	for range o.Random {
		if torn && !emit("torn", func(int) bool { return rng.IntN(4) != 0 }, true) {
			return false
		}
	}
	return true
}

// sectors returns how many sectors a write touches.
func sectors(op Op) int {
	return int((op.Offset+int64(len(op.Data))+sector-1)/sector - op.Offset/sector)
}

// applyTorn writes the sectors of op that keep names, counted from 0. The file grows only as far as they reach.
func applyTorn(m *Memory, op Op, keep func(s int) bool) {
	for s, pos := 0, int64(0); pos < int64(len(op.Data)); s++ {
		next := min((op.Offset+pos)/sector*sector+sector-op.Offset, int64(len(op.Data)))
		if keep(s) {
			apply(m, Op{Kind: OpWrite, Offset: op.Offset + pos, Data: op.Data[pos:next]})
		}
		pos = next
	}
}

// apply repeats op on m, which has no limit and so cannot fail.
func apply(m *Memory, op Op) {
	var err error
	switch op.Kind {
	case OpWrite:
		_, err = m.WriteAt(op.Data, op.Offset)
	case OpPunch:
		err = m.PunchHole(op.Offset, op.Length)
	case OpTruncate:
		err = m.Truncate(op.Length)
	case OpSync, OpMark:
	}
	if err != nil {
		panic(err) // a file in memory without a limit has no error to give
	}
}
