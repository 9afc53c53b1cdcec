package codec_test

import (
	"bytes"
	stdflate "compress/flate"
	"errors"
	"io"
	"math/rand/v2"
	"runtime"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow/codec"
	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// FuzzDecompress decompresses anything. It fails with the right class or fills the cluster with what does not depend on the bytes behind
// the stream, writes nowhere else, and allocates no more than the tables of a reader, whatever the stream claims. What
// the standard library inflates comes out the same. What it refuses is refused too, but for the like of a block whose codes have none
// for its end, which the library used here does not look for: nobody has written that.
func FuzzDecompress(f *testing.F) {
	cluster := samples(4096, rand.New(rand.NewPCG(8, 0)))["text"]
	for _, s := range streams(f, cluster) {
		f.Add(uint8(s.typ), uint8(12), s.src)
		f.Add(uint8(s.typ), uint8(9), s.src)
		f.Add(uint8(s.typ), uint8(21), s.src)
	}
	f.Fuzz(func(t *testing.T, typ, bits uint8, src []byte) {
		n := 1 << min(max(bits, format.MinClusterBits), format.MaxClusterBits)
		if len(src) > 2*n {
			src = src[:2*n] // no descriptor covers more
		}
		const canary = 64
		got := bytes.Repeat([]byte{0x5a}, n+canary)
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		err := codec.Decompress(codec.Type(typ), got[:n], src)
		runtime.ReadMemStats(&after)
		if used := after.TotalAlloc - before.TotalAlloc; used > 4<<20 {
			t.Errorf("%d bytes were allocated for a cluster of %d", used, n)
		}
		if !bytes.Equal(got[n:], bytes.Repeat([]byte{0x5a}, canary)) {
			t.Error("the bytes behind the cluster changed")
		}
		switch {
		case typ > 1:
			if !errors.Is(err, format.ErrUnsupported) {
				t.Errorf("unknown type: %v", err)
			}
			return
		case err != nil && !errors.Is(err, format.ErrCorrupt):
			t.Errorf("a damaged stream: %v", err)
		}
		if codec.Type(typ) == codec.Deflate {
			r, want := stdflate.NewReader(bytes.NewReader(src)), make([]byte, n)
			_, wantErr := io.ReadFull(r, want)
			if wantErr == nil {
				if _, err := r.Read(make([]byte, 1)); errors.As(err, new(stdflate.CorruptInputError)) {
					wantErr = err
				}
			}
			_, endErr := io.CopyN(io.Discard, r, 1<<16)
			cutOff := wantErr == nil && errors.Is(endErr, io.ErrUnexpectedEOF) // behind the content: damaged, but not all need see it
			if wantErr == nil && (err != nil && !cutOff || err == nil && !bytes.Equal(got[:n], want)) {
				t.Errorf("%v; the standard library: %v; content equal: %t", err, wantErr, bytes.Equal(got[:n], want))
			}
		}
		if err == nil {
			again := make([]byte, n)
			if err := codec.Decompress(codec.Type(typ), again, append(bytes.Clone(src), src...)); err != nil || !bytes.Equal(got[:n], again) {
				t.Errorf("with more bytes behind the stream: %v", err)
			}
		}
	})
}

// FuzzCompress compresses anything, and expects it back.
func FuzzCompress(f *testing.F) {
	for _, cluster := range samples(512, rand.New(rand.NewPCG(9, 0))) {
		f.Add(uint8(0), uint16(1), cluster)
		f.Add(uint8(1), uint16(700), cluster)
	}
	f.Fuzz(func(t *testing.T, typ uint8, times uint16, piece []byte) {
		cluster := bytes.Repeat(piece, 1+int(times)%512)
		cluster = cluster[:min(len(cluster), 2<<20)]
		out, ok, err := codec.Compress(codec.Type(typ%2), nil, cluster)
		if err != nil {
			t.Fatal(err)
		}
		if !ok {
			return
		}
		if len(out) >= len(cluster) {
			t.Errorf("%d bytes became %d", len(cluster), len(out))
		}
		got := make([]byte, len(cluster))
		if err := codec.Decompress(codec.Type(typ%2), got, append(out, piece...)); err != nil || !bytes.Equal(got, cluster) {
			t.Errorf("%v; content equal: %t", err, bytes.Equal(got, cluster))
		}
		if codec.Type(typ%2) == codec.Deflate {
			if content, distance, err := farthest(out); err != nil || distance > 4096 || !bytes.Equal(content, cluster) {
				t.Errorf("a reference over %d bytes, %v", distance, err)
			}
		}
	})
}
