package qcow_test

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// TestBitmapsRecord lets bitmaps of many granularities record random requests, and holds them against a model: in memory, after opening the image
// again for reading and for writing, and as QEMU reads them.
func TestBitmapsRecord(t *testing.T) {
	require.Tool(t, "qemu-img", "qemu-nbd", "nbdinfo")
	for _, shape := range []qcow.CreateOptions{
		{Size: 1<<20 + 512, ClusterSize: 512, RefcountBits: 16},
		{Size: 3<<20 + 7*512, ClusterSize: 4096, RefcountBits: 16},
		{Size: 40<<20 + 3*512, ClusterSize: 64 << 10, RefcountBits: 8},
		{Size: 100 << 20, ClusterSize: 2 << 20, RefcountBits: 64},
	} {
		t.Run(fmt.Sprintf("cluster=%d", shape.ClusterSize), func(t *testing.T) {
			t.Parallel()
			f := create(t, shape)
			models := map[string]*dirtyModel{}
			rng := rand.New(rand.NewPCG(3, uint64(shape.ClusterSize)))
			note := func(off, n int64) {
				for _, m := range models {
					m.note(off, n)
				}
			}
			change(t, f, func(img *qcow.Image) {
				for bits := 9; bits <= 31; bits += 1 + rng.IntN(5) {
					name := fmt.Sprintf("g%d", bits)
					addBitmap(t, img, name, qcow.BitmapOptions{Granularity: 1 << bits})
					models[name] = newDirtyModel(shape.Size, 1<<bits)
				}
				addBitmap(t, img, "off", qcow.BitmapOptions{Disabled: true})
				g := guest{t: t, rng: rng, img: img, note: note}
				for range 6 {
					g.step()
				}
				for name, m := range models {
					expectDirty(t, img, name, m.extents())
				}
			})
			for range 2 {
				read := open(t, storage.NewMemoryFrom(f.Bytes()), qcow.Options{ReadOnly: true})
				for name, m := range models {
					expectDirty(t, read, name, m.extents())
				}
				expectDirty(t, read, "off", nil)
				do(t, read.Close())
				expectClean(t, f.Bytes())
				change(t, f, func(img *qcow.Image) {
					g := guest{t: t, rng: rng, img: img, note: note}
					for range 6 {
						g.step()
					}
				})
			}
			q := newQEMUFile(t, f.Bytes())
			for _, b := range q.bitmaps() {
				want, flags := models[b.Name].extentsOrNone(), "[auto]"
				if b.Name == "off" {
					flags = "[]"
				}
				if got := fmt.Sprint(b.Flags); got != flags {
					t.Errorf("bitmap %q has flags %v for QEMU, want %v", b.Name, got, flags)
				}
				q.expectDirty(b.Name, want)
			}
			q.expectClean()
		})
	}
}
