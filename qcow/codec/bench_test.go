package codec_test

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow/codec"
	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// benchmarkClusters runs bench for every type on a cluster of text of the usual and of the largest size.
func benchmarkClusters(b *testing.B, bench func(b *testing.B, typ codec.Type, cluster []byte)) {
	b.Helper()
	for _, bits := range []int{format.DefaultClusterBits, format.MaxClusterBits} {
		clusters := samples(1<<bits, rand.New(rand.NewPCG(10, 0)))
		for _, typ := range types {
			for _, name := range []string{"text", "random"} {
				b.Run(fmt.Sprintf("%v/%d/%s", typ, 1<<bits, name), func(b *testing.B) {
					b.SetBytes(1 << bits)
					b.ReportAllocs()
					bench(b, typ, clusters[name])
				})
			}
		}
	}
}

func BenchmarkCompress(b *testing.B) {
	benchmarkClusters(b, func(b *testing.B, typ codec.Type, cluster []byte) {
		out := make([]byte, 0, len(cluster))
		for b.Loop() {
			if _, _, err := codec.Compress(typ, out, cluster); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkDecompress(b *testing.B) {
	benchmarkClusters(b, func(b *testing.B, typ codec.Type, cluster []byte) {
		src, ok, err := codec.Compress(typ, nil, cluster)
		if err != nil {
			b.Fatal(err)
		}
		if !ok {
			b.Skip("is stored as it is")
		}
		dst := make([]byte, len(cluster))
		for b.Loop() {
			if err := codec.Decompress(typ, dst, src); err != nil {
				b.Fatal(err)
			}
		}
	})
}
