package interop_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// TestGrowth grows an image by turns here and there, and writes to it by turns. With small clusters the L1 table moves each time.
func TestGrowth(t *testing.T) {
	require.Tool(t, "qemu-img", "qemu-io")
	rng := random(t)
	for _, s := range shapes() {
		t.Run(s.String(), func(t *testing.T) {
			path, d := imagePath(t), make(disk, 512*9)
			create(t, path, qcow.CreateOptions{Size: int64(len(d)), ClusterSize: s.clusterSize, RefcountBits: s.refcountBits})
			for round := range 4 {
				img := open(t, path, storage.ReadWrite)
				scribble(t, rng, img, d, s.clusterSize, 20)
				d = append(d, make(disk, 512*(1+rng.IntN(1000))+(round/2)*(3<<20))...)
				if err := img.Resize(t.Context(), int64(len(d))); err != nil {
					t.Fatal(err)
				}
				scribble(t, rng, img, d, s.clusterSize, 20)
				closeImage(t, img)
				mustBeClean(t, path)
				d.mustEqualHere(t, path)
				mustMapAlike(t, path)

				d = append(d, make(disk, 512*(1+rng.IntN(1000))+(round%2)*(3<<20))...)
				run(t, "qemu-img", "resize", "-q", "-f", "qcow2", path, fmt.Sprint(len(d)))
				scribbleThere(t, rng, path, d, s.clusterSize, 20)
				mustBeClean(t, path)
				d.mustEqualHere(t, path)
			}
			d.mustEqualThere(t, path)
		})
	}
}

// TestGrowthAfterShrink grows an image that QEMU made smaller: nothing of what was cut off may come back.
func TestGrowthAfterShrink(t *testing.T) {
	require.Tool(t, "qemu-img", "qemu-io")
	for _, s := range shapes() {
		t.Run(s.String(), func(t *testing.T) {
			path, d := imagePath(t), make(disk, s.diskSize())
			run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", s.options(), path, fmt.Sprint(len(d)))
			qemuIO(t, path, fmt.Sprintf("write -P 1 0 %d", len(d)))
			small := len(d)/2&^511 + 512
			run(t, "qemu-img", "resize", "-q", "--shrink", "-f", "qcow2", path, fmt.Sprint(small))
			copy(d, bytes.Repeat([]byte{1}, small))
			img := open(t, path, storage.ReadWrite)
			if err := img.Resize(t.Context(), int64(len(d))); err != nil {
				t.Fatal(err)
			}
			closeImage(t, img)
			mustBeClean(t, path)
			d.mustEqualHere(t, path)
			d.mustEqualThere(t, path)
		})
	}
}

// TestGrowthUncoversNothing grows an image whose tables map clusters behind the end of the disk, as the state of a virtual
// machine is that QEMU saved with an internal snapshot and went back to. None of it may become part of the disk.
func TestGrowthUncoversNothing(t *testing.T) {
	require.Tool(t, "qemu-img", "qemu-io")
	for _, s := range shapes() {
		for _, end := range []int{10 * s.clusterSize, 10*s.clusterSize + 512} { // at and behind a cluster boundary
			t.Run(fmt.Sprintf("%v/end=%d", s, end), func(t *testing.T) {
				path, d := imagePath(t), make(disk, 20*s.clusterSize)
				run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", s.options(), path, fmt.Sprint(len(d)))
				qemuIO(t, path, fmt.Sprintf("write -P 1 0 %d", len(d)))
				b := readFile(t, path)
				binary.BigEndian.PutUint64(b[24:], uint64(end)) // the size of the disk
				writeFile(t, path, b)
				copy(d, bytes.Repeat([]byte{1}, end))
				img := open(t, path, storage.ReadWrite)
				if err := img.Resize(t.Context(), int64(len(d))); err != nil {
					t.Fatal(err)
				}
				closeImage(t, img)
				mustBeClean(t, path)
				d.mustEqualHere(t, path)
				d.mustEqualThere(t, path)
			})
		}
	}
}
