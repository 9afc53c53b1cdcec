package interop_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"golang.org/x/sync/errgroup"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// TestQEMUAcceptsWhatIsWrittenHere writes at random and has QEMU check, read and map the result, again and again.
func TestQEMUAcceptsWhatIsWrittenHere(t *testing.T) {
	require.Tool(t, "qemu-img")
	rng := random(t)
	for _, s := range shapes() {
		t.Run(s.String(), func(t *testing.T) {
			path, d := imagePath(t), make(disk, s.diskSize())
			create(t, path, qcow.CreateOptions{Size: int64(len(d)), ClusterSize: s.clusterSize, RefcountBits: s.refcountBits})
			mustBeClean(t, path)
			d.mustEqualThere(t, path)
			mustMapAlike(t, path)
			for range 3 {
				img := open(t, path, storage.ReadWrite)
				scribble(t, rng, img, d, s.clusterSize, 100)
				closeImage(t, img)
				mustBeClean(t, path)
				mustMapAlike(t, path)
			}
			d.mustEqualHere(t, path)
			d.mustEqualThere(t, path)
		})
	}
}

// TestEmptyDisk has neither an L2 table nor anything to map.
func TestEmptyDisk(t *testing.T) {
	require.Tool(t, "qemu-img")
	for _, s := range shapes() {
		path := imagePath(t)
		create(t, path, qcow.CreateOptions{ClusterSize: s.clusterSize, RefcountBits: s.refcountBits})
		mustBeClean(t, path)
		disk{}.mustEqualHere(t, path)
		run(t, "qemu-img", "resize", "-f", "qcow2", path, "1M")
		qemuIO(t, path, "write -P 1 0 1M")
		mustBeClean(t, path)
	}
}

// TestLargeDisks are made, written at both ends and checked, at the largest size of each cluster size that is not out of
// proportion: the L1 table of such a disk is up to 32 MiB.
func TestLargeDisks(t *testing.T) {
	require.Tool(t, "qemu-img", "qemu-io")
	for _, c := range []struct {
		shape
		size int64
	}{
		{shape{512, 16}, 8 << 30},
		{shape{4096, 16}, 1 << 40},
		{shape{65536, 16}, 64 << 40},
		{shape{2 << 20, 16}, 1 << 60},
	} {
		t.Run(c.String(), func(t *testing.T) {
			path := imagePath(t)
			create(t, path, qcow.CreateOptions{Size: c.size, ClusterSize: c.clusterSize, RefcountBits: c.refcountBits})
			img := open(t, path, storage.ReadWrite)
			for i, off := range []int64{0, c.size / 2, c.size - 512} {
				if _, err := img.WriteAt(bytes.Repeat([]byte{byte(i + 1)}, 512), off); err != nil {
					t.Fatal(err)
				}
			}
			closeImage(t, img)
			mustBeClean(t, path)
			qemuIO(t, path, "read -P 1 0 512", fmt.Sprintf("read -P 2 %d 512", c.size/2), fmt.Sprintf("read -P 3 %d 512", c.size-512))
			if c.size <= 64<<40 { // qemu-img map looks at one GiB at a time
				mustMapAlike(t, path)
			}
		})
	}
}

// TestConcurrentRequestsLeaveACleanImage scribbles from several goroutines, each on a stripe of the disk that begins and ends inside a
// cluster, so that neighbours write to the same ones.
func TestConcurrentRequestsLeaveACleanImage(t *testing.T) {
	require.Tool(t, "qemu-img")
	const workers = 8
	rng := random(t)
	for _, s := range shapes() {
		t.Run(s.String(), func(t *testing.T) {
			path, d := imagePath(t), make(disk, s.diskSize())
			create(t, path, qcow.CreateOptions{Size: int64(len(d)), ClusterSize: s.clusterSize, RefcountBits: s.refcountBits})
			img := open(t, path, storage.ReadWrite)
			stripe := len(d)/workers + 17
			var group errgroup.Group
			for off := 0; off < len(d); off += stripe {
				rng := rand.New(rand.NewPCG(rng.Uint64(), 0))
				end := min(off+stripe, len(d))
				group.Go(func() error { return scribbleOn(rng, img, d, off, end, s.clusterSize, 60) })
			}
			if err := group.Wait(); err != nil {
				t.Fatal(err)
			}
			closeImage(t, img)
			mustBeClean(t, path)
			d.mustEqualHere(t, path)
			d.mustEqualThere(t, path)
		})
	}
}

// scribble does n random requests on the image and on the disk that it should equal.
func scribble(t testing.TB, rng *rand.Rand, img *qcow.Image, d disk, clusterSize, n int) {
	t.Helper()
	if err := scribbleOn(rng, img, d, 0, len(d), clusterSize, n); err != nil {
		t.Fatal(err)
	}
}

// scribbleOn does so on the part of the disk between start and limit.
func scribbleOn(rng *rand.Rand, img *qcow.Image, d disk, start, limit, clusterSize, n int) error {
	for range n {
		size := int64(len(d))
		off := int64(start) + rng.Int64N(int64(limit-start))
		length := 1 + rng.Int64N(largestRequest(clusterSize))
		switch rng.IntN(4) { // at bytes, at sectors, at clusters
		case 0, 1:
			off, length = off&^511, (length+511)&^511
		case 2:
			c := int64(clusterSize)
			off, length = off/c*c, (length+c-1)/c*c
		}
		off = max(off, int64(start))
		length = min(length, int64(limit)-off)
		var err error
		var what string
		switch op := rng.IntN(20); {
		case op < 10:
			what = "WriteAt"
			copy(d[off:off+length], noise()[rng.Int64N(1<<20):])
			_, err = img.WriteAt(d[off:off+length], off)
		case op < 14:
			what = "WriteZeroes"
			clear(d[off : off+length])
			err = img.WriteZeroes(off, length, op < 12)
		case op < 18:
			what = "Discard"
			first, end := wholeClusters(off, length, size, int64(clusterSize))
			if first < end {
				clear(d[first:end])
			}
			err = img.Discard(off, length)
		default:
			what = "Flush"
			err = img.Flush()
		}
		if err != nil {
			return fmt.Errorf("%s of %d bytes at %#x: %w", what, length, off, err)
		}
	}
	return nil
}

// largestRequest is large enough for small images to need more than their first refcount table.
func largestRequest(clusterSize int) int64 { return int64(max(2*clusterSize, 128<<10)) }

// noise returns what is written: longer than the largest request by 1 MiB and a cluster, so that requests can begin anywhere in it.
var noise = sync.OnceValue(func() []byte {
	rng := rand.New(rand.NewPCG(1, 1))
	b := make([]byte, 8<<20)
	for i := 0; i < len(b); i += 8 {
		binary.NativeEndian.PutUint64(b[i:], rng.Uint64())
	}
	return b
})

// wholeClusters returns the range of the clusters that lie in the range as a whole. The end of the disk ends a cluster.
func wholeClusters(off, length, size, clusterSize int64) (first, end int64) {
	first, end = (off+clusterSize-1)/clusterSize*clusterSize, off+length
	if end != size {
		end = end / clusterSize * clusterSize
	}
	return first, end
}
