package qcow_test

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// TestCrashJournal enumerates what a kill leaves of random requests over a backing file while links are held back, and what a power loss does. With
// the journal nothing that was acknowledged is gone after a kill; a power loss shows what was flushed last, or something younger.
func TestCrashJournal(t *testing.T) {
	require.Tool(t, "qemu-img")
	seeds := uint64(4)
	if long() {
		seeds = 80
	}
	total := 0
	for _, name := range slices.Sorted(maps.Keys(cowShapes)) {
		x := cowShapes[name]
		for seed := range seeds {
			t.Run(fmt.Sprintf("%s/seed=%d", name, seed), func(t *testing.T) {
				links := 16
				if seed >= 2 { // more than the requests need
					links = 1000
				}
				w := newChainCrash(t, seed, x.layers, []int{len(x.layers) - 1}, qcow.Options{
					ReserveBytes: x.reserve * int64(x.layers[len(x.layers)-1].cluster), Journal: newJournal(links),
				})
				for i := range x.steps {
					w.random()
					if i%4 == 0 {
						w.writeSync()
					}
				}
				w.do("close", w.img.Close)
				total += w.run(crashOptions(seed), 50)
			})
		}
	}
	t.Logf("%d states", total)
}

// writeSync writes a sector durably, not far behind one that was written before.
func (w *chainCrash) writeSync() {
	w.t.Helper()
	w.write(w.rng.Int64N(w.img.Size()/w.cluster)*w.cluster, sector)
	off := w.rng.Int64N(w.img.Size()/sector) * sector
	w.serial++
	value := w.serial
	e := w.do(fmt.Sprintf("write durably %d+%d", off, sector), func() error {
		_, err := w.img.WriteSync(sectorsOf(value, sector), off)
		return err
	})
	e.durable = true
	w.note(e, off, sector, value)
}

// TestCrashJournalSnapshots is TestCrashJournal with internal snapshots, which hold what writes replace: each of them is there or not, as a
// whole, and never changes.
func TestCrashJournalSnapshots(t *testing.T) {
	require.Tool(t, "qemu-img")
	seeds := uint64(2)
	if long() {
		seeds = 40
	}
	total := 0
	for _, top := range []layer{{size: 24 << 10, cluster: 1024}, {size: 24 << 10, cluster: 512}, {kind: "extended", size: 64 << 10, cluster: 16 << 10}} {
		for seed := range seeds {
			t.Run(fmt.Sprintf("%s%d/seed=%d", top.kind, top.cluster, seed), func(t *testing.T) {
				w := newChainCrash(t, seed, []layer{top}, []int{0}, qcow.Options{ReserveBytes: 8 * int64(top.cluster), Journal: newJournal(40)})
				k := &keptStates{w: w}
				w.also = k.verify
				for i := range 3 {
					k.create(fmt.Sprint("s", i))
					if i > 1 {
						k.remove()
					}
					for range 7 {
						w.random()
					}
				}
				w.do("close", w.img.Close)
				total += w.run(crashOptions(seed), 200)
			})
		}
	}
	t.Logf("%d states", total)
}

// keptStates are the snapshots of a workload.
type keptStates struct {
	w    *chainCrash
	list []keptState
}

type keptState struct {
	name    string
	content []byte
	made    event
	gone    *event
}

func (k *keptStates) create(name string) {
	k.w.t.Helper()
	s := keptState{name: name, content: diskOf(k.w.t, k.w.img)}
	s.made = k.w.do("create "+name, func() error { _, err := k.w.img.CreateSnapshot(k.w.t.Context(), name, time.Unix(1, 0)); return err })
	k.w.flushes = append(k.w.flushes, s.made)
	k.list = append(k.list, s)
}

// remove deletes the oldest one.
func (k *keptStates) remove() {
	k.w.t.Helper()
	for i := range k.list {
		if s := &k.list[i]; s.gone == nil {
			e := k.w.do("delete "+s.name, func() error { return k.w.img.DeleteSnapshot(k.w.t.Context(), s.name) })
			s.gone = &e
			return
		}
	}
}

func (k *keptStates) verify(state *storage.GroupCrashState, f files) error {
	for _, s := range k.list {
		img, err := qcow.Open(f[k.w.top], qcow.Options{ReadOnly: true, Snapshot: s.name})
		mayLack := s.made.end > state.Issued || s.gone != nil && s.gone.start < state.Issued
		if errors.Is(err, qcow.ErrNotFound) && mayLack {
			continue
		}
		if err != nil {
			return fmt.Errorf("snapshot %s: %w", s.name, err)
		}
		got := make([]byte, len(s.content))
		if _, err := img.ReadAt(got, 0); err != nil {
			return err
		}
		if i := firstDifference(got, s.content); i >= 0 {
			return fmt.Errorf("snapshot %s: byte %d differs", s.name, i)
		}
	}
	return nil
}

// The enumeration finds it when a process is killed and nobody has its journal.
func TestCrashJournalIsNeeded(t *testing.T) {
	for name, x := range cowShapes {
		if name == "old" { // version 2 has none
			continue
		}
		w := newChainCrash(t, 0, x.layers, []int{len(x.layers) - 1}, qcow.Options{ReserveBytes: 64 << 10, Journal: newJournal(1000)})
		for range 20 {
			w.random()
		}
		ops := w.group.Ops()
		for i := range ops {
			if ops[i].File == 1 {
				ops[i] = storage.Op{Kind: storage.OpMark}
			}
		}
		n, err := w.states(ops, crashOptions(0), 1<<30)
		if err == nil && stride == 1 {
			t.Errorf("%s: none of %d states shows that the journal is missing", name, n)
		}
		t.Logf("%s: state %d: %v", name, n, err)
	}
}

// The enumeration finds it when data is not durable before held-back links are written.
func TestCrashJournalFindsMissingSyncs(t *testing.T) {
	w := newChainCrash(t, 1, cowShapes["raw"].layers, []int{1}, qcow.Options{ReserveBytes: 64 << 10, Journal: newJournal(1000)})
	for i := range int64(8) {
		w.write(i*2048+512, 512)
		if i%3 == 2 {
			w.flush()
		}
	}
	ops := w.group.Ops()
	for i := range ops {
		if i+1 < len(ops) && ops[i].Kind == storage.OpSync && len(ops[i+1].Data) > 0 && len(ops[i+1].Data) <= 64 && ops[i+1].File == 0 {
			ops[i] = storage.Op{Kind: storage.OpMark, Mark: "no sync"}
		}
	}
	n, err := w.states(ops, crashOptions(0), 1<<30)
	if err == nil && stride == 1 {
		t.Fatalf("none of %d states shows that syncs are missing", n)
	}
	t.Logf("state %d: %v", n, err)
}
