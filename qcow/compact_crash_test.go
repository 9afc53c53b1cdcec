package qcow_test

import (
	"context"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// compact moves clusters; no sector may change for that.
func (w *crashWorkload) compact() (moved int64) {
	w.do("compact", func() error {
		done, err := w.img.Compact(context.Background(), nil)
		moved = done.Moved
		return err
	})
	return moved
}

// TestCrashCompact enumerates what a crash leaves of compactions between random requests, without snapshots and with some.
func TestCrashCompact(t *testing.T) {
	require.Tool(t, "qemu-img")
	total := 0
	for _, c := range []struct {
		image     qcow.CreateOptions
		snapshots int
	}{
		{qcow.CreateOptions{Size: 96 << 10, ClusterSize: 512, RefcountBits: 64}, 0},
		{qcow.CreateOptions{Size: 96 << 10, ClusterSize: 512, RefcountBits: 16}, 2},
		{qcow.CreateOptions{Size: 256 << 10, ClusterSize: 1024, RefcountBits: 8}, 0},
		{qcow.CreateOptions{Size: 512 << 10, ClusterSize: 4096, RefcountBits: 16}, 1},
	} {
		w, initial := newCrashWorkload(t, 3, c.image, 8*int64(c.image.ClusterSize), c.image.Size/2)
		moved := int64(0)
		for i := range 4 {
			for range 8 {
				w.random()
			}
			if i < c.snapshots {
				w.createSnapshot(false)
			}
			w.discard(w.cluster*int64(i), c.image.Size/8)
			w.flush()
			moved += w.compact()
		}
		w.do("close", w.img.Close)
		if moved == 0 {
			t.Error("no compaction moved anything")
		}
		total += w.run(initial, storage.CrashOptions{Seed: 3, Exhaustive: 6, Random: 6}, 100)
	}
	t.Logf("%d states", total)
}
