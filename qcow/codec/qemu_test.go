package codec_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow/codec"
	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/test/require"
)

func run(t *testing.T, command ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), command[0], command[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%q: %v: %s", command, err, out)
	}
	return string(out)
}

func readFile(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func writeFile(t *testing.T, path string, b []byte) {
	t.Helper()
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// qemuImage is an image that QEMU compressed, and what it holds.
type qemuImage struct {
	b       []byte
	header  *format.Header
	typ     codec.Type
	content []byte
}

// compress has QEMU make a compressed image of clusters, all of one size.
func compress(t *testing.T, typ codec.Type, clusters [][]byte) *qemuImage {
	t.Helper()
	require.Tool(t, "qemu-img")
	dir := t.TempDir()
	raw, path := filepath.Join(dir, "raw"), filepath.Join(dir, "image")
	img := &qemuImage{typ: typ, content: slices.Concat(clusters...)}
	writeFile(t, raw, img.content)
	options := fmt.Sprintf("cluster_size=%d,compression_type=%v", len(clusters[0]), typ)
	run(t, "qemu-img", "convert", "-t", "unsafe", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, path)
	img.b = readFile(t, path)
	var err error
	if img.header, err = format.DecodeHeader(img.b[:min(len(img.b), 1<<format.MaxClusterBits)]); err != nil {
		t.Fatal(err)
	}
	return img
}

// entry returns where in the image the L2 entry of a guest cluster is. Its L2 table must exist.
func (img *qemuImage) entry(cluster int) (at uint64) {
	g := img.header.Geometry
	off := format.GuestOffset(uint64(cluster) << g.ClusterBits)
	l1 := format.L1Entry(format.Entry(img.b[img.header.L1Offset:], g.L1Index(off)))
	return uint64(l1.Offset()) + g.L2Index(off)*format.EntrySize
}

// compressed calls visit with each guest cluster that is compressed, and the bytes that its descriptor covers.
func (img *qemuImage) compressed(visit func(cluster int, src []byte)) {
	g := img.header.Geometry
	for cluster := range len(img.content) >> g.ClusterBits {
		e := format.L2Entry(binary.BigEndian.Uint64(img.b[img.entry(cluster):]))
		if e.Kind() == format.Compressed {
			off, n := e.CompressedRange(g)
			end := min(uint64(off)+n, uint64(len(img.b))) // the last sector of the file may be cut off
			visit(cluster, img.b[off:end])
		}
	}
}

// replace makes src, put at the end of the image, the content of a guest cluster.
func (img *qemuImage) replace(cluster int, src []byte) {
	e := format.NewCompressedEntry(img.header.Geometry, format.HostOffset(len(img.b)), uint64(len(src)))
	binary.BigEndian.PutUint64(img.b[img.entry(cluster):], uint64(e))
	img.b = append(img.b, src...)
}

// convert has QEMU read the image. With salvage, what it cannot read is zero, and what it says about that comes back too.
func (img *qemuImage) convert(t *testing.T, flags ...string) (content []byte, output string) {
	t.Helper()
	dir := t.TempDir()
	raw, path := filepath.Join(dir, "raw"), filepath.Join(dir, "image")
	writeFile(t, path, slices.Concat(img.b, make([]byte, 1<<img.header.ClusterBits))) // descriptors cover whole sectors
	output = run(t, append(append([]string{"qemu-img", "convert", "-t", "unsafe", "-f", "qcow2", "-O", "raw"}, flags...), path, raw)...)
	return readFile(t, raw), output
}

// Of every cluster size and compression type, QEMU's streams are read, and QEMU reads the streams made here.
func TestQEMU(t *testing.T) {
	const seed = 11
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	for bits := format.MinClusterBits; bits <= format.MaxClusterBits; bits++ {
		var clusters [][]byte
		for range max(1, 16-bits) {
			s := samples(1<<bits, rng)
			for _, name := range []string{"text", "zeroes", "half", "one", "random", "far", "table", "same"} {
				clusters = append(clusters, s[name])
			}
		}
		for _, typ := range types {
			t.Run(fmt.Sprintf("%v/%d", typ, 1<<bits), func(t *testing.T) {
				img := compress(t, typ, clusters)
				img.expectReadable(t, clusters)
				img.expectReplaceable(t, clusters)
			})
		}
	}
}

// expectReadable expects that QEMU's streams yield the clusters.
func (img *qemuImage) expectReadable(t *testing.T, clusters [][]byte) {
	t.Helper()
	seen := 0
	img.compressed(func(cluster int, src []byte) {
		seen++
		got := make([]byte, len(clusters[cluster]))
		if err := codec.Decompress(img.typ, got, src); err != nil {
			t.Errorf("cluster %d: %v", cluster, err)
		} else if !bytes.Equal(got, clusters[cluster]) {
			t.Errorf("cluster %d: the content differs", cluster)
		}
	})
	if seen < len(clusters)/2 {
		t.Errorf("only %d of %d clusters are compressed", seen, len(clusters))
	}
}

// expectReplaceable expects that QEMU reads the same when all streams are replaced by ones made here, and the clusters of zeroes, which
// QEMU leaves out, are there too.
func (img *qemuImage) expectReplaceable(t *testing.T, clusters [][]byte) {
	t.Helper()
	theirs, own, replaced := 0, 0, 0
	img.compressed(func(_ int, src []byte) { theirs += len(src) })
	for i, cluster := range clusters {
		e := format.L2Entry(binary.BigEndian.Uint64(img.b[img.entry(i):]))
		if e.Kind() != format.Compressed && e.Kind() != format.Unallocated {
			continue // QEMU found nothing to compress
		}
		out, ok, err := codec.Compress(img.typ, nil, cluster)
		if err != nil {
			t.Fatal(err)
		}
		if !ok {
			continue
		}
		if e.Kind() == format.Compressed {
			own += len(out)
		}
		img.replace(i, out)
		replaced++
	}
	if replaced < len(clusters)/2 {
		t.Errorf("only %d of %d clusters were compressed", replaced, len(clusters))
	}
	if content, _ := img.convert(t); !bytes.Equal(content, img.content) {
		t.Error("QEMU reads otherwise what was compressed here")
	}
	t.Logf("%d bytes; QEMU's streams take %d", own, theirs)
}

// QEMU accepts and refuses the same odd streams, and sees the same in those it accepts.
func TestStreamsAgreeWithQEMU(t *testing.T) {
	cluster := samples(4096, rand.New(rand.NewPCG(4, 0)))["text"]
	byType := map[codec.Type][]stream{}
	for _, s := range streams(t, cluster) {
		if len(s.src) <= 2*len(cluster) { // what a descriptor can cover
			byType[s.typ] = append(byType[s.typ], s)
		}
	}
	for typ, all := range byType {
		img := compress(t, typ, slices.Repeat([][]byte{cluster}, len(all)))
		expected := make([][]byte, len(all))
		for i, s := range all {
			// Padding, so that a stream that is cut off does not go on in the next.
			src := append(slices.Clone(s.src), make([]byte, 512)...)[:min(len(s.src)+512, 2*len(cluster))]
			img.replace(i, src)
			expected[i] = make([]byte, len(cluster))
			if codec.Decompress(typ, expected[i], src) != nil {
				expected[i] = nil
			}
		}
		img.expectSalvage(t, expected, func(i int) string { return all[i].name }, nil)
	}
}

// expectSalvage expects that QEMU sees in each guest cluster what is expected, or refuses it where that is nil. Unless nil, undamaged
// says what clusters were before: where QEMU overlooks damage because they still come out so, it may be refused here.
func (img *qemuImage) expectSalvage(t *testing.T, expected [][]byte, name func(i int) string, undamaged func(i int) []byte) {
	t.Helper()
	content, output := img.convert(t, "--salvage")
	n := len(content) / len(expected)
	for i, want := range expected {
		theirs := content[i*n:][:n]
		refused := strings.Contains(output, fmt.Sprintf("offset %d:", i*n))
		if want == nil && undamaged != nil && bytes.Equal(theirs, undamaged(i)) {
			continue
		}
		if (want == nil) != refused {
			t.Errorf("%v stream %s: refused here %t, by QEMU %t", img.typ, name(i), want == nil, refused)
		} else if want != nil && !bytes.Equal(theirs, want) {
			t.Errorf("%v stream %s: the content differs", img.typ, name(i))
		}
	}
}

// QEMU accepts and refuses the same damaged streams, except for damage that does no harm, such as to bits that say nothing.
func TestDamageAgreesWithQEMU(t *testing.T) {
	const n, rounds, seed = 4096, 400, 13
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	kinds := samples(n, rng)
	original := func(i int) []byte { return kinds[[]string{"text", "half", "table", "one"}[i%4]] }
	for _, typ := range types {
		img := compress(t, typ, slices.Repeat([][]byte{kinds["text"]}, rounds))
		expected, accepted := make([][]byte, rounds), 0
		for i := range rounds {
			src, ok, err := codec.Compress(typ, nil, original(i))
			if !ok || err != nil {
				t.Fatal(ok, err)
			}
			src[rng.IntN(len(src))] ^= 1 << rng.IntN(8)
			src = append(src, make([]byte, 512)...)
			img.replace(i, src)
			expected[i] = make([]byte, n)
			if codec.Decompress(typ, expected[i], src) != nil {
				expected[i] = nil
			} else {
				accepted++
			}
		}
		img.expectSalvage(t, expected, strconv.Itoa, original)
		t.Logf("%v: %d of %d damaged streams are accepted", typ, accepted, rounds)
	}
}
