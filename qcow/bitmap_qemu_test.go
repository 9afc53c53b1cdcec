package qcow_test

import (
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// TestBitmapsInTurns lets QEMU and this package write to one image in turns, and add, clear, merge and switch bitmaps: each reads exactly what
// both have recorded.
func TestBitmapsInTurns(t *testing.T) {
	require.Tool(t, "qemu-img", "qemu-io", "qemu-nbd", "nbdinfo")
	for _, shape := range []struct {
		size, granularity int64
		cluster           int
	}{
		{8<<20 + 512, 512, 512},
		{150<<20 + 3*512, 512, 512}, // a table of two clusters
		{1 << 30, 64 << 10, 64 << 10},
		{5<<30 + 7*512, 4096, 2 << 20},
		{9 << 30, 2 << 30, 4096},
	} {
		t.Run(fmt.Sprintf("cluster=%d/granularity=%d/size=%d", shape.cluster, shape.granularity, shape.size), func(t *testing.T) {
			q := newQEMUFile(t, nil)
			q.run("qemu-img", "create", "-q", "-f", "qcow2", "-o", fmt.Sprintf("cluster_size=%d", shape.cluster), q.path, fmt.Sprint(shape.size))
			rng := rand.New(rand.NewPCG(11, uint64(shape.granularity)))
			theirs, ours := newDirtyModel(shape.size, shape.granularity), newDirtyModel(shape.size, 64<<10)
			place := func() (off, n int64) {
				n = min(1+rng.Int64N(min(shape.size/4, 1<<20)), 200<<10)
				off = rng.Int64N(shape.size - n)
				theirs.note(off, n)
				ours.note(off, n)
				return off, n
			}
			q.bitmap("--add", "-g", fmt.Sprint(shape.granularity), q.path, "theirs")
			q.change(func(img *qcow.Image) { addBitmap(t, img, "ours", qcow.BitmapOptions{Granularity: 64 << 10}) })
			for range 3 {
				off, n := place()
				zeroOff, zeroN := place()
				q.io(fmt.Sprintf("write %d %d", off, n), fmt.Sprintf("write -z -u %d %d", zeroOff, zeroN))
				q.read(func(img *qcow.Image) {
					expectDirty(t, img, "theirs", theirs.extents())
					expectDirty(t, img, "ours", ours.extents())
				})
				q.change(func(img *qcow.Image) {
					off, n := place()
					writeAt(t, img, repeated(7, n), off)
					off, n = place()
					do(t, img.Discard(off, n))
					expectDirty(t, img, "theirs", theirs.extents())
					expectDirty(t, img, "ours", ours.extents())
				})
			}
			q.expectClean()
			q.expectDirty("theirs", theirs.extents()) // and disabled from here on
			q.expectDirty("ours", ours.extents())
			q.io("write 0 512")
			q.bitmap("--enable", q.path, "ours")
			q.io("write 1M 512")
			ours.note(1<<20, 512)
			q.change(func(img *qcow.Image) {
				writeAt(t, img, repeated(7, 512), 2<<20)
				ours.note(2<<20, 512)
				do(t, img.MergeBitmap(t.Context(), "theirs", "ours"))
				do(t, img.DisableBitmap(t.Context(), "ours"))
			})
			for _, e := range ours.extents() {
				theirs.note(e.Offset, e.Length)
			}
			q.expectDirty("theirs", theirs.extents())
			q.bitmap("--clear", q.path, "theirs")
			q.bitmap("--merge", "ours", q.path, "theirs")
			*theirs = *newDirtyModel(shape.size, shape.granularity)
			for _, e := range ours.extents() {
				theirs.note(e.Offset, e.Length)
			}
			q.read(func(img *qcow.Image) { expectDirty(t, img, "theirs", theirs.extents()) })
			q.bitmap("--remove", q.path, "theirs")
			q.change(func(img *qcow.Image) { do(t, img.RemoveBitmap(t.Context(), "ours")) })
			if list := q.bitmaps(); len(list) != 0 {
				t.Fatalf("QEMU still sees %v", list)
			}
			q.expectClean()
		})
	}
}

// TestBitmapsAllOnes lets QEMU read a bitmap in which whole clusters of its table are dirty, and the last one too.
func TestBitmapsAllOnes(t *testing.T) {
	require.Tool(t, "qemu-img", "qemu-nbd", "nbdinfo")
	const size = 70<<20 + 512
	f := create(t, qcow.CreateOptions{Size: size, ClusterSize: 512})
	change(t, f, func(img *qcow.Image) {
		addBitmap(t, img, "b", qcow.BitmapOptions{Granularity: 512})
		do(t, img.Discard(0, size))
	})
	want := []qcow.DirtyExtent{{Length: size}}
	read := open(t, storage.NewMemoryFrom(f.Bytes()), qcow.Options{ReadOnly: true})
	expectDirty(t, read, "b", want)
	do(t, read.Close())
	q := newQEMUFile(t, f.Bytes())
	q.expectClean()
	q.expectDirty("b", want)
	if len(f.Bytes()) > 64<<10 {
		t.Errorf("a bitmap without a clean byte takes %d bytes", len(f.Bytes()))
	}
}

// TestBitmapsOfChain goes through what QEMU's test of qemu-img's bitmap commands does: bitmaps of an image and its backing file, copied, merged from the
// one into the other, and left over by a program that was killed.
func TestBitmapsOfChain(t *testing.T) {
	require.Tool(t, "qemu-img", "qemu-io", "qemu-nbd", "nbdinfo")
	const mib = 1 << 20
	dir := t.TempDir()
	base := &qemuFile{t, filepath.Join(dir, "base.qcow2")}
	top := &qemuFile{t, filepath.Join(dir, "top.qcow2")}
	base.run("qemu-img", "create", "-q", "-f", "qcow2", base.path, "10M")
	base.change(func(img *qcow.Image) {
		addBitmap(t, img, "b0", qcow.BitmapOptions{})
		writeAt(t, img, repeated(1, mib), 3*mib)
	})
	top.run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base.path, top.path)
	withChain := func(do func(img *qcow.Image)) {
		f, err := storage.Open(top.path, storage.ReadWrite)
		if err != nil {
			t.Fatal(err)
		}
		img := open(t, f, qcow.Options{Gate: qcow.Beside(top.path)})
		do(img)
		if err := img.Close(); err != nil {
			t.Fatal(err)
		}
	}
	ctx := t.Context()
	withChain(func(img *qcow.Image) {
		writeAt(t, img, repeated(2, mib), 0)
		addBitmap(t, img, "b1", qcow.BitmapOptions{Granularity: 512 << 10})
		addBitmap(t, img, "b2", qcow.BitmapOptions{Disabled: true})
		writeAt(t, img, repeated(3, mib), 3*mib)
		do(t, img.ClearBitmap(ctx, "b1"))
		writeAt(t, img, repeated(4, mib), mib)
		do(t, img.DisableBitmap(ctx, "b1"))
		do(t, img.EnableBitmap(ctx, "b2"))
		writeAt(t, img, repeated(5, mib), 2*mib)
		list, err := img.Bitmaps()
		do(t, err)
		if len(list) != 2 {
			t.Fatalf("bitmaps of the backing file show: %+v", list)
		}
	})
	target := &qemuFile{t, filepath.Join(dir, "target.qcow2")}
	target.run("qemu-img", "convert", "--bitmaps", "-O", "qcow2", top.path, target.path)
	target.change(func(img *qcow.Image) {
		expectDirty(t, img, "b1", []qcow.DirtyExtent{{Offset: mib, Length: mib}})
		expectDirty(t, img, "b2", []qcow.DirtyExtent{{Offset: 2 * mib, Length: mib}})
		addBitmap(t, img, "b0", qcow.BitmapOptions{Disabled: true, Granularity: 512})
		base.read(func(from *qcow.Image) { do(t, img.MergeExtents(ctx, "b0", from.DirtyExtents("b0", 0, from.Size()))) })
		expectClass(t, "merge from a bitmap that is not there", img.MergeExtents(ctx, "b0", img.DirtyExtents("tmp", 0, 1)), qcow.ErrNotFound)
	})
	target.expectDirty("b0", []qcow.DirtyExtent{{Offset: 3 * mib, Length: mib}})
	target.expectDirty("b1", []qcow.DirtyExtent{{Offset: mib, Length: mib}})
	target.expectDirty("b2", []qcow.DirtyExtent{{Offset: 2 * mib, Length: mib}})
	target.expectClean()

	// A process that is killed leaves inconsistent what it had not saved. b2 is enabled in the copy of before.
	if err := exec.CommandContext(ctx, "qemu-io", "-f", "qcow2", "-c", "write 0 512", "-c", "abort", top.path).Run(); err == nil {
		t.Fatal("qemu-io did not abort")
	}
	withChain(func(img *qcow.Image) {
		for _, name := range []string{"b1", "b2"} {
			if !bitmapInfo(t, img, name).Inconsistent {
				t.Errorf("bitmap %q is not inconsistent", name)
			}
			_, err := dirtyExtents(img, name)
			expectClass(t, "read", err, qcow.ErrInvalid)
			for what, err := range map[string]error{
				"clear": img.ClearBitmap(ctx, name), "enable": img.EnableBitmap(ctx, name), "disable": img.DisableBitmap(ctx, name),
				"merge from": img.MergeBitmap(ctx, "b1", name), "merge extents": img.MergeExtents(ctx, name, img.DirtyExtents(name, 0, 0)),
			} {
				expectClass(t, what+" "+name, err, qcow.ErrInvalid)
			}
		}
		addBitmap(t, img, "b4", qcow.BitmapOptions{})
		do(t, img.RemoveBitmap(ctx, "b1"))
		writeAt(t, img, repeated(6, mib), 5*mib)
	})
	flags := map[string]string{}
	for _, b := range top.bitmaps() {
		flags[b.Name] = fmt.Sprint(b.Flags)
	}
	if want := map[string]string{"b2": "[in-use auto]", "b4": "[auto]"}; fmt.Sprint(flags) != fmt.Sprint(want) {
		t.Errorf("QEMU sees %v, want %v", flags, want)
	}
	top.expectDirty("b4", []qcow.DirtyExtent{{Offset: 5 * mib, Length: mib}})
	top.expectClean()
}

// TestBitmapsListed holds what QEMU and this package list against each other: flags, granularity, and that an image under use says so from the
// first change on.
func TestBitmapsListed(t *testing.T) {
	require.Tool(t, "qemu-img")
	q := newQEMUFile(t, create(t, qcow.CreateOptions{Size: 1 << 20}).Bytes())
	names := func(img *qcow.Image) (list []string) {
		infos, err := img.Bitmaps()
		do(t, err)
		for _, b := range infos {
			list = append(list, fmt.Sprint(b.Name, b.Granularity, b.Enabled, b.Inconsistent, b.Persistent))
		}
		return list
	}
	flags := func() (list []string) {
		for _, b := range q.bitmaps() {
			list = append(list, fmt.Sprint(b.Name, b.Granularity, b.Flags))
		}
		return list
	}
	expect := func(what string, got []string, want ...string) {
		t.Helper()
		if !slices.Equal(got, want) {
			t.Errorf("%s: %q, want %q", what, got, want)
		}
	}
	q.change(func(img *qcow.Image) {
		addBitmap(t, img, "one", qcow.BitmapOptions{Granularity: 32 << 10})
		addBitmap(t, img, "kept in memory", qcow.BitmapOptions{Transient: true})
		addBitmap(t, img, "two", qcow.BitmapOptions{Disabled: true})
		expect("names", names(img), "one32768 true false true", "kept in memory65536 true false false", "two65536 false false true")
		writeAt(t, img, repeated(1, 512), 0)
		content, err := os.ReadFile(q.path)
		do(t, err)
		held := newQEMUFile(t, content)
		held.read(func(img *qcow.Image) {
			expect("names after a crash", names(img), "one32768 true true true", "two65536 false false true")
			if info := img.Info(); info.Bitmaps != 2 || info.BitmapsIgnored {
				t.Errorf("info says %+v", info)
			}
		})
		expectDirty(t, img, "kept in memory", []qcow.DirtyExtent{{Length: 64 << 10}})
		other := newQEMUFile(t, content)
		for i, b := range other.bitmaps() {
			if want := []string{"[in-use auto]", "[]"}[i]; fmt.Sprint(b.Flags) != want {
				t.Errorf("QEMU sees the flags %v of bitmap %q of an image in use", b.Flags, b.Name)
			}
		}
	})
	expect("flags", flags(), "one32768 [auto]", "two65536 []")
}

// TestBitmapsOnDisk holds what this package writes of an enabled and a disabled bitmap against what QEMU writes: the extension, the directory, the
// tables and the bits.
func TestBitmapsOnDisk(t *testing.T) {
	require.Tool(t, "qemu-img", "qemu-io")
	theirs := newQEMUFile(t, nil)
	theirs.run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", theirs.path, "3G")
	ours := newQEMUFile(t, readFile(t, theirs.path))
	writes := [][2]int64{{0, 4096}, {1<<30 - 4096, 8192}, {2<<30 + 77, 1 << 20}, {3<<30 - 1, 1}}
	theirs.bitmap("--add", "-g", "32k", theirs.path, "bitmap-1")
	theirs.bitmap("--add", "-g", "64k", "--disable", theirs.path, "a second one")
	ours.change(func(img *qcow.Image) {
		addBitmap(t, img, "bitmap-1", qcow.BitmapOptions{Granularity: 32 << 10})
		addBitmap(t, img, "a second one", qcow.BitmapOptions{Granularity: 64 << 10, Disabled: true})
	})
	for _, w := range writes {
		theirs.io(fmt.Sprintf("write %d %d", w[0], w[1]))
		ours.change(func(img *qcow.Image) { writeAt(t, img, repeated(1, w[1]), w[0]) })
	}
	theirs.bitmap("--merge", "bitmap-1", theirs.path, "a second one")
	ours.change(func(img *qcow.Image) { do(t, img.MergeBitmap(t.Context(), "a second one", "bitmap-1")) })
	a, b := bitmapsOnDisk(t, theirs), bitmapsOnDisk(t, ours)
	if a != b {
		t.Errorf("QEMU writes %s\nthis package %s", a, b)
	}
}

// bitmapsOnDisk describes everything that an image holds of bitmaps, but for the places.
func bitmapsOnDisk(t *testing.T, q *qemuFile) string {
	t.Helper()
	content := readFile(t, q.path)
	h, err := format.DecodeHeader(content)
	do(t, err)
	ext, err := h.Bitmaps()
	do(t, err)
	list, err := format.DecodeBitmaps(content[ext.DirectoryOffset:][:ext.DirectorySize], ext.Count)
	do(t, err)
	text := fmt.Sprintf("autoclear %d, %d bitmaps, directory of %d bytes", h.Autoclear, ext.Count, ext.DirectorySize)
	for _, m := range list {
		text += fmt.Sprintf("\n%q: flags %d, granularity 2^%d, extra %v, table:", m.Name, m.Flags, m.GranularityBits, m.Extra)
		for i := range uint64(m.TableEntries) {
			e := format.BitmapTableEntry(format.Entry(content[m.TableOffset:], i))
			if e.Offset() == 0 {
				text += fmt.Sprintf(" %d", e)
				continue
			}
			text += fmt.Sprintf(" %x", sha256.Sum256(content[e.Offset():][:h.ClusterSize()]))
		}
	}
	return text
}
