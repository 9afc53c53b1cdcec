package qcow_test

import (
	"fmt"
	"maps"
	"slices"
	"testing"

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
				for range x.steps {
					w.random()
				}
				w.do("close", w.img.Close)
				total += w.run(crashOptions(seed), 50)
			})
		}
	}
	t.Logf("%d states", total)
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
