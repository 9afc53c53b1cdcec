package qcow_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/check"
	"github.com/qcow-csi/qcow-csi/qcow/codec"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// mixed returns n bytes of which some clusters compress well, some do not, and some are zeroes.
func mixed(rng *rand.Rand, n int64, cluster int) []byte {
	b := make([]byte, n)
	for off := 0; off < len(b); off += cluster {
		c := b[off:min(off+cluster, len(b))]
		switch kind := rng.IntN(6); {
		case kind == 0:
		case kind == 1:
			for i := range c {
				c[i] = byte(rng.Uint32())
			}
		default:
			for i := range c {
				c[i] = byte(i / (1 + off%97))
				if rng.IntN(20) == 0 {
					c[i] = byte(rng.Uint32())
				}
			}
		}
	}
	return b
}

func TestWriteCompressed(t *testing.T) {
	for _, o := range []qcow.CreateOptions{
		{Size: 512<<10 + 512, ClusterSize: 512},
		{Size: 4<<20 + 1024, ClusterSize: 4096, RefcountBits: 4},
		{Size: 4 << 20, ClusterSize: 4096, RefcountBits: 1},
		{Size: 16<<20 + 512, ClusterSize: 65536, RefcountBits: 64},
		{Size: 16<<20 + 512, ClusterSize: 65536, Compression: codec.Zstd},
		{Size: 16 << 20, ClusterSize: 65536, ExtendedL2: true},
		{Size: 24 << 20, ClusterSize: 2 << 20},
	} {
		t.Run(fmt.Sprintf("cluster=%d/refcount=%d/%v/extended=%v", o.ClusterSize, o.RefcountBits, o.Compression, o.ExtendedL2), func(t *testing.T) {
			rng := rand.New(rand.NewPCG(1, 1))
			f := create(t, o)
			content := mixed(rng, o.Size, o.ClusterSize)
			cluster := int64(o.ClusterSize)
			change(t, f, func(img *qcow.Image) {
				if err := img.WriteCompressed(content, 0); err != nil {
					t.Fatal(err)
				}
				expectAt(t, img, content, 0)
			})
			expectClean(t, f.Bytes())
			report, err := check.Check(t.Context(), f, check.Options{})
			if err != nil {
				t.Fatal(err)
			}
			if o.RefcountBits != 1 && report.CompressedClusters < report.AllocatedClusters/2 {
				t.Errorf("%d of %d clusters are compressed", report.CompressedClusters, report.AllocatedClusters)
			}
			// Overwrite some, in whole and in part, compressed and not, and discard some.
			change(t, f, func(img *qcow.Image) {
				for range 60 {
					n := 1 + rng.Int64N(3*cluster)
					off := rng.Int64N(o.Size - n)
					switch rng.IntN(4) {
					case 0:
						off -= off % cluster
						n = min((n+cluster-1)/cluster*cluster, o.Size-off)
						p := mixed(rng, n, o.ClusterSize)
						if err := img.WriteCompressed(p, off); err != nil {
							t.Fatal(err)
						}
						copy(content[off:], p)
					case 1:
						off -= off % cluster
						n = min(cluster, o.Size-off)
						if err := img.Discard(off, n); err != nil {
							t.Fatal(err)
						}
						clear(content[off:][:n])
					case 2:
						if err := img.Flush(); err != nil {
							t.Fatal(err)
						}
					default:
						p := repeated(byte(rng.Uint32()), n)
						writeAt(t, img, p, off)
						copy(content[off:], p)
					}
				}
				expectAt(t, img, content, 0)
			})
			expectClean(t, f.Bytes())
			img := open(t, f, qcow.Options{ReadOnly: true})
			expectAt(t, img, content, 0)
		})
	}
}

// What a crash leaves while compressed clusters are written, overwritten and discarded.
func TestCrashCompressed(t *testing.T) {
	for _, o := range []qcow.CreateOptions{
		{Size: 96 << 10, ClusterSize: 1024, RefcountBits: 16},
		{Size: 256 << 10, ClusterSize: 4096, RefcountBits: 4, Compression: codec.Zstd},
	} {
		w, initial := newCrashWorkload(t, 9, o, 8*int64(o.ClusterSize), 24<<10)
		for range 25 {
			w.random()
			n := (1 + w.rng.Int64N(8)) * w.cluster
			off := w.rng.Int64N((w.img.Size()-n)/w.cluster) * w.cluster
			w.serial++
			value := w.serial
			e := w.do(fmt.Sprintf("write compressed %d+%d", off, n), func() error { return w.img.WriteCompressed(sectorsOf(value, n), off) })
			w.note(e, off, n, value)
		}
		w.do("close", w.img.Close)
		t.Logf("%d states", w.run(initial, storage.CrashOptions{Seed: 9, Exhaustive: 6, Random: 8}, 200))
	}
}

func TestWriteCompressedRefuses(t *testing.T) {
	img := open(t, create(t, qcow.CreateOptions{Size: 1<<20 + 512}), qcow.Options{})
	for _, c := range []struct{ off, n int64 }{{512, 65536}, {0, 512}, {0, 65537}, {1 << 20, 65536}, {1 << 21, 65536}, {-65536, 65536}} {
		expectClass(t, fmt.Sprintf("%d bytes at %d", c.n, c.off), img.WriteCompressed(bytes.Repeat([]byte{1}, int(c.n)), c.off), qcow.ErrInvalid)
	}
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
}
