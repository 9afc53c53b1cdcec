package codec_test

import (
	"bytes"
	"compress/flate"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow/codec"
	"github.com/qcow-csi/qcow-csi/qcow/format"
)

var types = []codec.Type{codec.Deflate, codec.Zstd}

// samples returns clusters of n bytes by name: what guests store, and what is hard for a compressor.
func samples(n int, rng *rand.Rand) map[string][]byte {
	random := make([]byte, n)
	for i := range random {
		random[i] = byte(rng.Uint32())
	}
	text := make([]byte, 0, n+32)
	for i := 0; len(text) < n; i++ {
		text = fmt.Appendf(text, "%d the quick brown %x\n", i, rng.Uint32()%64)
	}
	half := slices.Clone(random)
	clear(half[:n/2])
	far := slices.Clone(random) // repeats itself, but only from a distance
	copy(far[n/2:], far[:n/2])
	table := make([]byte, n) // of 64-bit numbers that rise
	for i := 0; i+8 <= n; i += 8 {
		binary.BigEndian.PutUint64(table[i:], 1<<63|uint64(i)<<9)
	}
	one := make([]byte, n)
	one[n-1] = 1
	return map[string][]byte{
		"zeroes": make([]byte, n), "one": one, "random": random, "text": text[:n], "half": half, "far": far, "table": table,
		"same": bytes.Repeat([]byte{0xff}, n),
	}
}

// eachCluster calls test with the samples of every cluster size.
func eachCluster(t *testing.T, test func(t *testing.T, typ codec.Type, cluster []byte)) {
	t.Helper()
	const seed = 1
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	for bits := format.MinClusterBits; bits <= format.MaxClusterBits; bits++ {
		for name, cluster := range samples(1<<bits, rng) {
			for _, typ := range types {
				t.Run(fmt.Sprintf("%v/%d/%s", typ, len(cluster), name), func(t *testing.T) { test(t, typ, cluster) })
			}
		}
	}
}

func TestRoundTrip(t *testing.T) {
	eachCluster(t, func(t *testing.T, typ codec.Type, cluster []byte) {
		before := []byte("before")
		out, ok, err := codec.Compress(typ, before, cluster)
		if err != nil {
			t.Fatal(err)
		}
		if !ok {
			if !bytes.Equal(out, before) {
				t.Error("a failed compression changed the destination")
			}
			return
		}
		stream, found := bytes.CutPrefix(out, before)
		if !found || len(stream) == 0 || len(stream) >= len(cluster) {
			t.Fatalf("%d bytes became %d", len(cluster), len(stream))
		}
		// Behind the stream there is nothing, padding, the same stream once more, and other bytes.
		tails := map[string][]byte{"nothing": nil, "padding": make([]byte, 511), "stream": stream, "garbage": bytes.Repeat([]byte{0xfd, 0x28}, 250)}
		if len(cluster) > 64<<10 { // which takes long, and shows no more
			tails = map[string][]byte{"stream": stream}
		}
		for what, tail := range tails {
			got := bytes.Repeat([]byte{0xa5}, len(cluster)+16)
			if err := codec.Decompress(typ, got[:len(cluster)], append(bytes.Clone(stream), tail...)); err != nil {
				t.Fatalf("with %s behind the stream: %v", what, err)
			}
			if !bytes.Equal(got[:len(cluster)], cluster) {
				t.Fatalf("with %s behind the stream the content differs", what)
			}
			if !bytes.Equal(got[len(cluster):], bytes.Repeat([]byte{0xa5}, 16)) {
				t.Fatalf("with %s behind the stream the bytes behind the destination changed", what)
			}
		}
	})
}

// What compresses does, and what does not is refused rather than made longer.
func TestCompressible(t *testing.T) {
	const n = 64 << 10
	rng := rand.New(rand.NewPCG(2, 0))
	for name, cluster := range samples(n, rng) {
		for _, typ := range types {
			out, ok, err := codec.Compress(typ, nil, cluster)
			if err != nil {
				t.Fatal(err)
			}
			most := map[string]int{"zeroes": 200, "same": 200, "one": 200, "text": n / 3, "half": n/2 + 300, "table": n / 3}[name]
			if typ == codec.Zstd && name == "far" {
				most = n/2 + 300
			}
			if ok != (most > 0) || len(out) > most {
				t.Errorf("%v: %s: %t, %d bytes; want at most %d", typ, name, ok, len(out), most)
			}
		}
	}
	for _, typ := range types {
		if out, ok, err := codec.Compress(typ, nil, nil); ok || len(out) != 0 || err != nil {
			t.Errorf("%v of nothing: %d bytes, %t, %v", typ, len(out), ok, err)
		}
	}
}

// Clusters that compress ever better are refused until they become shorter, and an eighth is always saved.
func TestCompressLimit(t *testing.T) {
	const n, step = 4096, 16
	random := samples(n, rand.New(rand.NewPCG(3, 0)))["random"]
	for _, typ := range types {
		refused := 0
		for same := 0; same <= n; same += step {
			cluster := slices.Clone(random)
			clear(cluster[:same])
			out, ok, err := codec.Compress(typ, nil, cluster)
			if err != nil {
				t.Fatal(err)
			}
			if ok && len(out) >= n || !ok && same >= n/8 {
				t.Errorf("%v: %t, %d bytes of a cluster with %d zeroes", typ, ok, len(out), same)
			}
			if !ok {
				refused++
			}
		}
		if refused == 0 {
			t.Errorf("%v: nothing refused", typ)
		}
		for n := range 200 {
			if out, ok, err := codec.Compress(typ, nil, make([]byte, n)); err != nil || ok && len(out) >= n || !ok && n > 150 {
				t.Errorf("%v: %d zeroes become %d bytes, %t, %v", typ, n, len(out), ok, err)
			}
		}
	}
}

func TestUnknownType(t *testing.T) {
	const typ = codec.Type(2)
	if err := codec.Decompress(typ, make([]byte, 512), make([]byte, 512)); !errors.Is(err, format.ErrUnsupported) {
		t.Errorf("decompress: %v", err)
	}
	before := []byte("before")
	out, ok, err := codec.Compress(typ, before, make([]byte, 512))
	if ok || !bytes.Equal(out, before) || !errors.Is(err, format.ErrUnsupported) {
		t.Errorf("compress: %q, %t, %v", out, ok, err)
	}
	if got := fmt.Sprint(codec.Deflate, codec.Zstd, typ); got != "zlib zstd compression type 2" {
		t.Error(got)
	}
}

// flateOf returns a stream of data, with the window of 32 KiB that others use.
func flateOf(t testing.TB, data []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := flate.NewWriter(&b, flate.BestCompression)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// zstdOf returns a frame of data: a header of 6 or 7 bytes with the length, at least one block, and a checksum.
func zstdOf(t testing.TB, data []byte) []byte {
	t.Helper()
	out, ok, err := codec.Compress(codec.Zstd, nil, data)
	if !ok || err != nil {
		t.Fatal(ok, err)
	}
	return out
}

// zstdHeader returns the header of a frame with a window of 1<<log bytes that says nothing of its content.
func zstdHeader(log int) []byte { return []byte{0x28, 0xb5, 0x2f, 0xfd, 0, byte(log-10) << 3} }

// zstdRaw returns a frame of data that says nothing of its content, in blocks of up to n bytes.
func zstdRaw(n int, data []byte) []byte {
	b := zstdHeader(20)
	for piece := range slices.Chunk(data, n) {
		b = append(b, zstdBlock(0, len(piece), false, piece...)...)
	}
	return append(b, zstdBlock(0, 0, true)...)
}

// zstdBlock returns a block of the type: 0 raw, 1 one byte repeated, 2 compressed, 3 reserved.
func zstdBlock(typ, size int, last bool, content ...byte) []byte {
	h := uint32(size)<<3 | uint32(typ)<<1
	if last {
		h |= 1
	}
	return append([]byte{byte(h), byte(h >> 8), byte(h >> 16)}, content...)
}

func skippable(n int) []byte {
	return append(binary.LittleEndian.AppendUint32([]byte{0x53, 0x2a, 0x4d, 0x18}, uint32(n)), make([]byte, n)...)
}

func join(parts ...[]byte) []byte { return slices.Concat(parts...) }

type stream struct {
	name string
	typ  codec.Type
	src  []byte
	good bool
}

// streams returns streams for a cluster of 4096 bytes that no compressor makes, with what becomes of them.
func streams(t testing.TB, cluster []byte) []stream {
	t.Helper()
	n := len(cluster)
	double := append(slices.Clone(cluster), cluster...)
	deflated, framed := flateOf(t, cluster), zstdOf(t, cluster)
	stored := join([]byte{1, 0, 16, 0xff, 0xef}, cluster) // the last block, of 4096 bytes
	unended := slices.Clone(stored)
	unended[0] = 0
	const zstdWholeHeader = 7
	withChecksum := zstdHeader(20)
	withChecksum[4] |= 1 << 2
	badSum := slices.Clone(framed)
	badSum[len(badSum)-1] ^= 1
	d, z := codec.Deflate, codec.Zstd
	return []stream{
		{"nothing", d, nil, false},
		{"zeroes", d, make([]byte, 512), false},
		{"plain", d, deflated, true},
		{"cut off", d, deflated[:len(deflated)/2], false},
		{"too little", d, flateOf(t, cluster[:n-1]), false},
		{"too much", d, flateOf(t, double), true},
		{"stored", d, stored, true},
		{"stored, and cut off", d, stored[:n], false},
		{"empty blocks before", d, join(bytes.Repeat([]byte{0, 0, 0, 0xff, 0xff}, 100), stored), true},
		{"stored, and goes on in a reserved block", d, append(unended, 7), false},
		{"only empty blocks", d, bytes.Repeat([]byte{0, 0, 0, 0xff, 0xff}, 100), false},
		{"reserved block", d, []byte{7, 0, 0}, false},
		{"reference to before the beginning", d, []byte{3, 2, 0, 0}, false},
		{"with the header of zlib", d, append([]byte{0x78, 0x9c}, deflated...), false},

		{"nothing", z, nil, false},
		{"zeroes", z, make([]byte, 512), false},
		{"plain", z, framed, true},
		{"with a window", z, join(withChecksum, framed[zstdWholeHeader:]), true},
		{"without checksum", z, join(zstdHeader(20), framed[zstdWholeHeader:len(framed)-4]), true},
		{"in pieces", z, zstdRaw(1000, cluster), true},
		{"cut off", z, framed[:len(framed)/2], false},
		{"cut off in a block", z, join(zstdHeader(20), zstdBlock(0, n, false, cluster[:100]...)), false},
		{"cut off in the header of a block", z, join(zstdHeader(20), []byte{0, 0}), false},
		{"cut off in the header", z, zstdHeader(20)[:5], false},
		{"cut off in the checksum", z, framed[:len(framed)-1], false},
		{"wrong checksum", z, badSum, false},
		{"too little", z, zstdOf(t, cluster[:n-1]), false},
		{"too much", z, zstdOf(t, double), false},
		{"too much, in pieces", z, zstdRaw(1000, append(slices.Clone(cluster), 0)), false},
		{"too much, without saying so", z, join(zstdHeader(20), zstdOf(t, double)[zstdWholeHeader:]), false},
		{"two frames", z, join(zstdOf(t, cluster[:1000]), zstdRaw(1000, cluster[1000:])), true},
		{"two frames, too much", z, join(zstdOf(t, cluster[:1000]), zstdOf(t, cluster[999:])), false},
		{"second frame missing", z, zstdOf(t, cluster[:1000]), false},
		{"skippable frame before", z, join(skippable(100), framed), true},
		{"skippable frame between", z, join(zstdRaw(7, cluster[:7]), skippable(0), zstdOf(t, cluster[7:])), true},
		{"skippable frame that is cut off", z, skippable(100)[:50], false},
		{"skippable frame as long as can be", z, append(binary.LittleEndian.AppendUint32([]byte{0x53, 0x2a, 0x4d, 0x18}, 0xffffffff), framed...), false},
		{"empty frame before", z, join(zstdHeader(20), zstdBlock(0, 0, true), framed), true},
		{"raw block", z, join(zstdHeader(20), zstdBlock(0, n, true, cluster...)), true},
		{"empty block at the end", z, join(zstdHeader(20), zstdBlock(0, n, false, cluster...), zstdBlock(0, 0, true)), true},
		{"no last block", z, join(zstdHeader(20), zstdBlock(0, n, false, cluster...)), false},
		{"more than the window in a block", z, join(zstdHeader(10), zstdBlock(0, n, true, cluster...)), false},
		{"raw block, too much", z, join(zstdHeader(20), zstdBlock(0, n+1, true, append(slices.Clone(cluster), 0)...)), false},
		{"repeated byte", z, join(zstdHeader(20), zstdBlock(1, n, true, 'x')), true},
		{"repeated byte, a little too much", z, join(zstdHeader(20), zstdBlock(1, n+1, true, 'x')), false},
		{"repeated byte, far too much", z, join(zstdHeader(20), zstdBlock(1, 128<<10, true, 'x')), false},
		{"repeated byte, without end", z, join(zstdHeader(20), bytes.Repeat(zstdBlock(1, 128<<10, false, 'x'), 1000)), false},
		{"reserved block", z, join(zstdHeader(20), zstdBlock(3, n, true, cluster...)), false},
		{"window of 128 MiB", z, join(zstdHeader(27), zstdBlock(0, n, true, cluster...)), true},
		{"window of 256 MiB", z, join(zstdHeader(28), zstdBlock(0, n, true, cluster...)), false},
		{"window of 2 TiB", z, join(zstdHeader(41), zstdBlock(0, n, true, cluster...)), false},
		{"dictionary", z, join([]byte{0x28, 0xb5, 0x2f, 0xfd, 1, 0x50, 7}, zstdBlock(0, n, true, cluster...)), false},
		{"content of 16 EiB", z, join([]byte{0x28, 0xb5, 0x2f, 0xfd, 0xe0}, bytes.Repeat([]byte{0xff}, 8), zstdBlock(0, n, true, cluster...)), false},
	}
}

// streamContent returns what a good stream of that name yields.
func streamContent(name string, cluster []byte) []byte {
	if name == "repeated byte" {
		return bytes.Repeat([]byte{'x'}, len(cluster))
	}
	return cluster
}

func TestStreams(t *testing.T) {
	cluster := samples(4096, rand.New(rand.NewPCG(4, 0)))["text"]
	for _, s := range streams(t, cluster) {
		t.Run(s.typ.String()+"/"+s.name, func(t *testing.T) {
			got := make([]byte, len(cluster))
			switch err := codec.Decompress(s.typ, got, s.src); {
			case !s.good && !errors.Is(err, format.ErrCorrupt), !s.good && (errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)):
				t.Errorf("%v; want ErrCorrupt alone", err)
			case s.good && err != nil:
				t.Error(err)
			case s.good && !bytes.Equal(got, streamContent(s.name, cluster)):
				t.Error("the content differs")
			}
		})
	}
}

// After a stream that failed, and with others at the same time, streams are read and written as ever.
func TestConcurrentUse(t *testing.T) {
	cluster := samples(4096, rand.New(rand.NewPCG(5, 0)))["text"]
	random := samples(4096, rand.New(rand.NewPCG(6, 0)))["random"]
	all := streams(t, cluster)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			got := make([]byte, len(cluster))
			for range 5 {
				for _, s := range all {
					if err := codec.Decompress(s.typ, got, s.src); (err == nil) != s.good || s.good && !bytes.Equal(got, streamContent(s.name, cluster)) {
						t.Errorf("%v/%s: %v", s.typ, s.name, err)
					}
				}
				for _, typ := range types {
					if _, ok, err := codec.Compress(typ, nil, random); ok || err != nil {
						t.Error(ok, err)
					}
					out, ok, err := codec.Compress(typ, nil, cluster)
					if !ok || err != nil {
						t.Error(ok, err)
					} else if err := codec.Decompress(typ, got, out); err != nil || !bytes.Equal(got, cluster) {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
}
