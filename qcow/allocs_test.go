//go:build !race

package qcow_test

import (
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// Reading and writing takes no memory, be it allocated or not. The race detector empties pools at random.
func TestRequestsTakeNoMemory(t *testing.T) {
	img := open(t, create(t, qcow.CreateOptions{Size: 64 << 20}), qcow.Options{})
	fresh := int64(16 << 20)
	p := repeated(1, 1<<20)
	for off := int64(0); off < 16<<20; off += int64(len(p)) {
		writeAt(t, img, p, off)
	}
	if err := img.Flush(); err != nil {
		t.Fatal(err)
	}
	for name, do := range map[string]func() error{
		"read":       func() error { _, err := img.ReadAt(p[:4096], 5<<20+4096); return err },
		"long read":  func() error { _, err := img.ReadAt(p, 5<<20); return err },
		"overwrite":  func() error { _, err := img.WriteAt(p[:4096], 5<<20+4096); return err },
		"long write": func() error { _, err := img.WriteAt(p, 5<<20); return err },
		"allocating write": func() error {
			fresh += 64 << 10
			_, err := img.WriteAt(p[:4096], fresh)
			return err
		},
		"flush": img.Flush,
	} {
		if n := testing.AllocsPerRun(200, func() {
			if err := do(); err != nil {
				t.Error(err)
			}
		}); n >= 1 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
}

// A link that is held back takes no more memory than the buffer that the cluster is copied by, and a list of what the backing file has.
func TestHeldLinksTakeLittleMemory(t *testing.T) {
	f := files{"base": storage.NewMemoryFrom(repeated(1, 32<<20)), "top": create(t, qcow.CreateOptions{Size: 32 << 20, BackingFile: "base", BackingFormat: "raw"})}
	img := open(t, f["top"], qcow.Options{Gate: f.gate, Journal: newJournal(2000)})
	p, next := repeated(2, 4096), int64(0)
	if n := testing.AllocsPerRun(200, func() {
		if _, err := img.WriteAt(p, next); err != nil {
			t.Error(err)
		}
		next += 64 << 10
	}); n > 3 {
		t.Errorf("%v allocations", n)
	}
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
}
