package qcow_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/check"
	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/luks"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// amend amends an image of the folder.
func (f *workshop) amend(name string, o qcow.AmendOptions) error {
	f.t.Helper()
	file := f.file(name)
	return errors.Join(qcow.Amend(f.t.Context(), file, o), file.Close())
}

func (f *workshop) mustAmend(name string, o qcow.AmendOptions) {
	f.t.Helper()
	if err := f.amend(name, o); err != nil {
		f.t.Fatal(err)
	}
	f.check(name)
}

// header returns the header of an image of the folder.
func (f *workshop) header(name string) *format.Header {
	f.t.Helper()
	file := f.file(name)
	b := make([]byte, min(f.length(name), 1<<format.MaxClusterBits))
	_, err := file.ReadAt(b, 0)
	if err := errors.Join(err, file.Close()); err != nil {
		f.t.Fatal(err)
	}
	h, err := format.DecodeHeader(b)
	if err != nil {
		f.t.Fatal(err)
	}
	return h
}

// patch changes bytes of a file of the folder.
func (f *workshop) patch(name string, off int64, b []byte) {
	f.t.Helper()
	file := f.file(name)
	_, err := file.WriteAt(b, off)
	if err := errors.Join(err, file.Close()); err != nil {
		f.t.Fatal(err)
	}
}

// setBit sets a feature bit of the kind whose bits are at off.
func (f *workshop) setBit(name string, off int64, bit uint) {
	f.t.Helper()
	b, err := os.ReadFile(f.path(name))
	if err != nil {
		f.t.Fatal(err)
	}
	f.patch(name, off, binary.BigEndian.AppendUint64(nil, binary.BigEndian.Uint64(b[off:])|1<<bit))
}

func (f *workshop) expectVersion(name string, version uint32) {
	f.t.Helper()
	h := f.header(name)
	if h.Version != version {
		f.t.Fatalf("version %d instead of %d", h.Version, version)
	}
	if version == 2 && (h.Incompatible|h.Compatible|h.Autoclear != 0 || h.Extension(format.ExtFeatureNames) != nil) {
		f.t.Fatalf("version 2 with features: %+v", h)
	}
}

// qemu makes an image with qemu-img.
func (f *workshop) qemu(name string, size int64, options string) {
	f.t.Helper()
	f.run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, name, fmt.Sprint(size))
}

// snapshot runs qemu-img snapshot.
func (f *workshop) snapshot(name string, args ...string) {
	f.t.Helper()
	f.run("qemu-img", append(append([]string{"snapshot"}, args...), name)...)
}

var (
	yes, no = true, false

	version2 = qcow.AmendOptions{Version: 2}
	version3 = qcow.AmendOptions{Version: 3}
)

// TestAmendVersion makes version 2 out of version 3 and the other way round: whatever reads as zeroes by a mark goes on doing so, in the
// disk and in snapshots, and what QEMU makes of the same image looks the same.
func TestAmendVersion(t *testing.T) {
	const size = 64 << 20
	cases := []struct {
		name  string
		make  func(f *workshop)
		reads []string // of qemu-io
		then  []string // after applying snapshot foo, if there is one
	}{
		{"zero clusters", func(f *workshop) {
			f.qemu("image", size, "lazy_refcounts=on")
			f.io("image", "write -z 0 128k")
		}, []string{"read -P 0 0 128k"}, nil},
		{"zero clusters in a snapshot", func(f *workshop) {
			f.qemu("image", size, "compat=1.1")
			f.io("image", "write -z 0 128k")
			f.snapshot("image", "-c", "foo")
			f.io("image", "write -P 0x2a 0 128k")
		}, []string{"read -P 0x2a 0 128k"}, []string{"read -P 0 0 128k"}},
		{"a table shared with a snapshot", func(f *workshop) {
			f.qemu("image", size, "compat=1.1")
			f.io("image", "write -z 0 128k", "write -P 0x2b 128k 64k")
			f.snapshot("image", "-c", "foo")
		}, []string{"read -P 0 0 128k", "read -P 0x2b 128k 64k"}, []string{"read -P 0 0 128k", "read -P 0x2b 128k 64k"}},
		{"backing file", func(f *workshop) {
			f.qemu("image", size, qemuBacking)
			f.io("image", "read -P 0xbb 0 64k", "write -z 0 32k", "write -z 64k 128k")
		}, []string{"read -P 0 0 32k", "read -P 0xbb 32k 32k", "read -P 0 64k 256k"}, nil},
		{"backing file and a snapshot", func(f *workshop) {
			f.qemu("image", size, "cluster_size=4k,"+qemuBacking)
			f.io("image", "write -z 0 32k")
			f.snapshot("image", "-c", "foo")
			f.io("image", "write -P 0x42 0 128k")
		}, []string{"read -P 0x42 0 128k"}, []string{"read -P 0 0 32k", "read -P 0xbb 32k 32k"}},
		{"backing file and a shared table", func(f *workshop) {
			f.qemu("image", size, "cluster_size=4k,"+qemuBacking)
			f.io("image", "write -z 0 32k")
			f.snapshot("image", "-c", "foo")
			f.snapshot("image", "-c", "bar")
		}, []string{"read -P 0 0 32k", "read -P 0xbb 32k 32k"}, []string{"read -P 0 0 32k", "read -P 0xbb 32k 32k"}},
		{
			"zeroes over data that a snapshot keeps", func(f *workshop) {
				f.qemu("image", size, "cluster_size=4k,"+qemuBacking)
				f.io("image", "write -P 0x11 0 32k", "write -P 0x12 1M 4k")
				f.snapshot("image", "-c", "foo")
				f.io("image", "write -z 0 16k", "write -z -u 16k 8k", "write -P 0x22 28k 8k")
				f.snapshot("image", "-c", "bar")
				f.io("image", "write -z 28k 4k")
			},
			[]string{"read -P 0 0 24k", "read -P 0x11 24k 4k", "read -P 0 28k 4k", "read -P 0x22 32k 4k", "read -P 0xbb 36k 1k"},
			[]string{"read -P 0x11 0 32k", "read -P 0xbb 32k 1k", "read -P 0x12 1M 4k"},
		},
		{"preallocated zeroes over all of the disk", func(f *workshop) {
			f.qemu("image", size, "cluster_size=64k")
			f.io("image", "write -P 0x2a 0 16M", "write -z 0 16M")
		}, []string{"read -P 0 0 64M"}, nil},
		{"compressed clusters", func(f *workshop) {
			f.qemu("image", size, "cluster_size=4k")
			f.io("image", "write -c -P 7 0 4k", "write -c -P 8 4k 4k", "write -z 8k 4k")
			f.snapshot("image", "-c", "foo")
			f.io("image", "write -z 4k 4k")
		}, []string{"read -P 7 0 4k", "read -P 0 4k 8k"}, []string{"read -P 7 0 4k", "read -P 8 4k 4k", "read -P 0 8k 4k"}},
		{"zstd without compressed clusters", func(f *workshop) {
			f.qemu("image", size, "compression_type=zstd")
			f.io("image", "write -P 7 0 4k", "write -z 1M 1M")
		}, []string{"read -P 7 0 4k", "read -P 0 1M 1M"}, nil},
		{"unknown compatible and autoclear features", func(f *workshop) {
			f.qemu("image", size, "compat=1.1")
			f.io("image", "write -P 7 0 4k")
			f.setBit("image", format.CompatibleOffset, 42)
			f.setBit("image", format.AutoclearOffset, 42)
		}, []string{"read -P 7 0 4k"}, nil},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			f := newWorkshop(t)
			c.make(f)
			f.run("cp", "image", "theirs")
			f.mustAmend("image", version2)
			f.expectVersion("image", 2)
			f.io("image", c.reads...)

			f.run("qemu-img", "amend", "-f", "qcow2", "-o", "compat=0.10", "theirs")
			f.run("qemu-img", "compare", "-q", "-f", "qcow2", "-F", "qcow2", "image", "theirs")
			// Ours has the old tables as free clusters, QEMU's has zeroes stored wherever a mark had a cluster.
			if ours, theirs := f.length("image"), f.length("theirs"); ours > theirs+1<<20 {
				t.Errorf("%d bytes, by qemu-img %d", ours, theirs)
			}

			f.mustAmend("image", version3)
			f.expectVersion("image", 3)
			f.io("image", c.reads...)
			if c.then != nil {
				f.mustAmend("image", version2)
				f.snapshot("image", "-a", "foo")
				f.check("image")
				f.io("image", c.then...)
			}
		})
	}
}

// TestAmendDirty amends images whose refcounts are wrong, as QEMU's are after a crash with lazy refcounts.
func TestAmendDirty(t *testing.T) {
	for name, o := range map[string]qcow.AmendOptions{"version 2": version2, "no lazy refcounts": {LazyRefcounts: &no}} {
		t.Run(name, func(t *testing.T) {
			f := newWorkshop(t)
			f.qemu("image", 64<<20, "lazy_refcounts=on")
			if out, err := f.try("qemu-io", "-c", "write -P 0x2a 0 128k", "-c", "flush", "-c", "abort", "image"); err == nil {
				t.Fatalf("qemu-io ends as usual: %s", out)
			}
			if h := f.header("image"); h.Incompatible&format.IncompatDirty == 0 {
				t.Fatal("the image is not dirty")
			}
			f.mustAmend("image", o)
			h := f.header("image")
			if h.Incompatible != 0 || h.Compatible != 0 {
				t.Errorf("features %#x, %#x", h.Incompatible, h.Compatible)
			}
			f.io("image", "read -P 0x2a 0 128k")
		})
	}
}

// TestAmendFeatures sets and clears what only the header knows, together with other changes.
func TestAmendFeatures(t *testing.T) {
	f := newWorkshop(t)
	f.qemu("image", 64<<20, "compat=0.10")
	f.io("image", "write -P 0x2a 42M 64k")
	expectClass(t, "lazy refcounts of version 2", f.amend("image", qcow.AmendOptions{LazyRefcounts: &yes}), qcow.ErrInvalid)
	f.mustAmend("image", qcow.AmendOptions{Version: 3, LazyRefcounts: &yes, RefcountBits: 4})
	if got := specifics(f.info("image")); got["lazy-refcounts"] != any(true) || got["refcount-bits"] != 4.0 || got["compat"] != "1.1" {
		t.Errorf("qemu-img says %v", got)
	}
	expectClass(t, "version 2 with lazy refcounts", f.amend("image", qcow.AmendOptions{Version: 2, LazyRefcounts: &yes}), qcow.ErrInvalid)
	expectClass(t, "version 2 with 4 bits", f.amend("image", version2), qcow.ErrInvalid)
	f.mustAmend("image", qcow.AmendOptions{LazyRefcounts: &no})
	f.mustAmend("image", qcow.AmendOptions{})
	f.mustAmend("image", qcow.AmendOptions{Version: 2, RefcountBits: 16})
	f.expectVersion("image", 2)
	f.io("image", "read -P 0x2a 42M 64k", "read -P 0 0 42M")
}

// TestAmendDataFile clears the flag of a raw data file and changes its name.
func TestAmendDataFile(t *testing.T) {
	f := newWorkshop(t)
	f.create("image", recipe{o: qcow.CreateOptions{Size: 1 << 20, DataFileRaw: true}, external: true})
	f.mustAmend("image", qcow.AmendOptions{DataFileRaw: &yes, RefcountBits: 64})
	f.mustAmend("image", qcow.AmendOptions{DataFileRaw: &no})
	if got := specifics(f.info("image")); got["data-file-raw"] != any(false) || got["refcount-bits"] != 64.0 {
		t.Errorf("qemu-img says %v", got)
	}
	expectClass(t, "raw again", f.amend("image", qcow.AmendOptions{DataFileRaw: &yes}), qcow.ErrInvalid)
	expectClass(t, "version 2", f.amend("image", qcow.AmendOptions{Version: 2, RefcountBits: 16}), qcow.ErrInvalid)
	f.run("mv", "data", "moved")
	f.mustAmend("image", qcow.AmendOptions{DataFileName: "moved"})
	f.io("image", "write -P 1 0 64k")
	f.qemu("other", 1<<20, "compat=1.1")
	expectClass(t, "no data file", f.amend("other", qcow.AmendOptions{DataFileName: "data"}), qcow.ErrInvalid)
}

// TestAmendRefuses has what an image can't become. Nothing of it changes then, though other changes are asked for as well.
func TestAmendRefuses(t *testing.T) {
	f := newWorkshop(t)
	cases := []struct {
		name string
		make func()
		o    qcow.AmendOptions
		qemu string // -o of qemu-img amend, which refuses it too
	}{
		{"version 4", func() { f.qemu("image", 1<<20, "compat=1.1") }, qcow.AmendOptions{Version: 4}, "compat=v4"},
		{"width", func() { f.qemu("image", 1<<20, "compat=1.1") }, qcow.AmendOptions{RefcountBits: 12}, "refcount_bits=12"},
		{"width of version 2", func() { f.qemu("image", 1<<20, "compat=0.10") }, qcow.AmendOptions{RefcountBits: 8}, "refcount_bits=8"},
		{"width and version 2", func() { f.qemu("image", 1<<20, "compat=1.1") }, qcow.AmendOptions{Version: 2, RefcountBits: 32}, "compat=0.10,refcount_bits=32"},
		{"subclusters", func() { f.qemu("image", 1<<20, "extended_l2=on") }, qcow.AmendOptions{Version: 2, LazyRefcounts: &no}, "compat=0.10"},
		{"zstd", func() {
			f.qemu("image", 1<<20, "compression_type=zstd")
			f.io("image", "write -c -P 1 0 64k")
		}, version2, "compat=0.10"},
		{"snapshot of another size", func() {
			f.qemu("image", 1<<20, "compat=1.1")
			f.snapshot("image", "-c", "foo")
			f.run("qemu-img", "resize", "-q", "image", "2M")
		}, version2, "compat=0.10"},
		{"bitmaps, which QEMU loses", func() {
			f.qemu("image", 1<<20, "compat=1.1")
			f.run("qemu-img", "bitmap", "--add", "image", "b")
		}, version2, "compat=0.10"},
		{"too many references", func() {
			f.qemu("image", 1<<20, "compat=0.10")
			f.io("image", "write -P 1 0 64k")
			f.snapshot("image", "-c", "foo")
		}, qcow.AmendOptions{Version: 3, RefcountBits: 1}, "refcount_bits=1"},
		{"keys of an image that is not encrypted", func() { f.qemu("image", 1<<20, "compat=0.10") }, qcow.AmendOptions{Version: 3, RemoveKeySlots: []int{0}}, "encrypt.state=inactive,encrypt.keyslot=0"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			c.make()
			before, err := os.ReadFile(f.path("image"))
			if err != nil {
				t.Fatal(err)
			}
			expectClass(t, "amend", f.amend("image", c.o), qcow.ErrInvalid)
			after, err := os.ReadFile(f.path("image"))
			if err != nil {
				t.Fatal(err)
			}
			if firstDifference(before, after) >= 0 {
				t.Error("the image has changed")
			}
			if out, err := f.try("qemu-img", "amend", "-f", "qcow2", "-o", c.qemu, "image"); err == nil && c.name != "bitmaps, which QEMU loses" {
				t.Errorf("qemu-img does it: %s", out)
			}
		})
	}
}

// TestAmendRefcountBits takes an image with snapshots through all widths that can count its references, in several cluster sizes.
func TestAmendRefcountBits(t *testing.T) {
	widths := []int{2, 8, 64, 16, 4}
	if long() {
		widths = []int{2, 4, 8, 16, 32, 64, 16, 2, 32, 8, 64, 4}
	}
	for _, cluster := range []string{"512", "4k", "64k", "2M"} {
		t.Run(cluster, func(t *testing.T) {
			f := newWorkshop(t)
			f.qemu("image", 16<<20, "refcount_bits=64,cluster_size="+cluster)
			f.io("image", "write -P 1 0 3M")
			f.snapshot("image", "-c", "foo")
			f.io("image", "write -P 2 1M 3M")
			f.snapshot("image", "-c", "bar")
			for _, bits := range widths {
				was := f.length("image")
				f.mustAmend("image", qcow.AmendOptions{RefcountBits: bits})
				if got := specifics(f.info("image"))["refcount-bits"]; got != float64(bits) {
					t.Fatalf("qemu-img says %v bits", got)
				}
				if now := f.length("image"); now > was+was/8+8<<20 {
					t.Errorf("%d bits: the file has grown from %d to %d bytes", bits, was, now)
				}
				f.io("image", "read -P 1 0 1M", "read -P 2 1M 3M", "read -P 0 4M 1M")
			}
			before := f.header("image")
			expectClass(t, "1 bit", f.amend("image", qcow.AmendOptions{RefcountBits: 1}), qcow.ErrInvalid)
			if after := f.header("image"); after.RefcountTableOffset != before.RefcountTableOffset {
				t.Error("the refcount table has moved")
			}
			f.change("image", func(img *qcow.Image) {
				writeAt(t, img, repeated(3, 1<<20), 8<<20)
				if err := img.ApplySnapshot(t.Context(), "foo"); err != nil {
					t.Fatal(err)
				}
				expectAt(t, img, repeated(1, 3<<20), 0)
			})
			f.check("image")
		})
	}
}

// TestAmendRefcountBitsExactFit widens refcounts where the first new block has few free entries left: for itself and not for the table, or just
// for both, ...
func TestAmendRefcountBitsExactFit(t *testing.T) {
	for clusters := int64(50); clusters < 70; clusters++ {
		mem := create(t, qcow.CreateOptions{Size: 64 << 10, ClusterSize: 512, RefcountBits: 1})
		change(t, mem, func(img *qcow.Image) { writeAt(t, img, repeated(1, clusters*512), 0) })
		if err := qcow.Amend(t.Context(), mem, qcow.AmendOptions{RefcountBits: 64}); err != nil {
			t.Fatal(err)
		}
		expectClean(t, mem.Bytes())
		change(t, mem, func(img *qcow.Image) { expectAt(t, img, repeated(1, clusters*512), 0) })
	}
}

// TestAmendRefcountBitsLimit meets the largest refcount table: 2^20 blocks of 64 refcounts are for clusters of 512 bytes up to 32 GiB.
func TestAmendRefcountBitsLimit(t *testing.T) {
	f := newWorkshop(t)
	f.create("image", recipe{o: qcow.CreateOptions{Size: 1 << 20, ClusterSize: 512, RefcountBits: 1}})
	h := f.header("image")
	// A refcount table and a block behind a hole of 33 GiB, with refcounts for themselves; the block for what is before the hole stays.
	const at, perBlock = 33 << 30 / 512, 512 * 8
	const clusters = (at/perBlock+1)*8/512 + 1 // of the table
	table, block := make([]byte, clusters*512), make([]byte, 512)
	format.PutEntry(table, 0, uint64(h.RefcountTableOffset)+512)
	format.PutEntry(table, at/perBlock, (at+clusters)*512)
	for i := range uint64(clusters + 1) {
		format.PutRefcount(block, 0, at%perBlock+i, 1)
	}
	f.patch("image", at*512, append(table, block...))
	old := uint64(h.ClusterOf(h.RefcountTableOffset))
	h.RefcountTableOffset, h.RefcountTableClusters = at*512, clusters
	f.patch("image", format.SwitchOffset, h.EncodeSwitch())
	// The old table is free now.
	first := make([]byte, 512)
	for i := range uint64(h.L1Offset)/512 + h.ClustersFor(h.L1Bytes()) {
		if i != old {
			format.PutRefcount(first, 0, i, 1)
		}
	}
	f.patch("image", int64(old+1)*512, first)
	f.check("image")

	expectClass(t, "64 bits", f.amend("image", qcow.AmendOptions{RefcountBits: 64}), qcow.ErrNoSpace)
	if after := f.header("image"); after.RefcountOrder != 0 || after.RefcountTableOffset != h.RefcountTableOffset {
		t.Error("the image has changed")
	}
	f.mustAmend("image", qcow.AmendOptions{RefcountBits: 16})
}

// TestAmendKeys adds and removes passphrases.
func TestAmendKeys(t *testing.T) {
	f := newWorkshop(t)
	f.create("image", recipe{o: qcow.CreateOptions{Size: 1 << 20, Encryption: cheap()}})
	f.io("image", "write -P 5 0 64k")
	slots := func() (active []int) {
		for i, s := range specifics(f.info("image"))["encrypt"].(map[string]any)["slots"].([]any) {
			if s.(map[string]any)["active"].(bool) {
				active = append(active, i)
			}
		}
		return active
	}
	expect := func(want ...int) {
		t.Helper()
		if got := slots(); !slices.Equal(got, want) {
			t.Fatalf("slots %v are in use instead of %v", got, want)
		}
	}
	opens := func(passphrase string) error {
		file := f.file("image")
		img, err := qcow.Open(file, qcow.Options{ReadOnly: true, Passphrase: []byte(passphrase)})
		if err != nil {
			return errors.Join(err, file.Close())
		}
		expectAt(t, img, repeated(5, 64<<10), 0)
		return img.Close()
	}
	quick := luks.KeyOptions{Iterations: luks.MinIterations}
	old, second := []byte(secret), []byte("second")
	f.mustAmend("image", qcow.AmendOptions{Passphrase: old, AddPassphrase: second, KeyOptions: quick, RefcountBits: 64})
	expect(0, 1)
	f.mustAmend("image", qcow.AmendOptions{Passphrase: second, AddPassphrase: second, KeyOptions: quick})
	expect(0, 1, 2)
	for _, p := range []string{secret, "second"} {
		if err := opens(p); err != nil {
			t.Fatal(err)
		}
	}
	expectClass(t, "wrong passphrase", f.amend("image", qcow.AmendOptions{Passphrase: []byte("x"), AddPassphrase: []byte("y"), KeyOptions: quick}), qcow.ErrPassphrase)
	expectClass(t, "to remove an unknown passphrase", f.amend("image", qcow.AmendOptions{RemovePassphrase: []byte("x")}), qcow.ErrPassphrase)
	expectClass(t, "a slot that is not in use", f.amend("image", qcow.AmendOptions{RemoveKeySlots: []int{7}}), qcow.ErrInvalid)
	expectClass(t, "no such slot", f.amend("image", qcow.AmendOptions{RemoveKeySlots: []int{8}}), qcow.ErrInvalid)
	expectClass(t, "all slots", f.amend("image", qcow.AmendOptions{RemovePassphrase: second, RemoveKeySlots: []int{0}}), qcow.ErrInvalid)
	expect(0, 1, 2)
	f.mustAmend("image", qcow.AmendOptions{RemovePassphrase: second})
	expect(0)
	expectClass(t, "removed passphrase", opens("second"), qcow.ErrPassphrase)
	expectClass(t, "the last slot", f.amend("image", qcow.AmendOptions{RemovePassphrase: old}), qcow.ErrInvalid)
	// The passphrase changes in one go.
	if err := f.amend("image", qcow.AmendOptions{Passphrase: old, AddPassphrase: second, KeyOptions: quick, RemovePassphrase: old}); err != nil {
		t.Fatal(err)
	}
	expectCleanFile(t, f.path("image"))
	expect(1)
	expectClass(t, "old passphrase", opens(secret), qcow.ErrPassphrase)
	if err := opens("second"); err != nil {
		t.Fatal(err)
	}
	out := f.run("qemu-io", "--object", "secret,id=key,data=second", "--image-opts", "-c", "read -P 5 0 64k", "driver=qcow2,file.driver=file,file.filename=image,encrypt.key-secret=key")
	if strings.Contains(out, "fail") {
		t.Fatal(out)
	}
}

// TestAmendEncryptedZeroes makes version 2 of an encrypted image, in which the zeroes that hide the backing file have to be encrypted.
func TestAmendEncryptedZeroes(t *testing.T) {
	f := newWorkshop(t)
	f.create("image", recipe{o: qcow.CreateOptions{Size: 1 << 20, ClusterSize: 4096, Encryption: cheap(), BackingFile: "base.qcow2", BackingFormat: "qcow2"}})
	f.io("image", "write -z 0 32k", "write -P 5 32k 4k")
	expectClass(t, "without passphrase", f.amend("image", version2), qcow.ErrPassphrase)
	expectClass(t, "wrong passphrase", f.amend("image", qcow.AmendOptions{Version: 2, Passphrase: []byte("x")}), qcow.ErrPassphrase)
	f.expectVersion("image", 3)
	f.mustAmend("image", qcow.AmendOptions{Version: 2, Passphrase: []byte(secret)})
	f.expectVersion("image", 2)
	f.io("image", "read -P 0 0 32k", "read -P 5 32k 4k", "read -P 0xbb 36k 28k")
}

// TestAmendKeepsBitmaps leaves persistent bitmaps alone.
func TestAmendKeepsBitmaps(t *testing.T) {
	f := newWorkshop(t)
	f.qemu("image", 1<<20, "refcount_bits=16")
	f.run("qemu-img", "bitmap", "--add", "image", "b")
	f.io("image", "write -P 1 128k 64k")
	want := fmt.Sprint(specifics(f.info("image"))["bitmaps"])
	f.mustAmend("image", qcow.AmendOptions{RefcountBits: 1, LazyRefcounts: &yes})
	if got := fmt.Sprint(specifics(f.info("image"))["bitmaps"]); got != want || !strings.Contains(got, "name:b") {
		t.Errorf("bitmaps %s instead of %s", got, want)
	}
}

// TestAmendTruncated refuses an image whose file was cut off: what is made behind its end must not come where clusters were lost.
func TestAmendTruncated(t *testing.T) {
	mem := create(t, qcow.CreateOptions{Size: 1 << 20, ClusterSize: 4096})
	change(t, mem, func(img *qcow.Image) { writeAt(t, img, repeated(1, 1<<20), 0) })
	whole := mem.Bytes()
	mem = storage.NewMemoryFrom(whole[:len(whole)-64<<10])
	expectClass(t, "amend", qcow.Amend(t.Context(), mem, qcow.AmendOptions{RefcountBits: 8}), qcow.ErrCorrupt)
}

// TestAmendEnds gives up when its context does, and leaves the image as it was.
func TestAmendEnds(t *testing.T) {
	mem := create(t, qcow.CreateOptions{Size: 1 << 20, ClusterSize: 512, BackingFile: "b", BackingFormat: "raw"})
	raw := func(qcow.Reference) (qcow.Opened, error) {
		return qcow.Opened{File: storage.NewMemoryFrom(repeated(3, 1<<20)), Format: "raw"}, nil
	}
	img := open(t, mem, qcow.Options{Gate: raw})
	if err := errors.Join(img.WriteZeroes(0, 1<<20, true), img.Close()); err != nil {
		t.Fatal(err)
	}
	for _, o := range []qcow.AmendOptions{{RefcountBits: 1}, version2} {
		ctx, cancel := context.WithCancel(t.Context())
		calls := 0
		o.Progress = func(done, total int64) {
			if done > total || done <= 0 {
				t.Errorf("progress: %d of %d", done, total)
			}
			calls++
			cancel()
		}
		err := qcow.Amend(ctx, mem, o)
		if !errors.Is(err, context.Canceled) || calls == 0 {
			t.Fatalf("%v after %d calls", err, calls)
		}
		if report, err := check.Check(t.Context(), mem, check.Options{}); err != nil || !report.Clean() {
			t.Fatal(err, report)
		}
	}
	img = open(t, mem, qcow.Options{Gate: raw})
	if info := img.Info(); info.RefcountBits != 16 {
		t.Errorf("%+v", info)
	}
	expectAt(t, img, make([]byte, 1<<20), 0)
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestAmendCompression keeps the compression type of version 3.
func TestAmendCompression(t *testing.T) {
	f := newWorkshop(t)
	f.qemu("image", 1<<20, "compression_type=zstd,cluster_size=4k")
	f.io("image", "write -c -P 1 0 4k", "write -c -P 2 4k 4k")
	f.mustAmend("image", qcow.AmendOptions{RefcountBits: 2})
	f.io("image", "read -P 1 0 4k", "read -P 2 4k 4k")
	expectClass(t, "2 references to a cluster", f.amend("image", qcow.AmendOptions{RefcountBits: 1}), qcow.ErrInvalid)
}
