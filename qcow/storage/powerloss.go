package storage

import (
	"fmt"
	"math/rand/v2"
	"slices"
)

// powerLosses walks a log and yields, before each point that makes something durable, the states that a power loss
// since the previous one leaves.
type powerLosses struct {
	ops   []Op
	o     CrashOptions
	rng   *rand.Rand
	yield func(GroupCrashState) bool

	base    contents
	durable []int // per file: operations of the log up to which those on the file are in base
	pending []int // operations that are not in base, in the order of the log: OpWriteSync ones are sure, others are not
}

func (p *powerLosses) run() bool {
	for i, op := range p.ops {
		switch op.Kind {
		case OpMark:
		case OpSync:
			if !p.interval(i, nil) {
				return false
			}
			p.sync(op.File, i)
		case OpWriteSync:
			if !p.interval(i, &op) {
				return false
			}
			p.pending = append(p.pending, i)
		default:
			p.pending = append(p.pending, i)
		}
	}
	n := len(p.ops)
	if n == 0 || len(p.pending) == 0 && p.ops[n-1].Kind == OpSync {
		return true // the last sync has completed: nothing is uncertain
	}
	return p.interval(n, nil)
}

// sync makes durable what operation at waited for.
func (p *powerLosses) sync(file, at int) {
	p.pending = slices.DeleteFunc(p.pending, func(i int) bool {
		if p.ops[i].File != file {
			return false
		}
		p.base.apply(p.ops[i])
		return true
	})
	p.durable[file] = at + 1
}

// interval yields the states of a power loss when the first completed operations have been made, and running, unless nil, is the
// synchronous write being made.
func (p *powerLosses) interval(completed int, running *Op) bool {
	unsure := 0
	torn := running != nil && running.sectors() > 1
	for _, i := range p.pending {
		if p.ops[i].Kind != OpWriteSync {
			unsure++
			torn = torn || p.ops[i].sectors() > 1
		}
	}
	emit := func(name string, keep func(k int) bool, tear bool) bool {
		return p.emit(completed, running, name, keep, tear)
	}
	if unsure <= p.o.Exhaustive {
		for mask := range 1 << unsure {
			if !emit("subset", func(k int) bool { return mask>>k&1 != 0 }, false) {
				return false
			}
		}
	} else {
		for only := range unsure {
			if !emit("one", func(k int) bool { return k == only }, false) || !emit("all but one", func(k int) bool { return k != only }, false) {
				return false
			}
		}
		if !emit("none", func(int) bool { return false }, false) || !emit("all", func(int) bool { return true }, false) {
			return false
		}
		for range p.o.Random {
			if !emit("random", func(int) bool { return p.rng.IntN(2) == 0 }, false) {
				return false
			}
		}
	}
	for range p.o.Random {
		if torn && !emit("torn", func(int) bool { return p.rng.IntN(4) != 0 }, true) {
			return false
		}
	}
	return true
}

// emit yields one state. Keep says of each unsure operation whether it has reached the disk; tear lets writes do so in part.
func (p *powerLosses) emit(completed int, running *Op, name string, keep func(k int) bool, tear bool) bool {
	state := p.base.clone()
	coin := func(int) bool { return p.rng.IntN(2) == 0 }
	var set []byte // one letter per operation
	k := 0
	for _, i := range p.pending {
		op := p.ops[i]
		if op.Kind == OpWriteSync {
			set = append(set, '=')
			state.apply(op)
			continue
		}
		kept := keep(k)
		k++
		switch {
		case !kept:
			set = append(set, '-')
		case tear && op.sectors() > 1 && coin(0):
			set = append(set, '~')
			state.applyTorn(op, coin)
		default:
			set = append(set, '+')
			state.apply(op)
		}
	}
	issued := completed
	if running != nil {
		issued++
		if tear && running.sectors() > 1 {
			set = append(set, '~')
			state.applyTorn(*running, coin)
		} else {
			set = append(set, '-')
		}
	}
	return p.yield(GroupCrashState{
		Kind: PowerLoss, Issued: issued, Durable: slices.Clone(p.durable), Synced: completed, Contents: state.bytes(),
		Name: fmt.Sprintf("power loss in ops %d..%d, %s [%s]", slices.Min(p.durable), issued, name, set),
	})
}
