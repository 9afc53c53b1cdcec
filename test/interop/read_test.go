package interop_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// TestQEMUsImagesAreReadAndWrittenOn has QEMU make an image and write to it at random, reads it here, writes on here, and has
// QEMU judge and write on once more.
func TestQEMUsImagesAreReadAndWrittenOn(t *testing.T) {
	require.Tool(t, "qemu-img", "qemu-io")
	rng := random(t)
	for _, s := range shapes() {
		t.Run(s.String(), func(t *testing.T) {
			path, d := imagePath(t), make(disk, s.diskSize())
			run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", s.options(), path, fmt.Sprint(len(d)))
			passBackAndForth(t, rng, path, d, s.clusterSize)
		})
	}
}

// TestPreallocatedAndLazyImages does the same with images that look different from the start.
func TestPreallocatedAndLazyImages(t *testing.T) {
	require.Tool(t, "qemu-img", "qemu-io")
	rng := random(t)
	all := []shape{{512, 16}, {65536, 16}, {2 << 20, 1}}
	if long() {
		all = shapes()
	}
	for _, options := range []string{"preallocation=metadata", "preallocation=falloc", "preallocation=full", "lazy_refcounts=on"} {
		for _, s := range all {
			t.Run(options+"/"+s.String(), func(t *testing.T) {
				path, d := imagePath(t), make(disk, 1000*512) // 1000 sectors are no whole number of clusters
				if s.clusterSize > 65536 {
					d = make(disk, s.diskSize())
				}
				run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", s.options(options), path, fmt.Sprint(len(d)))
				d.mustEqualHere(t, path)
				passBackAndForth(t, rng, path, d, s.clusterSize)
			})
		}
	}
}

func passBackAndForth(t *testing.T, rng *rand.Rand, path string, d disk, clusterSize int) {
	t.Helper()
	for range 2 {
		scribbleThere(t, rng, path, d, clusterSize, 60)
		mustBeClean(t, path)
		d.mustEqualHere(t, path)
		mustMapAlike(t, path)

		img := open(t, path, storage.ReadWrite)
		scribble(t, rng, img, d, clusterSize, 60)
		closeImage(t, img)
		mustBeClean(t, path)
		mustMapAlike(t, path)
		d.mustEqualHere(t, path)
	}
	d.mustEqualThere(t, path)
}

// scribbleThere has QEMU do n random requests on the image, and does them on the disk that it should equal.
func scribbleThere(t testing.TB, rng *rand.Rand, path string, d disk, clusterSize, n int) {
	t.Helper()
	var commands []string
	for range n {
		size := int64(len(d))
		off := rng.Int64N(size) &^ 511
		length := min(size-off, (1+rng.Int64N(largestRequest(clusterSize))+511)&^511)
		switch op := rng.IntN(10); {
		case op < 5:
			pattern := byte(1 + rng.IntN(255))
			copy(d[off:off+length], bytes.Repeat([]byte{pattern}, int(length)))
			commands = append(commands, fmt.Sprintf("write -P %d %d %d", pattern, off, length))
		case op < 6:
			clear(d[off : off+length])
			commands = append(commands, fmt.Sprintf("write -z %d %d", off, length))
		case op < 7:
			clear(d[off : off+length])
			commands = append(commands, fmt.Sprintf("write -z -u %d %d", off, length))
		case op < 9: // QEMU may or may not discard a part of a cluster, so only whole ones
			first, end := wholeClusters(off, length, size+1, int64(clusterSize))
			if first < end {
				clear(d[first:end])
				commands = append(commands, fmt.Sprintf("discard %d %d", first, end-first))
			}
		default:
			commands = append(commands, "flush")
		}
	}
	qemuIO(t, path, commands...)
}
