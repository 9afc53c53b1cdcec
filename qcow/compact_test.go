package qcow_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// scattered makes an image whose clusters are spread over a file that is twice as long as it need be, and returns its content.
func scattered(t testing.TB, f storage.File, rng *rand.Rand, snapshots int) []byte {
	t.Helper()
	var content []byte
	change(t, f, func(img *qcow.Image) {
		cluster := int64(img.Info().ClusterSize)
		content = make([]byte, img.Size())
		clusters := rng.Perm(int(img.Size() / cluster))
		for i, c := range clusters {
			off := int64(c) * cluster
			p := repeated(byte(1+rng.IntN(255)), cluster)
			writeAt(t, img, p, off)
			copy(content[off:], p)
			if snapshots > 0 && i > 0 && i%(len(clusters)/snapshots) == 0 {
				if _, err := img.CreateSnapshot(t.Context(), fmt.Sprintf("s%d", i), time.Unix(1, 0)); err != nil {
					t.Fatal(err)
				}
			}
		}
		for _, c := range clusters[:len(clusters)/2] {
			off := int64(c) * cluster
			if err := img.Discard(off, cluster); err != nil {
				t.Fatal(err)
			}
			clear(content[off:][:cluster])
		}
	})
	return content
}

func TestCompact(t *testing.T) {
	for _, o := range []qcow.CreateOptions{
		{Size: 128 << 10, ClusterSize: 512, RefcountBits: 16},
		{Size: 256 << 10, ClusterSize: 1024, RefcountBits: 64},
		{Size: 4 << 20, ClusterSize: 4096, RefcountBits: 8},
		{Size: 32 << 20, ClusterSize: 65536},
	} {
		for _, snapshots := range []int{0, 3} {
			t.Run(fmt.Sprintf("cluster=%d/snapshots=%d", o.ClusterSize, snapshots), func(t *testing.T) {
				f := create(t, o)
				content := scattered(t, f, rand.New(rand.NewPCG(1, 1)), snapshots)
				before := snapshotContents(t, f)
				var last, total int64
				change(t, f, func(img *qcow.Image) {
					start := img.Info().FileSize
					done, err := img.Compact(t.Context(), func(d, n int64) {
						if d < last || d > n {
							t.Errorf("progress went from %d to %d of %d", last, d, n)
						}
						last, total = d, n
					})
					if err != nil {
						t.Fatal(err)
					}
					t.Logf("%d -> %d bytes, %d moved, progress %d of %d", start, done.After, done.Moved, last, total)
					if snapshots == 0 && done.After > start*2/3 {
						t.Errorf("the file shrank only from %d to %d", start, done.After)
					}
					expectAt(t, img, content, 0)
					again, err := img.Compact(t.Context(), nil)
					if err != nil || again.After > done.After {
						t.Errorf("again: %+v, %v", again, err)
					}
				})
				expectClean(t, f.Bytes())
				for name, want := range before {
					if !bytes.Equal(snapshotContents(t, f)[name], want) {
						t.Errorf("snapshot %s has changed", name)
					}
				}
			})
		}
	}
}

// snapshotContents returns the content of every snapshot.
func snapshotContents(t testing.TB, f *storage.Memory) map[string][]byte {
	t.Helper()
	contents := map[string][]byte{}
	img := open(t, storage.NewMemoryFrom(f.Bytes()), qcow.Options{ReadOnly: true})
	for _, s := range img.Snapshots() {
		old := open(t, storage.NewMemoryFrom(f.Bytes()), qcow.Options{ReadOnly: true, Snapshot: s.ID})
		b := make([]byte, old.Size())
		if _, err := old.ReadAt(b, 0); err != nil {
			t.Fatal(err)
		}
		contents[s.ID] = b
	}
	return contents
}

// Guests write, discard and read while the image is compacted again and again.
func TestCompactUnderLoad(t *testing.T) {
	f := create(t, qcow.CreateOptions{Size: 8 << 20, ClusterSize: 4096})
	content := scattered(t, f, rand.New(rand.NewPCG(2, 2)), 2)
	img := open(t, f, qcow.Options{ReserveBytes: 64 << 10})
	var wg sync.WaitGroup
	const guests = 4
	part := int64(len(content)) / guests
	ctx, stop := context.WithCancel(t.Context())
	for g := range int64(guests) {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(3, uint64(g)))
			mine := content[g*part:][:part]
			for i := 0; i < 3000 || ctx.Err() == nil; i++ {
				n := 1 + rng.Int64N(20<<10)
				off := rng.Int64N(part - n)
				var err error
				switch rng.IntN(8) {
				case 0:
					off, n = off&^4095, (n+4095)&^4095
					if n = min(n, part-off); n > 0 {
						err = img.Discard(g*part+off, n)
						clear(mine[off:][:n])
					}
				case 1:
					err = img.Flush()
				case 2, 3:
					got := make([]byte, n)
					if _, err = img.ReadAt(got, g*part+off); err == nil && !bytes.Equal(got, mine[off:][:n]) {
						err = fmt.Errorf("guest %d: %d bytes at %d differ", g, n, off)
					}
				default:
					p := repeated(byte(rng.Uint32()), n)
					copy(mine[off:], p)
					_, err = img.WriteAt(p, g*part+off)
				}
				if err != nil {
					t.Error(err)
					return
				}
				if i > 100000 {
					break
				}
			}
		})
	}
	for range 6 {
		if _, err := img.Compact(t.Context(), nil); err != nil {
			t.Error(err)
		}
	}
	stop()
	wg.Wait()
	expectAt(t, img, content, 0)
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	expectClean(t, f.Bytes())
}

// A compaction that is given up leaves what it has moved, and a clean image.
func TestCompactCancelled(t *testing.T) {
	f := create(t, qcow.CreateOptions{Size: 4 << 20, ClusterSize: 4096})
	content := scattered(t, f, rand.New(rand.NewPCG(4, 4)), 1)
	ctx, cancel := context.WithCancel(t.Context())
	change(t, f, func(img *qcow.Image) {
		if _, err := img.Compact(ctx, func(done, _ int64) {
			if done > 0 {
				cancel()
			}
		}); !errors.Is(err, context.Canceled) {
			t.Fatalf("compact: %v", err)
		}
		expectAt(t, img, content, 0)
	})
	expectClean(t, f.Bytes())
}
