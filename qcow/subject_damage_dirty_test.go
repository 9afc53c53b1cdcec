package qcow_test

import (
	"bytes"
	"os"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// killed makes an image that QEMU was writing to with lazy refcounts when it was killed.
func (f *workshop) killed(name, options string, commands ...string) {
	f.t.Helper()
	f.qemu(name, 128<<20, "lazy_refcounts=on"+options)
	args := []string{"-f", "qcow2"}
	for _, c := range append(commands, "sigraise 9") {
		args = append(args, "-c", c)
	}
	if out, err := f.try("qemu-io", append(args, name)...); err == nil {
		f.t.Fatalf("qemu-io was not killed: %s", out)
	}
	if h := f.header(name); h.Incompatible&format.IncompatDirty == 0 {
		f.t.Fatalf("incompatible features %#x: not dirty", h.Incompatible)
	}
}

// An image that QEMU has left dirty is read as it is, and repaired by the first who opens it for writing. What was written is there.
func TestDirtyImageOfQEMU(t *testing.T) {
	for _, options := range []string{"", ",cluster_size=512", ",refcount_bits=1", ",extended_l2=on"} {
		t.Run(options, func(t *testing.T) {
			f := newWorkshop(t)
			f.killed("image", options, "write -P 0x5a 0 512", "write -P 0x5b 1M 200k", "discard 1100k 20k")
			dirty := readFile(t, f.path("image"))
			if r := at(t, storage.NewMemoryFrom(bytes.Clone(dirty))).report(); !r.Dirty || r.Clean() {
				t.Fatalf("before: %v", r)
			}
			expectContent := func(img *qcow.Image) {
				t.Helper()
				expectAt(t, img, repeated(0x5a, 512), 0)
				expectAt(t, img, repeated(0x5b, 64<<10), 1<<20)
				expectAt(t, img, repeated(0x5b, 512), 1<<20+200<<10-512)
			}
			img := open(t, f.file("image"), qcow.Options{ReadOnly: true})
			expectContent(img)
			do(t, img.Close())
			if !bytes.Equal(readFile(t, f.path("image")), dirty) {
				t.Fatal("reading has changed the file")
			}
			f.change("image", func(img *qcow.Image) {
				if img.Info().Dirty {
					t.Error("still marked dirty")
				}
				expectContent(img)
				writeAt(t, img, repeated(1, 512), 64<<20)
			})
			f.check("image")
			if h := f.header("image"); h.Incompatible != 0 && h.Incompatible != format.IncompatExtendedL2 || h.Compatible != format.CompatLazyRefcounts {
				t.Errorf("features %#x, %#x", h.Incompatible, h.Compatible)
			}
			f.io("image", "read -P 0x5a 0 512", "read -P 0x5b 1M 64k", "read -P 1 64M 512")
		})
	}
}

// With or without lazy refcounts, the engine keeps refcounts exact: at no moment the file is marked, and the checkers find nothing but
// leaks, whenever the process ends.
func TestLazyRefcountsAreExact(t *testing.T) {
	for _, lazy := range []bool{true, false} {
		mem := create(t, qcow.CreateOptions{Size: 4 << 20, ClusterSize: 4096, LazyRefcounts: lazy})
		img := open(t, mem, qcow.Options{ReserveBytes: 16 << 10})
		for i := range int64(20) {
			writeAt(t, img, repeated(byte(1+i), 5000), i*190_000)
			do(t, img.Discard(i*95_000, 8192))
			if i%5 == 0 {
				do(t, img.Flush())
			}
			m := at(t, mem)
			if r := m.report(); r.Dirty || r.Corruptions > 0 || m.h.Compatible&format.CompatLazyRefcounts != 0 != lazy {
				t.Fatalf("lazy %t, after %d writes: %v", lazy, i, r)
			}
		}
		do(t, img.Close())
		expectClean(t, mem.Bytes())
	}
}

// Committing to an image that is dirty repairs that first, and leaves both clean.
func TestCommitBetweenDirtyImages(t *testing.T) {
	f := newWorkshop(t)
	do(t, os.Remove(f.path("base.qcow2")))
	f.killed("base.qcow2", "", "write -P 1 0 1M")
	f.killed("top", ","+qemuBacking, "write -P 2 512k 64k", "write -P 3 100M 512")
	img := f.open("top", qcow.Options{CommitDepth: 1})
	do(t, img.Commit(t.Context(), qcow.CommitOptions{Empty: true}))
	do(t, img.Close())
	for _, name := range []string{"base.qcow2", "top"} {
		f.check(name)
		if h := f.header(name); h.Incompatible != 0 || h.Compatible != format.CompatLazyRefcounts {
			t.Errorf("%s: features %#x, %#x", name, h.Incompatible, h.Compatible)
		}
		f.io(name, "read -P 1 0 512k", "read -P 2 512k 64k", "read -P 3 100M 512")
	}
	if n := len(entriesOf(t, f.file("top"))); n != 0 {
		t.Errorf("%d clusters are left in the overlay", n)
	}
}
