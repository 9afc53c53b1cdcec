package qcow_test

import (
	"math/rand/v2"
	"path/filepath"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// BenchmarkImage measures requests on an image in a file, with a warm page cache.
func BenchmarkImage(b *testing.B) {
	const size, block = 256 << 20, 4096
	p := make([]byte, block)
	image := func(b *testing.B, filled bool) *qcow.Image {
		f, err := storage.Create(filepath.Join(b.TempDir(), "image.qcow2"))
		if err != nil {
			b.Fatal(err)
		}
		if err := qcow.Create(f, qcow.CreateOptions{Size: size}); err != nil {
			b.Fatal(err)
		}
		img, err := qcow.Open(f, qcow.Options{})
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() {
			if err := img.Close(); err != nil {
				b.Error(err)
			}
		})
		for off := int64(0); filled && off < size; off += 1 << 20 {
			if _, err := img.WriteAt(make([]byte, 1<<20), off); err != nil {
				b.Fatal(err)
			}
		}
		return img
	}
	run := func(b *testing.B, do func(off int64) error) {
		b.Helper()
		b.ReportAllocs()
		b.SetBytes(block)
		rng := rand.New(rand.NewPCG(1, 1))
		for b.Loop() {
			if err := do(rng.Int64N(size/block) * block); err != nil {
				b.Fatal(err)
			}
		}
	}
	b.Run("read", func(b *testing.B) {
		img := image(b, true)
		run(b, func(off int64) error { _, err := img.ReadAt(p, off); return err })
	})
	b.Run("read-hole", func(b *testing.B) {
		img := image(b, false)
		run(b, func(off int64) error { _, err := img.ReadAt(p, off); return err })
	})
	b.Run("overwrite", func(b *testing.B) {
		img := image(b, true)
		run(b, func(off int64) error { _, err := img.WriteAt(p, off); return err })
	})
	b.Run("allocate", func(b *testing.B) {
		img := image(b, false)
		next := int64(0)
		run(b, func(int64) error {
			off := next
			if next += 64 << 10; next >= size {
				if err := img.Discard(0, size); err != nil {
					return err
				}
				if err := img.Flush(); err != nil {
					return err
				}
				next = 0
			}
			_, err := img.WriteAt(p, off)
			return err
		})
	})
}
