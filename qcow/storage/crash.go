package storage

import (
	"fmt"
	"iter"
	"math/rand/v2"
	"slices"
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
	// Synced is how many operations of the log had completed: every OpWriteSync among them is surely in the content too.
	Synced int
	// Content belongs to the receiver.
	Content []byte
	// Name tells states of one log apart, for messages.
	Name string
}

// GroupCrashState is what the files of a group can hold together after a crash. The fields that it has in common with
// [CrashState] mean the same.
type GroupCrashState struct {
	Kind     CrashKind
	Issued   int
	Durable  []int // per file: of the first so many operations of the log, those on the file are surely in its content
	Synced   int
	Contents [][]byte // per file
	Name     string
}

// CrashOptions bound an enumeration.
type CrashOptions struct {
	Seed       uint64 // of every random choice
	Exhaustive int    // intervals between syncs with at most so many operations are enumerated whole; default 12
	Random     int    // random subsets of every longer interval, and randomly torn states of each; default 64
}

const sector = 512

// CrashStates enumerates what a file that held initial can hold after a crash somewhere in ops, the log of a recorder
// without a group: every prefix, as a kill leaves it, and for every interval between two syncs the subsets of its operations, as
// a power loss leaves them, all of them when the interval is short, else none, each one alone, all but each one, all, and
// random ones; and of each interval states in which writes are torn at 512-byte boundaries.
//
// A synchronous write ([File.WriteSync]) divides its interval: while it runs it is missing or torn and those before it are
// there or not, and after it has completed it is there in every state. It says nothing about the others.
func CrashStates(initial []byte, ops []Op, o CrashOptions) iter.Seq[CrashState] {
	return func(yield func(CrashState) bool) {
		for s := range GroupCrashStates([][]byte{initial}, ops, o) {
			if !yield(CrashState{Kind: s.Kind, Issued: s.Issued, Durable: s.Durable[0], Synced: s.Synced, Content: s.Contents[0], Name: s.Name}) {
				return
			}
		}
	}
}

// GroupCrashStates does for the files of a [RecorderGroup] what [CrashStates] does for one. Initial is what the files held, in
// the order of the group. A sync makes the operations on its own file durable and no others; the states before it are
// those of every file's interval, combined.
func GroupCrashStates(initial [][]byte, ops []Op, o CrashOptions) iter.Seq[GroupCrashState] {
	if o.Exhaustive == 0 {
		o.Exhaustive = 12
	}
	if o.Random == 0 {
		o.Random = 64
	}
	return func(yield func(GroupCrashState) bool) {
		rng := rand.New(rand.NewPCG(o.Seed, 0))
		if !kills(newContents(initial), ops, rng, yield) {
			return
		}
		p := powerLosses{ops: ops, o: o, rng: rng, yield: yield, base: newContents(initial), durable: make([]int, len(initial))}
		p.run()
	}
}

func kills(c contents, ops []Op, rng *rand.Rand, yield func(GroupCrashState) bool) bool {
	emit := func(c contents, issued, durable int, name string) bool {
		return yield(GroupCrashState{
			Kind: Kill, Issued: issued, Durable: slices.Repeat([]int{durable}, len(c)), Synced: durable, Contents: c.bytes(), Name: name,
		})
	}
	for i, op := range ops {
		if op.Kind == OpMark || op.Kind == OpSync {
			continue
		}
		if n := op.sectors(); n > 1 {
			torn := c.clone()
			cut := 1 + rng.IntN(n-1)
			torn.applyTorn(op, func(s int) bool { return s < cut })
			if !emit(torn, i+1, i, fmt.Sprintf("kill inside op %d (%v) after %d sectors", i, op, cut)) {
				return false
			}
		}
		c.apply(op)
		if !emit(c.clone(), i+1, i+1, fmt.Sprintf("kill after op %d (%v)", i, op)) {
			return false
		}
	}
	return true
}

// contents are the files of a group.
type contents []*Memory

func newContents(b [][]byte) contents {
	c := make(contents, len(b))
	for i := range b {
		c[i] = NewMemoryFrom(slices.Clone(b[i]))
	}
	return c
}

func (c contents) bytes() [][]byte {
	b := make([][]byte, len(c))
	for i, m := range c {
		b[i] = m.b
	}
	return b
}

func (c contents) clone() contents { return newContents(c.bytes()) }

// apply repeats op, which cannot fail: the files have no limit.
func (c contents) apply(op Op) {
	m := c[op.File]
	var err error
	switch op.Kind {
	case OpWrite, OpWriteSync:
		_, err = m.WriteAt(op.Data, op.Offset)
	case OpPunch:
		err = m.PunchHole(op.Offset, op.Length)
	case OpTruncate:
		err = m.Truncate(op.Length)
	case OpAllocate:
		err = m.Allocate(op.Offset, op.Length)
	case OpSync, OpMark:
	}
	if err != nil {
		panic(err) // a file in memory without a limit has no error to give
	}
}

// applyTorn writes the sectors of op that keep names, counted from 0. The file grows only as far as they reach.
func (c contents) applyTorn(op Op, keep func(s int) bool) {
	for s, pos := 0, int64(0); pos < int64(len(op.Data)); s++ {
		next := min((op.Offset+pos)/sector*sector+sector-op.Offset, int64(len(op.Data)))
		if keep(s) {
			c.apply(Op{Kind: OpWrite, File: op.File, Offset: op.Offset + pos, Data: op.Data[pos:next]})
		}
		pos = next
	}
}

// sectors returns how many sectors a write touches; 0 for other operations.
func (o Op) sectors() int {
	if o.Kind != OpWrite && o.Kind != OpWriteSync {
		return 0
	}
	return int((o.Offset+int64(len(o.Data))+sector-1)/sector - o.Offset/sector)
}
