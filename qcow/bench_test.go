package qcow_test

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// BenchmarkImage measures requests on an image in a file, with a warm page cache, and the same on a raw file.
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
	raw, err := storage.Create(filepath.Join(b.TempDir(), "raw"))
	if err != nil {
		b.Fatal(err)
	}
	if _, err := raw.WriteAt(bytes.Repeat([]byte{1}, size), 0); err != nil {
		b.Fatal(err)
	}
	b.Run("raw-read", func(b *testing.B) {
		run(b, func(off int64) error { _, err := raw.ReadAt(p, off); return err })
	})
	b.Run("raw-overwrite", func(b *testing.B) {
		run(b, func(off int64) error { _, err := raw.WriteAt(p, off); return err })
	})
	if err := raw.Close(); err != nil {
		b.Fatal(err)
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

// BenchmarkAllocateTogether lets 16 goroutines write 4 KiB each to clusters that are not allocated, or to as many fresh places of a raw file.
func BenchmarkAllocateTogether(b *testing.B) {
	const size, stride = 1 << 40, 64 << 10
	raw, err := storage.Create(filepath.Join(b.TempDir(), "raw"))
	if err != nil {
		b.Fatal(err)
	}
	for _, f := range []struct {
		name string
		to   io.WriterAt
	}{
		{"raw", raw},
		{"image", benchFile(b, qcow.CreateOptions{Size: size}, qcow.Options{})},
	} {
		next := new(atomic.Int64)
		b.Run(f.name, func(b *testing.B) {
			b.ReportAllocs()
			b.SetBytes(4096)
			b.SetParallelism((16 + runtime.GOMAXPROCS(0) - 1) / runtime.GOMAXPROCS(0))
			b.RunParallel(func(pb *testing.PB) {
				p := bytes.Repeat([]byte{1}, 4096)
				for pb.Next() {
					if _, err := f.to.WriteAt(p, next.Add(stride)%size); err != nil {
						b.Error(err)
						return
					}
				}
			})
		})
	}
	if err := raw.Close(); err != nil {
		b.Fatal(err)
	}
}

// benchFile makes an image in a file, and opens it.
func benchFile(b *testing.B, o qcow.CreateOptions, open qcow.Options) *qcow.Image {
	b.Helper()
	f, err := storage.Create(filepath.Join(b.TempDir(), "image.qcow2"))
	if err != nil {
		b.Fatal(err)
	}
	if err := qcow.Create(f, o); err != nil {
		b.Fatal(err)
	}
	img, err := qcow.Open(f, open)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := img.Close(); err != nil {
			b.Error(err)
		}
	})
	return img
}

// BenchmarkSequential reads and writes 1 MiB after 1 MiB of allocated clusters.
func BenchmarkSequential(b *testing.B) {
	const size = 256 << 20
	img := benchFile(b, qcow.CreateOptions{Size: size}, qcow.Options{})
	p := make([]byte, 1<<20)
	for off := int64(0); off < size; off += int64(len(p)) {
		if _, err := img.WriteAt(p, off); err != nil {
			b.Fatal(err)
		}
	}
	for name, do := range map[string]func([]byte, int64) (int, error){"read": img.ReadAt, "write": img.WriteAt} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			b.SetBytes(int64(len(p)))
			off := int64(0)
			for b.Loop() {
				if _, err := do(p, off); err != nil {
					b.Fatal(err)
				}
				off = (off + int64(len(p))) % size
			}
		})
	}
}

// BenchmarkCopyOnWrite writes 4 KiB to clusters that a backing file has: each is copied, and durable before it is linked. With a journal that
// is later.
func BenchmarkCopyOnWrite(b *testing.B) {
	const size, cluster = 256 << 20, 64 << 10
	dir := b.TempDir()
	base, err := storage.Create(filepath.Join(dir, "base.raw"))
	if err != nil {
		b.Fatal(err)
	}
	for off := int64(0); off < size; off += 1 << 20 {
		if _, err := base.WriteAt(bytes.Repeat([]byte{1}, 1<<20), off); err != nil {
			b.Fatal(err)
		}
	}
	if err := base.Close(); err != nil {
		b.Fatal(err)
	}
	overlay := func(b *testing.B, journal bool) *qcow.Image {
		b.Helper()
		path := filepath.Join(dir, "top.qcow2")
		if err := os.RemoveAll(path); err != nil {
			b.Fatal(err)
		}
		f, err := storage.Create(path)
		if err != nil {
			b.Fatal(err)
		}
		if err := qcow.Create(f, qcow.CreateOptions{Size: size, BackingFile: "base.raw", BackingFormat: "raw"}); err != nil {
			b.Fatal(err)
		}
		o := qcow.Options{Gate: qcow.Within(dir)}
		if journal {
			if o.Journal, err = storage.OpenJournal(filepath.Join(shared(b), "journal"), f); err != nil {
				b.Fatal(err)
			}
		}
		img, err := qcow.Open(f, o)
		if err != nil {
			b.Fatal(err)
		}
		return img
	}
	for _, journal := range []bool{false, true} {
		b.Run(fmt.Sprintf("journal=%v", journal), func(b *testing.B) {
			img, next := overlay(b, journal), int64(0)
			p := make([]byte, 4096)
			b.ReportAllocs()
			b.SetBytes(int64(len(p)))
			for b.Loop() {
				if next == size {
					b.StopTimer()
					if err := img.Close(); err != nil {
						b.Fatal(err)
					}
					img, next = overlay(b, journal), 0
					b.StartTimer()
				}
				if _, err := img.WriteAt(p, next); err != nil {
					b.Fatal(err)
				}
				next += cluster
			}
			if err := img.Close(); err != nil {
				b.Error(err)
			}
		})
	}
}

// BenchmarkSnapshot takes and deletes an internal snapshot of an image with 1 GiB of data.
func BenchmarkSnapshot(b *testing.B) {
	img := benchFile(b, qcow.CreateOptions{Size: 1 << 30}, qcow.Options{})
	p := bytes.Repeat([]byte{1}, 1<<20)
	for off := int64(0); off < 1<<30; off += int64(len(p)) {
		if _, err := img.WriteAt(p, off); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportAllocs()
	for b.Loop() {
		s, err := img.CreateSnapshot(b.Context(), "s", time.Unix(0, 0))
		if err != nil {
			b.Fatal(err)
		}
		if err := img.DeleteSnapshot(b.Context(), s.ID); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkOpen opens an image of 1 TiB with an L2 table for every GiB.
func BenchmarkOpen(b *testing.B) {
	path := filepath.Join(b.TempDir(), "image.qcow2")
	f, err := storage.Create(path)
	if err != nil {
		b.Fatal(err)
	}
	if err := qcow.Create(f, qcow.CreateOptions{Size: 1 << 40}); err != nil {
		b.Fatal(err)
	}
	img, err := qcow.Open(f, qcow.Options{})
	if err != nil {
		b.Fatal(err)
	}
	for off := int64(0); off < 1<<40; off += 1 << 30 {
		if _, err := img.WriteAt(make([]byte, 4096), off); err != nil {
			b.Fatal(err)
		}
	}
	if err := img.Close(); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		f, err := storage.Open(path, storage.ReadWrite)
		if err != nil {
			b.Fatal(err)
		}
		img, err := qcow.Open(f, qcow.Options{})
		if err != nil {
			b.Fatal(err)
		}
		if err := img.Close(); err != nil {
			b.Fatal(err)
		}
	}
}
