package interop_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/check"
	"github.com/qcow-csi/qcow-csi/qcow/codec"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// copyImage copies an image to a new one at path.
func copyImage(t testing.TB, path string, o qcow.CreateOptions, compress bool, source string) {
	t.Helper()
	src := open(t, source, storage.ReadOnly)
	defer closeImage(t, src)
	o.Size = src.Size()
	create(t, path, o)
	dst := open(t, path, storage.ReadWrite)
	if err := qcow.Copy(t.Context(), dst, src, qcow.CopyOptions{Compress: compress, TargetIsZero: true}); err != nil {
		t.Fatal(err)
	}
	closeImage(t, dst)
	mustBeClean(t, path)
}

// statistics returns what package check counts.
func statistics(t *testing.T, path string) *check.Report {
	t.Helper()
	r, err := check.Check(t.Context(), storage.NewMemoryFrom(readFile(t, path)), check.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// TestCompressedWhateverThePieces compresses a disk whose data begins and ends inside the target's clusters: each of these becomes one
// compressed cluster, and the file smaller than it is without compression.
func TestCompressedWhateverThePieces(t *testing.T) {
	require.Tool(t, "qemu-img", "qemu-io")
	const cluster, clusters = 64 << 10, 8
	d, source := make(disk, clusters*cluster), imagePath(t)
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=1k", source, fmt.Sprint(len(d)))
	var commands []string
	for off := 1024; off+20<<10 < len(d); off += 23 << 10 {
		copy(d[off:], bytes.Repeat([]byte{byte(off >> 10)}, 17<<10))
		commands = append(commands, fmt.Sprintf("write -P %d %d 17k", byte(off>>10), off))
	}
	qemuIO(t, source, commands...)
	var length [2]int
	for i, compress := range []bool{false, true} {
		path := imagePath(t)
		copyImage(t, path, qcow.CreateOptions{ClusterSize: cluster}, compress, source)
		d.mustEqualHere(t, path)
		d.mustEqualThere(t, path)
		length[i] = len(readFile(t, path))
		if r := statistics(t, path); r.AllocatedClusters != clusters || compress && r.CompressedClusters != clusters {
			t.Errorf("compressed %t: %d clusters, %d of them compressed", compress, r.AllocatedClusters, r.CompressedClusters)
		}
	}
	if length[1] >= length[0] {
		t.Errorf("compressed it takes %d bytes, else %d", length[1], length[0])
	}
}

// TestCompressionTypes writes neighbouring compressed clusters of both types here and there, reads them across their edges on the other
// side, and copies from one type to the other what compresses and what does not.
func TestCompressionTypes(t *testing.T) {
	require.Tool(t, "qemu-img", "qemu-io")
	const cluster, size = 64 << 10, 1 << 20
	types := []codec.Type{codec.Deflate, codec.Zstd}
	for i, typ := range types {
		t.Run(typ.String(), func(t *testing.T) {
			path, d := imagePath(t), make(disk, size)
			create(t, path, qcow.CreateOptions{Size: size, Compression: typ})
			b := readFile(t, path)
			if bit := binary.BigEndian.Uint64(b[72:]) & 8; bit != uint64(i)*8 || b[104] != byte(i) {
				t.Errorf("feature bit %d, compression type %d", bit, b[104])
			}
			qemuIO(t, path, "write -c -P 1 0 64k", "write -c -P 2 64k 64k", fmt.Sprintf("write -c -P 9 %d 64k", size-cluster))
			copy(d, bytes.Repeat([]byte{1}, cluster))
			copy(d[cluster:], bytes.Repeat([]byte{2}, cluster))
			copy(d[size-cluster:], bytes.Repeat([]byte{9}, cluster))
			img := open(t, path, storage.ReadWrite)
			random := noise()[:cluster] // which does not compress
			for c, p := range map[int64][]byte{2: bytes.Repeat([]byte{3}, cluster), 3: bytes.Repeat([]byte{4}, cluster), 4: random} {
				if err := img.WriteCompressed(p, c*cluster); err != nil {
					t.Fatal(err)
				}
				copy(d[c*cluster:], p)
			}
			closeImage(t, img)
			mustBeClean(t, path)
			d.mustEqualHere(t, path)
			d.mustEqualThere(t, path)
			qemuIO(t, path, "read -P 1 0 64k", "read -P 2 65536 512", "read -P 1 65024 512", "read -P 3 128k 64k", "read -P 4 261632 512")
			if r := statistics(t, path); r.CompressedClusters != 5 || r.AllocatedClusters != 6 {
				t.Errorf("%d clusters, %d of them compressed", r.AllocatedClusters, r.CompressedClusters)
			}

			other := imagePath(t)
			copyImage(t, other, qcow.CreateOptions{Compression: types[1-i]}, true, path)
			run(t, "qemu-img", "compare", "-q", "-f", "qcow2", "-F", "qcow2", path, other)
			d.mustEqualHere(t, other)
			run(t, "qemu-img", "convert", "-c", "-f", "qcow2", "-O", "qcow2", "-o", "compression_type="+typ.String(), other, path)
			d.mustEqualHere(t, path)
		})
	}
}
