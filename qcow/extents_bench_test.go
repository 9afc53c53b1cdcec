package qcow_test

import (
	"path/filepath"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// BenchmarkExtents walks over a disk of 1 TiB: all tables of an image are there, each with one cluster, in the image itself or in
// the file behind an empty one.
func BenchmarkExtents(b *testing.B) {
	const size, span = int64(1) << 40, int64(512) << 20 // an L2 table maps so much
	dir := b.TempDir()
	image := func(name string, fill bool) qcow.Gate {
		b.Helper()
		f, err := storage.Create(filepath.Join(dir, name))
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
		for off := span / 3 &^ 0xffff; fill && off < size; off += span {
			if _, err := img.WriteAt([]byte{1}, off); err != nil {
				b.Fatal(err)
			}
		}
		if err := img.Close(); err != nil {
			b.Fatal(err)
		}
		return qcow.Within(dir)
	}
	gate := image("full", true)
	image("empty", false)
	image("above", false)
	above, err := storage.Open(filepath.Join(dir, "above"), storage.ReadWrite)
	if err != nil {
		b.Fatal(err)
	}
	if err := qcow.RebaseUnsafe(above, "full", "qcow2"); err != nil {
		b.Fatal(err)
	}
	if err := above.Close(); err != nil {
		b.Fatal(err)
	}
	for _, name := range []string{"empty", "full", "above"} {
		b.Run(name, func(b *testing.B) {
			f, err := storage.Open(filepath.Join(dir, name), storage.ReadOnly)
			if err != nil {
				b.Fatal(err)
			}
			img, err := qcow.Open(f, qcow.Options{ReadOnly: true, Gate: gate})
			if err != nil {
				b.Fatal(err)
			}
			b.ReportAllocs()
			extents := 0
			for b.Loop() {
				extents = 0
				for _, err := range img.Extents(0, size) {
					if err != nil {
						b.Fatal(err)
					}
					extents++
				}
			}
			b.ReportMetric(float64(extents), "extents")
			if err := img.Close(); err != nil {
				b.Fatal(err)
			}
		})
	}
}
