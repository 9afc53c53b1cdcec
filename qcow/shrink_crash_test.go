package qcow_test

import (
	"fmt"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// TestCrashShrink enumerates what a kill or a power loss leaves of random workloads in which the disk shrinks and grows again, with
// snapshots and without.
func TestCrashShrink(t *testing.T) {
	require.Tool(t, "qemu-img")
	seeds, o := 1, storage.CrashOptions{Exhaustive: 8, Random: 12}
	if long() {
		seeds, o = 60, storage.CrashOptions{}
	}
	counts := map[string]int{}
	for _, shape := range []struct {
		image     qcow.CreateOptions
		reserve   int64 // clusters
		rounds    int
		snapshots bool
	}{
		{qcow.CreateOptions{Size: 90 << 10, ClusterSize: 512, RefcountBits: 1}, 4, 12, false},
		{qcow.CreateOptions{Size: 90 << 10, ClusterSize: 512, RefcountBits: 32}, 8, 9, true},
		{qcow.CreateOptions{Size: 60 << 10, ClusterSize: 1024, RefcountBits: 64}, 3, 8, true},
		{qcow.CreateOptions{Size: 80 << 10, ClusterSize: 4096, RefcountBits: 16}, 2, 5, true},
	} {
		for seed := range uint64(seeds) {
			t.Run(fmt.Sprintf("cluster=%d/refcount=%d/seed=%d", shape.image.ClusterSize, shape.image.RefcountBits, seed), func(t *testing.T) {
				w, initial := newCrashWorkload(t, seed+200, shape.image, shape.reserve*int64(shape.image.ClusterSize), 16<<10)
				for round := range shape.rounds {
					for range w.rng.IntN(6) {
						w.random()
					}
					if shape.snapshots && round%4 == 1 && len(w.kept) < 2 {
						w.createSnapshot(false)
					}
					full := w.img.Size()
					w.shrink(full-sector-w.rng.Int64N(full*2/3)/sector*sector, w.calmDown())
					w.random()
					if shape.snapshots && round%5 == 3 {
						w.applySnapshot(false)
					}
					if w.img.Size() < shape.image.Size {
						w.resize(shape.image.Size)
						w.write(w.img.Size()-w.cluster, w.cluster)
					}
				}
				w.do("close", w.img.Close)
				o.Seed = seed
				w.runWorlds(initial, o, 7, 100, counts)
			})
		}
	}
	expectStates(t, counts, "shrink")
}
