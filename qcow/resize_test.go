package qcow_test

import (
	"bytes"
	"context"
	"errors"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// A discard up to the end of the disk takes the last cluster along although that is a part of one. When the disk grows while the
// discard is under way, the rest of the cluster belongs to the disk, and what is written there is not the discard's to drop.
func TestResizeDuringDiscardOfTheTail(t *testing.T) {
	const cluster, span = 1024, 128 << 10 // an L2 table maps span bytes
	const size = span + cluster/2
	for name, discard := range map[string]func(img *qcow.Image) error{
		"discard":      func(img *qcow.Image) error { return img.Discard(0, size) },
		"write zeroes": func(img *qcow.Image) error { return img.WriteZeroes(0, size, true) },
	} {
		t.Run(name, func(t *testing.T) {
			m := newHandmade(t, qcow.CreateOptions{Size: size, ClusterSize: cluster}, func(img *qcow.Image) {
				writeAt(t, img, repeated(1, size), 0)
			})
			f := &hooked{File: m.file()}
			img := open(t, f, qcow.Options{})
			reached, goOn := make(chan struct{}), make(chan struct{})
			first := int64(m.l2Table(0))
			f.set(func() {
				f.beforeRead = func(_ []byte, off int64) error {
					if off == first {
						close(reached)
						<-goOn
					}
					return nil
				}
			})
			done := make(chan error)
			go func() { done <- discard(img) }()
			<-reached // the discard has begun, on a disk of the old size
			if err := img.Resize(context.Background(), size+cluster/2); err != nil {
				t.Fatal(err)
			}
			writeAt(t, img, repeated(2, cluster/2), size)
			close(goOn)
			if err := <-done; err != nil {
				t.Fatal(err)
			}
			expectAt(t, img, repeated(2, cluster/2), size)
			expectAt(t, img, make([]byte, span), 0)
			if err := img.Close(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// growing is an image whose disk can't grow without a larger L1 table, over a file with hooks. Its first 32 KiB are ones, and
// the rest has no L2 table.
type growing struct {
	*handmade
	disk *hooked
	log  *storage.Recorder
	img  *qcow.Image
}

const (
	growingOld = 64 << 10 // bytes of disk
	growingNew = 4 << 20
)

func newGrowing(t *testing.T) *growing {
	m := newHandmade(t, qcow.CreateOptions{Size: growingOld, ClusterSize: 512}, func(img *qcow.Image) {
		writeAt(t, img, repeated(1, growingOld/2), 0)
	})
	g := &growing{handmade: m, log: storage.NewRecorder(m.file())}
	g.disk = &hooked{File: g.log}
	g.img = open(t, g.disk, qcow.Options{})
	return g
}

// expectOld expects that the content of a file, once opened again, has the bytes that were there before.
func (g *growing) expectOld(f storage.File) {
	g.t.Helper()
	img := open(g.t, f, qcow.Options{})
	expectAt(g.t, img, repeated(1, growingOld/2-512), 0)
	if err := img.Close(); err != nil {
		g.t.Fatal(err)
	}
}

// A failed sync leaves open whether the header names the old or the new L1 table. Neither may be touched any more, also not by
// requests that had begun before the failure.
func TestResizeWhoseLastSyncFails(t *testing.T) {
	g := newGrowing(t)
	var (
		inside   = make(chan struct{})
		once     sync.Once
		switched bool
	)
	written := make(chan error, 1)
	g.disk.set(func() {
		g.disk.beforeWrite = func(p []byte, off int64) error {
			if off == format.SwitchOffset {
				switched = true
			}
			if bytes.Equal(p, repeated(2, 512)) {
				once.Do(func() { close(inside) })
			}
			return nil
		}
		g.disk.beforeSync = func() error {
			if !switched {
				return nil
			}
			// A write begins: half of it goes where a cluster is, half needs an L2 table, which the resize holds up.
			go func() {
				_, err := g.img.WriteAt(repeated(2, 1024), growingOld/2-512)
				written <- err
			}()
			<-inside
			g.disk.set(func() { g.disk.beforeSync = nil })
			return errInjected
		}
	})
	if err := g.img.Resize(context.Background(), growingNew); !errors.Is(err, errInjected) {
		t.Fatalf("resize: %v", err)
	}
	if err := <-written; err == nil {
		t.Fatal("a write succeeded although a sync had failed")
	}
	if err := g.img.Close(); err == nil {
		t.Fatal("close succeeded although a sync had failed")
	}
	g.expectOld(g.log.File)
}

// A write of the header that fails halfway and is undone may have reached the disk before it was undone.
func TestResizeWhoseHeaderWriteFailsHalfway(t *testing.T) {
	g := newGrowing(t)
	g.disk.set(func() {
		g.disk.beforeWrite = func(p []byte, off int64) error {
			if off != format.SwitchOffset {
				return nil
			}
			g.disk.set(func() { g.disk.beforeWrite = nil })
			if _, err := g.log.WriteAt(p[:len(p)/2], off); err != nil {
				t.Error(err)
			}
			return errInjected
		}
	})
	if err := g.img.Resize(context.Background(), growingNew); !errors.Is(err, errInjected) {
		t.Fatalf("resize: %v", err)
	}
	if size := g.img.Size(); size != growingOld {
		t.Fatalf("the disk has %d bytes after a resize that failed", size)
	}
	writeAt(t, g.img, repeated(3, 512), growingOld-512) // allocates
	if err := g.img.Close(); err != nil {
		t.Fatal(err)
	}
	states := 0
	for s := range storage.CrashStates(g.b, g.log.Ops(), storage.CrashOptions{Seed: 1, Exhaustive: 6, Random: 8}) {
		if states++; states%stride != 0 {
			continue
		}
		img, err := qcow.Open(storage.NewMemoryFrom(s.Content), qcow.Options{})
		if err != nil {
			t.Fatalf("%s: %v", s.Name, err)
		}
		got := make([]byte, growingOld/2)
		if _, err := img.ReadAt(got, 0); err != nil {
			t.Fatalf("%s: %v", s.Name, err)
		}
		if i := firstDifference(got, repeated(1, growingOld/2)); i >= 0 {
			t.Fatalf("%s: byte %d is lost\n%s", s.Name, i, storage.Trace(g.log.Ops()[:s.Issued]))
		}
	}
}

// QEMU gives a disk of no bytes no L1 table at all.
func TestResizeOfAnEmptyDiskFromQEMU(t *testing.T) {
	require.Tool(t, "qemu-img")
	path := filepath.Join(t.TempDir(), "empty.qcow2")
	if out, err := exec.CommandContext(t.Context(), "qemu-img", "create", "-q", "-f", "qcow2", path, "0").CombinedOutput(); err != nil {
		t.Fatalf("qemu-img create: %v\n%s", err, out)
	}
	f, err := storage.Open(path, storage.ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	change(t, f, func(img *qcow.Image) {
		if err := img.Resize(context.Background(), 1<<20); err != nil {
			t.Fatal(err)
		}
		writeAt(t, img, repeated(7, 1<<20), 0)
	})
	if out, err := exec.CommandContext(t.Context(), "qemu-img", "check", path).CombinedOutput(); err != nil {
		t.Fatalf("qemu-img check: %v\n%s", err, out)
	}
}

// Tables may map clusters behind the end of the disk, for instance when another program has made it smaller. They don't
// come back to light when it grows.
func TestResizeOverMappedClusters(t *testing.T) {
	m := newHandmade(t, qcow.CreateOptions{Size: 64 << 10, ClusterSize: 512}, func(img *qcow.Image) {
		writeAt(t, img, repeated(1, 64<<10), 0)
	})
	const size = 10 << 10
	m.put(format.SwitchOffset, size)
	expectClean(t, m.b)
	f := m.file()
	change(t, f, func(img *qcow.Image) {
		if err := img.Resize(context.Background(), 128<<10); err != nil {
			t.Fatal(err)
		}
		expectAt(t, img, repeated(1, size), 0)
		expectAt(t, img, make([]byte, 128<<10-size), size)
	})
	expectClean(t, f.Bytes())
}

// Nobody but the image knows who else may use a table whose refcount is above 1. When it has moved, the old one stays as it is.
func TestResizeOfATableWithALeakedRefcount(t *testing.T) {
	m := newHandmade(t, qcow.CreateOptions{Size: 32 << 10, ClusterSize: 512}, nil)
	m.setRefcount(m.h.L1Offset, 2)
	change(t, m.file(), func(img *qcow.Image) {
		if err := img.Resize(context.Background(), 8<<20); err != nil {
			t.Fatal(err)
		}
		if err := img.Flush(); err != nil {
			t.Fatal(err)
		}
		writeAt(t, img, repeated(1, 512), 8<<20-512)
	})
}

func TestResizeRefuses(t *testing.T) {
	file := storage.NewMemory()
	if err := qcow.Create(file, qcow.CreateOptions{Size: 1 << 20, ClusterSize: 512}); err != nil {
		t.Fatal(err)
	}
	img, err := qcow.Open(file, qcow.Options{})
	if err != nil {
		t.Fatal(err)
	}
	before := file.Bytes()
	for _, test := range []struct {
		size int64
		want error
	}{
		{1 << 20, nil}, // it has that size
		{-512, qcow.ErrInvalid},
		{1<<20 + 1, qcow.ErrInvalid},
		{128<<30 + 512, qcow.ErrInvalid}, // an L1 table of 32 MiB maps 128 GiB in clusters of 512 bytes
		{1<<63 - 512, qcow.ErrInvalid},
	} {
		if err := img.Resize(t.Context(), test.size); !errors.Is(err, test.want) {
			t.Errorf("resize to %d: %v, want %v", test.size, err, test.want)
		}
	}
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	if err := img.Resize(cancelled, 2<<20); !errors.Is(err, context.Canceled) {
		t.Errorf("resize for a caller who has gone: %v", err)
	}
	if img.Size() != 1<<20 || !bytes.Equal(file.Bytes(), before) {
		t.Error("a refused resize changed the image")
	}
	if err := img.Close(); err != nil {
		t.Error(err)
	}
}
