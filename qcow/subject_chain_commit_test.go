package qcow_test

import (
	"fmt"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// A chain of three, with data of each before, in and behind that of the others, around 2 GiB and in the last cluster, of which the disk has a
// sector: it is committed into the middle or the base, and each of the three reads and maps as it should afterwards.
func TestCommitOfLargeChain(t *testing.T) {
	const k, size = 1 << 10, 2100<<20 + 512
	const around = 2<<30 - 256*k
	layers := [][]span{
		{{0, 320 * k}, {around, 320 * k}, {size - 512, 512}},
		{{64 * k, 192 * k}, {around + 64*k, 320 * k}, {size - 512, 512}},
		{{128 * k, 192 * k}, {around + 128*k, 320 * k}},
	}
	for _, x := range []struct {
		depth int
		empty bool
	}{{1, true}, {1, false}, {2, false}} {
		t.Run(fmt.Sprintf("depth=%d/empty=%v", x.depth, x.empty), func(t *testing.T) {
			f, names := files{}, []string{"base", "middle", "top"}
			disks := make([]sparseDisk, 3)
			for i, name := range names {
				o := qcow.CreateOptions{Size: size}
				disks[i] = sparseDisk{}
				if i > 0 {
					disks[i] = disks[i-1].clone()
					o.BackingFile, o.BackingFormat = names[i-1], "qcow2"
				}
				f[name] = create(t, o)
				img := open(t, f[name], qcow.Options{Gate: f.gate, ReserveBytes: 1})
				for _, s := range layers[i] {
					writeAt(t, img, disks[i].write(s.off, s.n, byte(i+1)), s.off)
				}
				if err := img.Close(); err != nil {
					t.Fatal(err)
				}
			}
			before := map[string][]byte{}
			for _, name := range names {
				before[name] = contentOf(t, f[name])
			}
			img := open(t, f["top"], qcow.Options{Gate: f.gate, CommitDepth: x.depth})
			if err := img.Commit(t.Context(), qcow.CommitOptions{Empty: x.empty}); err != nil {
				t.Fatal(err)
			}
			disks[2].expect(t, img)
			own := false
			for _, kind := range kindsOf(t, img) {
				own = own || kind != qcow.ExtentUnallocated
			}
			if own == x.empty {
				t.Errorf("the image has clusters: %v", own)
			}
			if err := img.Close(); err != nil {
				t.Fatal(err)
			}
			target := names[2-x.depth]
			for i, name := range names {
				disk := disks[i]
				switch {
				case name == target:
					disk = disks[2]
				case name == "middle":
					// It lies on what the base has become, and hides nothing more than before.
					disk = disks[2].clone()
					for _, s := range layers[1] {
						disk.write(s.off, s.n, 2)
					}
				}
				img := open(t, f[name], qcow.Options{Gate: f.gate, ReadOnly: true})
				disk.expect(t, img)
				if err := img.Close(); err != nil {
					t.Fatal(err)
				}
				(&chain{t: t, files: f}).expectClean(name)
				if name != target && !(name == "top" && x.empty) {
					expect(t, name, contentOf(t, f[name]), before[name])
				}
			}
		})
	}
}

// A disk much shorter than its backing file is committed: the file keeps its size, and nothing behind the end of the disk is read or written.
func TestCommitOfShorterDisk(t *testing.T) {
	const mib = 1 << 20
	for _, raw := range []bool{true, false} {
		t.Run(fmt.Sprintf("raw=%v", raw), func(t *testing.T) {
			f, form := files{}, "raw"
			want := append(repeated(2, mib), repeated(1, 15*mib)...)
			base := storage.NewMemoryFrom(repeated(1, 16*mib))
			if !raw {
				form = "qcow2"
				base = create(t, qcow.CreateOptions{Size: 16 * mib})
				change(t, base, func(img *qcow.Image) { writeAt(t, img, repeated(1, 16*mib), 0) })
			}
			rec := storage.NewRecorder(base)
			reads := &hooked{File: rec}
			f["base"], f["top"] = reads, overlay(t, qcow.CreateOptions{Size: mib}, "base", form)
			img := open(t, f["top"], qcow.Options{Gate: f.gate, CommitDepth: 1})
			writeAt(t, img, repeated(2, mib), 0)
			if raw {
				reads.set(func() {
					reads.beforeRead = func(p []byte, off int64) error {
						if off+int64(len(p)) > mib {
							t.Errorf("%d bytes at %d are read", len(p), off)
						}
						return nil
					}
				})
			}
			if err := img.Commit(t.Context(), qcow.CommitOptions{Empty: true}); err != nil {
				t.Fatal(err)
			}
			expect(t, "disk", diskOf(t, img), want[:mib])
			if err := img.Close(); err != nil {
				t.Fatal(err)
			}
			if !raw {
				expectClean(t, base.Bytes())
				img := open(t, base, qcow.Options{ReadOnly: true})
				expect(t, "base", diskOf(t, img), want)
				return
			}
			for _, op := range rec.Ops() {
				if op.Kind != storage.OpSync && op.Offset+max(op.Length, int64(len(op.Data))) > mib {
					t.Errorf("behind the end of the disk: %v", op)
				}
			}
			expect(t, "base", contentOf(t, base), want)
		})
	}
}

// Zeroes are committed over so much data that its refcounts are in more blocks than the cache holds: all is given back.
func TestCommitOfZeroesFreesManyBlocks(t *testing.T) {
	const cluster, size = 512, 24 * 32 << 10 // a refcount block is for 32 KiB; the cache holds 16
	base := create(t, qcow.CreateOptions{Size: size, ClusterSize: cluster, RefcountBits: 64})
	change(t, base, func(img *qcow.Image) { writeAt(t, img, repeated(1, size), 0) })
	f := files{"base": base, "top": overlay(t, qcow.CreateOptions{Size: size, ClusterSize: cluster, RefcountBits: 64}, "base", "qcow2")}
	img := open(t, f["top"], qcow.Options{Gate: f.gate, CommitDepth: 1, CacheBytes: 1})
	if err := img.WriteZeroes(0, size, true); err != nil {
		t.Fatal(err)
	}
	if err := img.Commit(t.Context(), qcow.CommitOptions{Empty: true}); err != nil {
		t.Fatal(err)
	}
	expect(t, "disk", diskOf(t, img), make([]byte, size))
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	expectClean(t, base.Bytes())
	img = open(t, base, qcow.Options{ReadOnly: true})
	expectKinds(t, img, make([]qcow.ExtentKind, size/cluster)...)
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
}
