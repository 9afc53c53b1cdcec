package qcow_test

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// spans are ranges of a large disk, in order.
type spans []qcow.DirtyExtent

// with returns the spans and one more, rounded to a granularity and cut off at the end of the disk.
func (s spans) with(off, n, granularity, size int64) spans {
	end := min((off+n+granularity-1)/granularity*granularity, size)
	off = off / granularity * granularity
	list := append(slices.Clone(s), qcow.DirtyExtent{Offset: off, Length: end - off})
	slices.SortFunc(list, func(a, b qcow.DirtyExtent) int { return int(min(max(a.Offset-b.Offset, -1), 1)) })
	var joined spans
	for _, e := range list {
		if last := len(joined) - 1; last >= 0 && joined[last].Offset+joined[last].Length >= e.Offset {
			joined[last].Length = max(joined[last].Length, e.Offset+e.Length-joined[last].Offset)
			continue
		}
		joined = append(joined, e)
	}
	return joined
}

// cut returns the spans before size.
func (s spans) cut(size int64) spans {
	var list spans
	for _, e := range s {
		if e.Length = min(e.Length, size-e.Offset); e.Length > 0 {
			list = append(list, e)
		}
	}
	return list
}

// TestBitmapsResize lets a disk grow and shrink, with bitmaps of several granularities, some added and removed in between. What an enabled one has
// is kept, what it gains is dirty; a disabled one gains nothing. QEMU reads the same.
func TestBitmapsResize(t *testing.T) {
	require.Tool(t, "qemu-img", "qemu-nbd", "nbdinfo")
	const gib = 1 << 30
	q := newQEMUFile(t, create(t, qcow.CreateOptions{Size: 64 * gib}).Bytes())
	type expectation struct {
		granularity int64
		enabled     bool
		dirty       spans
	}
	want := map[string]*expectation{}
	size := int64(64 * gib)
	add := func(img *qcow.Image, granularity int64, enabled bool) {
		name := fmt.Sprintf("g%d-%v-%d", granularity, enabled, size/gib)
		addBitmap(t, img, name, qcow.BitmapOptions{Granularity: granularity, Disabled: !enabled})
		want[name] = &expectation{granularity: granularity, enabled: enabled}
	}
	write := func(img *qcow.Image, off int64) {
		writeAt(t, img, repeated(1, 512), off)
		for _, w := range want {
			if w.enabled {
				w.dirty = w.dirty.with(off, 512, w.granularity, size)
			}
		}
	}
	resize := func(img *qcow.Image, to int64) {
		do(t, img.Resize(t.Context(), to))
		for _, w := range want {
			w.dirty = w.dirty.cut(to)
			if w.enabled && to > size {
				w.dirty = w.dirty.with(size, to-size, w.granularity, to)
			}
		}
		size = to
	}
	expect := func(img *qcow.Image) {
		t.Helper()
		for name, w := range want {
			expectDirty(t, img, name, w.dirty)
		}
	}
	q.change(func(img *qcow.Image) {
		for _, granularity := range []int64{32 << 10, 64 << 10, 128 << 10, 512} {
			add(img, granularity, true)
		}
		write(img, 0)
		write(img, 40*gib)
		write(img, size-512)
		add(img, 4096, false)
		do(t, img.MergeBitmap(t.Context(), "g4096-false-64", "g32768-true-64"))
		want["g4096-false-64"].dirty = want["g32768-true-64"].dirty
		expect(img)
		resize(img, 70*gib+512)
		expect(img)
	})
	q.expectClean()
	q.read(expect)
	q.change(func(img *qcow.Image) {
		expect(img)
		do(t, img.RemoveBitmap(t.Context(), "g32768-true-64"))
		delete(want, "g32768-true-64")
		add(img, 32<<10, true)
		write(img, 69*gib)
		resize(img, 50*gib)
		expect(img)
		write(img, 49*gib)
		resize(img, 30*gib+3*512)
		resize(img, 30*gib+5*512) // within a granule
		expect(img)
		resize(img, 71*gib)
		expect(img)
		if err := img.Resize(t.Context(), 0); err == nil {
			t.Error("a disk with bitmaps has become one without a byte")
		}
		expectClass(t, "grow beyond what a bitmap can cover", img.Resize(t.Context(), 512<<32+512), qcow.ErrInvalid)
		expect(img)
	})
	q.expectClean()
	q.read(expect)
	for name, w := range want {
		q.expectDirty(name, w.dirty)
	}
}

// TestBitmapsShrinkMuch cuts more than 2 GiB off a disk whose every cluster is allocated.
func TestBitmapsShrinkMuch(t *testing.T) {
	require.Tool(t, "qemu-img", "qemu-nbd", "nbdinfo")
	q := newQEMUFile(t, nil)
	q.run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=1M,preallocation=metadata", q.path, "2100M")
	q.bitmap("--add", q.path, "b")
	q.change(func(img *qcow.Image) {
		writeAt(t, img, repeated(1, 10<<20), 0)
		writeAt(t, img, repeated(1, 10<<20), img.Size()-10<<20)
		do(t, img.Resize(t.Context(), 5<<20))
	})
	q.expectClean()
	q.expectDirty("b", []qcow.DirtyExtent{{Length: 5 << 20}})
}

// TestBitmapsApplySnapshot goes back to an internal snapshot: what is different then is dirty, and nothing else.
func TestBitmapsApplySnapshot(t *testing.T) {
	for _, extended := range []bool{false, true} {
		t.Run(fmt.Sprintf("extended=%v", extended), func(t *testing.T) {
			require.Tool(t, "qemu-img")
			const size, cluster = 20<<20 + 512, 16 << 10
			q := newQEMUFile(t, nil)
			q.run("qemu-img", "create", "-q", "-f", "qcow2", "-o", fmt.Sprintf("cluster_size=%d,extended_l2=%v", cluster, extended), q.path, fmt.Sprint(size))
			q.change(func(img *qcow.Image) {
				ctx := t.Context()
				writeAt(t, img, repeated(1, 10*cluster), 0)
				_, err := img.CreateSnapshot(ctx, "s", time.Unix(1, 0))
				do(t, err)
				writeAt(t, img, repeated(2, 512), 5*cluster+100) // copied on write
				writeAt(t, img, repeated(2, 2*cluster), 19<<20)  // new
				do(t, img.Discard(8*cluster, cluster))
				addBitmap(t, img, "on", qcow.BitmapOptions{Granularity: 512})
				addBitmap(t, img, "off", qcow.BitmapOptions{Disabled: true})
				do(t, img.ApplySnapshot(ctx, "s"))
				expectDirty(t, img, "off", nil)
				expectDirty(t, img, "on", []qcow.DirtyExtent{{5 * cluster, cluster}, {8 * cluster, cluster}, {19 << 20, 2 * cluster}})
				expectAt(t, img, repeated(1, 10*cluster), 0)

				do(t, img.ClearBitmap(ctx, "on"))
				do(t, img.Resize(ctx, 10<<20))
				expectDirty(t, img, "on", nil)
				do(t, img.ApplySnapshot(ctx, "s"))
				expectDirty(t, img, "on", []qcow.DirtyExtent{{10 << 20, size - 10<<20}})
				do(t, img.DeleteSnapshot(ctx, "s"))
			})
			q.expectClean()
			q.read(func(img *qcow.Image) {
				expectDirty(t, img, "on", []qcow.DirtyExtent{{10 << 20, size - 10<<20}})
				expectDirty(t, img, "off", nil)
			})
		})
	}
}

// TestBitmapsOfSnapshot opens an internal snapshot: the bitmaps do not speak of that.
func TestBitmapsOfSnapshot(t *testing.T) {
	f := create(t, qcow.CreateOptions{Size: 1 << 20})
	change(t, f, func(img *qcow.Image) {
		addBitmap(t, img, "b", qcow.BitmapOptions{})
		_, err := img.CreateSnapshot(t.Context(), "s", time.Unix(1, 0))
		do(t, err)
	})
	img := open(t, f, qcow.Options{ReadOnly: true, Snapshot: "s"})
	if list, err := img.Bitmaps(); err != nil || len(list) != 0 {
		t.Errorf("a snapshot has the bitmaps %v, %v", list, err)
	}
	_, err := dirtyExtents(img, "b")
	expectClass(t, "read", err, qcow.ErrNotFound)
	do(t, img.Close())
}

// TestBitmapsLarge lets bitmaps have as many bits as they can.
func TestBitmapsLarge(t *testing.T) {
	const size = 512 << 32
	f := create(t, qcow.CreateOptions{Size: size, ClusterSize: 2 << 20})
	img := open(t, f, qcow.Options{})
	ctx := t.Context()
	var fine, coarse spans
	touch := func(off, n int64) {
		do(t, img.WriteZeroes(off, n, true))
		fine, coarse = fine.with(off, n, 512, size), coarse.with(off, n, 64<<10, size)
	}
	addBitmap(t, img, "fine", qcow.BitmapOptions{Granularity: 512})
	addBitmap(t, img, "coarse", qcow.BitmapOptions{Granularity: 64 << 10})
	expectClass(t, "add one with too many bits", func() error {
		larger := open(t, create(t, qcow.CreateOptions{Size: size + 512, ClusterSize: 2 << 20}), qcow.Options{})
		defer func() { do(t, larger.Close()) }()
		return larger.AddBitmap(ctx, "b", qcow.BitmapOptions{Granularity: 512})
	}(), qcow.ErrInvalid)
	touch(5, 1)
	touch(33<<20-1, 2)       // two pages of the one
	touch(size-700, 700)     // the end
	touch(100<<30, 40<<30)   // whole pages and chunks
	touch(90<<30+77, 15<<30) // into those
	touch(1<<40-1, 1<<33)    // in the middle of a page
	for range 2 {
		expectDirty(t, img, "fine", fine)
		expectDirty(t, img, "coarse", coarse)
		do(t, img.Close())
		img = open(t, storage.NewMemoryFrom(f.Bytes()), qcow.Options{})
	}
	f = storage.NewMemoryFrom(f.Bytes())
	img = open(t, f, qcow.Options{})
	expectDirty(t, img, "fine", fine)
	do(t, img.DisableBitmap(ctx, "fine"))
	do(t, img.MergeBitmap(ctx, "fine", "coarse"))
	expectDirty(t, img, "fine", coarse)
	do(t, img.Resize(ctx, 130<<30+512))
	expectDirty(t, img, "fine", coarse.cut(130<<30+512))
	do(t, img.Resize(ctx, size))
	expectDirty(t, img, "fine", coarse.cut(130<<30+512))
	expectDirty(t, img, "coarse", coarse.cut(130<<30+512).with(130<<30+512, size-130<<30-512, 64<<10, size))
	do(t, img.Close())
	expectClean(t, f.Bytes())
}
