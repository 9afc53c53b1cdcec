package qcow_test

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// TestBitmapArguments expects that what can't be is refused, and leaves the bitmaps as they were.
func TestBitmapArguments(t *testing.T) {
	ctx := t.Context()
	img := open(t, create(t, qcow.CreateOptions{Size: 1 << 20}), qcow.Options{})
	addBitmap(t, img, "b", qcow.BitmapOptions{})
	if g := bitmapInfo(t, img, "b").Granularity; g != 64<<10 {
		t.Errorf("granularity %d", g)
	}
	addBitmap(t, img, strings.Repeat("n", 1023), qcow.BitmapOptions{Granularity: 2 << 30})
	for name, o := range map[string]qcow.BitmapOptions{
		"b":                       {},
		"":                        {},
		"a\x00b":                  {},
		strings.Repeat("n", 1024): {},
		"small":                   {Granularity: 256},
		"large":                   {Granularity: 4 << 30},
		"odd":                     {Granularity: 3 << 10},
		"negative":                {Granularity: -512},
	} {
		expectClass(t, "add "+name, img.AddBitmap(ctx, name, o), qcow.ErrInvalid)
	}
	for what, err := range map[string]error{
		"remove": img.RemoveBitmap(ctx, "x"), "clear": img.ClearBitmap(ctx, "x"), "enable": img.EnableBitmap(ctx, "x"), "disable": img.DisableBitmap(ctx, "x"),
		"merge into": img.MergeBitmap(ctx, "x", "b"), "merge from": img.MergeBitmap(ctx, "b", "x"), "merge": img.MergeExtents(ctx, "x", img.DirtyExtents("b", 0, 0)),
	} {
		expectClass(t, what, err, qcow.ErrNotFound)
	}
	for _, x := range [][2]int64{{-1, 1}, {0, -1}, {0, 1<<20 + 1}, {1<<20 + 1, 0}, {1, 1<<63 - 1}} {
		for _, err := range img.DirtyExtents("b", x[0], x[1]) {
			expectClass(t, "read", err, qcow.ErrInvalid)
		}
		err := img.MergeExtents(ctx, "b", func(yield func(qcow.DirtyExtent, error) bool) {
			_ = yield(qcow.DirtyExtent{Length: 1}, nil) && yield(qcow.DirtyExtent{Offset: x[0], Length: x[1]}, nil)
		})
		expectClass(t, "merge", err, qcow.ErrInvalid)
	}
	expectDirty(t, img, "b", nil)
	do(t, img.MergeBitmap(ctx, "b", "b"))
	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	expectClass(t, "cancelled", img.ClearBitmap(cancelled, "b"), context.Canceled)
	do(t, img.Close())
	_, err := img.Bitmaps()
	expectClass(t, "closed", err, qcow.ErrClosed)
	expectClass(t, "closed", img.AddBitmap(ctx, "c", qcow.BitmapOptions{}), qcow.ErrClosed)
	for _, err := range img.DirtyExtents("b", 0, 0) {
		expectClass(t, "closed", err, qcow.ErrClosed)
	}

	empty := open(t, create(t, qcow.CreateOptions{}), qcow.Options{})
	expectClass(t, "a disk without a byte", empty.AddBitmap(ctx, "b", qcow.BitmapOptions{}), qcow.ErrInvalid)
	do(t, empty.Close())
}

// TestBitmapsClip reads parts of a bitmap.
func TestBitmapsClip(t *testing.T) {
	img := open(t, create(t, qcow.CreateOptions{Size: 1<<20 + 512}), qcow.Options{})
	addBitmap(t, img, "b", qcow.BitmapOptions{Granularity: 4096})
	writeAt(t, img, repeated(1, 5000), 10<<12)
	writeAt(t, img, repeated(1, 1), 1<<20)
	for _, c := range []struct {
		off, n int64
		want   string
	}{
		{0, 0, "[]"},
		{0, 10 << 12, "[]"},
		{0, 10<<12 + 1, "[{40960 1}]"},
		{11<<12 + 5, 10, "[{45061 10}]"},
		{12<<12 - 1, 10, "[{49151 1}]"},
		{12 << 12, 1<<20 - 12<<12, "[]"},
		{5, 1<<20 + 507, "[{40960 8192} {1048576 512}]"},
	} {
		var got []qcow.DirtyExtent
		for e, err := range img.DirtyExtents("b", c.off, c.n) {
			do(t, err)
			got = append(got, e)
		}
		if s := fmt.Sprint(got); s != c.want {
			t.Errorf("%d bytes at %d: %s, want %s", c.n, c.off, s, c.want)
		}
	}
	for _, err := range img.DirtyExtents("b", 0, img.Size()) {
		do(t, err)
		break // the receiver may stop
	}
	do(t, img.Close())
}

// TestBitmapsReadOnly expects that opening an image for reading, or for writing without a write, changes nothing of it.
func TestBitmapsReadOnly(t *testing.T) {
	f := create(t, qcow.CreateOptions{Size: 1 << 20})
	change(t, f, func(img *qcow.Image) {
		addBitmap(t, img, "b", qcow.BitmapOptions{})
		writeAt(t, img, repeated(1, 512), 0)
	})
	want := []qcow.DirtyExtent{{Length: 64 << 10}}
	before := bytes.Clone(f.Bytes())
	rec := storage.NewRecorder(f)
	img := open(t, keptOpen{rec}, qcow.Options{ReadOnly: true})
	expectDirty(t, img, "b", want)
	for _, err := range []error{
		img.AddBitmap(t.Context(), "c", qcow.BitmapOptions{}), img.ClearBitmap(t.Context(), "b"), img.MergeExtents(t.Context(), "b", img.DirtyExtents("b", 0, 1)),
	} {
		expectClass(t, "change", err, qcow.ErrReadOnly)
	}
	do(t, img.Close())
	change(t, keptOpen{rec}, func(img *qcow.Image) { expectDirty(t, img, "b", want) })
	for _, op := range rec.Ops() {
		if op.Kind != storage.OpSync {
			t.Errorf("%v", op)
		}
	}
	if !bytes.Equal(before, f.Bytes()) {
		t.Error("the file has changed")
	}
}

// TestBitmapsMarked expects that the image file says that bitmaps are in use, durably, before the first request changes anything, once, and after an operation
// on a bitmap once more, for that one.
func TestBitmapsMarked(t *testing.T) {
	f := create(t, qcow.CreateOptions{Size: 1 << 20})
	rec := storage.NewRecorder(f)
	img := open(t, keptOpen{rec}, qcow.Options{})
	addBitmap(t, img, "a", qcow.BitmapOptions{})
	addBitmap(t, img, "b", qcow.BitmapOptions{})
	ext, err := headerOf(t, f).Bitmaps()
	do(t, err)
	marks := func(what string, fn func()) (offsets []int64) {
		rec.Mark(what)
		before := len(rec.Ops())
		fn()
		for i, op := range rec.Ops()[before:] {
			at := op.Offset - int64(ext.DirectoryOffset)
			if op.Kind == storage.OpWrite && at >= 0 && at < int64(ext.DirectorySize) {
				if i != 0 || rec.Ops()[before+1].Kind != storage.OpSync {
					t.Errorf("%s:\n%s", what, storage.Trace(rec.Ops()[before:]))
				}
				for end := at + int64(len(op.Data)); at < end; at += 32 {
					offsets = append(offsets, at)
				}
			}
		}
		return offsets
	}
	write := func() { writeAt(t, img, repeated(1, 512), 0) }
	if got := fmt.Sprint(marks("first write", write)); got != "[0 32]" {
		t.Errorf("the first write marks %s", got)
	}
	if got := marks("second write", write); len(got) > 0 {
		t.Errorf("the second write marks %v", got)
	}
	do(t, img.ClearBitmap(t.Context(), "b"))
	if ext, err = headerOf(t, f).Bitmaps(); err != nil {
		t.Fatal(err)
	}
	list, err := format.DecodeBitmaps(f.Bytes()[ext.DirectoryOffset:][:ext.DirectorySize], ext.Count)
	do(t, err)
	if list[0].Flags != format.BitmapAuto|format.BitmapInUse || list[1].Flags != format.BitmapAuto {
		t.Errorf("after an operation: %+v", list)
	}
	if got := marks("third write", write); len(got) == 0 {
		t.Error("the write after an operation marks nothing")
	}
	do(t, img.Close())
}

// TestBitmapsVersion2 expects that an image of version 2 has bitmaps in memory only.
func TestBitmapsVersion2(t *testing.T) {
	require.Tool(t, "qemu-img")
	q := newQEMUFile(t, nil)
	q.run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "compat=0.10", q.path, "1M")
	q.change(func(img *qcow.Image) {
		expectClass(t, "add", img.AddBitmap(t.Context(), "b", qcow.BitmapOptions{}), qcow.ErrUnsupported)
		addBitmap(t, img, "b", qcow.BitmapOptions{Transient: true})
		writeAt(t, img, repeated(1, 512), 0)
		do(t, img.Resize(t.Context(), 2<<20))
		expectDirty(t, img, "b", []qcow.DirtyExtent{{0, 64 << 10}, {1 << 20, 1 << 20}})
		addBitmap(t, img, "c", qcow.BitmapOptions{Transient: true})
		do(t, img.RemoveBitmap(t.Context(), "b"))
	})
	q.expectClean()
	q.read(func(img *qcow.Image) {
		if list, err := img.Bitmaps(); err != nil || len(list) > 0 {
			t.Errorf("%v, %v", list, err)
		}
	})
}

// TestBitmapsWithoutRoom adds a bitmap to an image whose first cluster has no room for the extension.
func TestBitmapsWithoutRoom(t *testing.T) {
	for _, length := range []int{300, 361} {
		f := create(t, qcow.CreateOptions{Size: 1 << 20, ClusterSize: 512})
		do(t, qcow.RebaseUnsafe(f, strings.Repeat("n", length), "raw"))
		gate := func(qcow.Reference) (qcow.Opened, error) {
			return qcow.Opened{File: storage.NewMemory(), Format: "raw"}, nil
		}
		img := open(t, f, qcow.Options{Gate: gate})
		err := img.AddBitmap(t.Context(), "b", qcow.BitmapOptions{})
		if length == 300 {
			do(t, err)
		} else {
			expectClass(t, "add", err, qcow.ErrInvalid)
		}
		writeAt(t, img, repeated(1, 5000), 777)
		do(t, img.Close())
		img = open(t, storage.NewMemoryFrom(f.Bytes()), qcow.Options{ReadOnly: true, WithoutBacking: true})
		if list, err := img.Bitmaps(); err != nil || (len(list) == 1) != (length == 300) {
			t.Errorf("%v, %v", list, err)
		}
		do(t, img.Close())
	}
}

// TestBitmapsFullDisk expects that bitmaps which find no space leave the image as it is, and requests go on.
func TestBitmapsFullDisk(t *testing.T) {
	f := create(t, qcow.CreateOptions{Size: 64 << 20, ClusterSize: 512})
	img := open(t, f, qcow.Options{ReserveBytes: 512})
	addBitmap(t, img, "b", qcow.BitmapOptions{Granularity: 512})
	writeAt(t, img, repeated(1, 64<<10), 0)
	size, err := f.Size()
	do(t, err)
	f.Limit(size)
	for off := int64(0); off < 64<<20; off += 2 << 20 { // a cluster of bits each, in place or without one
		do(t, img.Discard(off, 512))
	}
	expectClass(t, "add", img.AddBitmap(t.Context(), "c", qcow.BitmapOptions{}), qcow.ErrNoSpace)
	writeAt(t, img, repeated(2, 512), 1024)
	list, err := img.Bitmaps()
	if err != nil || len(list) != 1 || list[0].Count != 64<<10+31*512 {
		t.Errorf("%+v, %v", list, err)
	}
	expectClass(t, "close", img.Close(), qcow.ErrNoSpace)
	f.Limit(0)
	expectClean(t, f.Bytes())
	change(t, f, func(img *qcow.Image) {
		if !bitmapInfo(t, img, "b").Inconsistent {
			t.Error("a bitmap that could not be saved is not inconsistent")
		}
		do(t, img.RemoveBitmap(t.Context(), "b"))
	})
	expectClean(t, f.Bytes())
}

// TestBitmapsDataFile keeps bitmaps of an image with an external data file, in the image.
func TestBitmapsDataFile(t *testing.T) {
	require.Tool(t, "qemu-img", "qemu-nbd", "nbdinfo")
	for _, raw := range []string{"on", "off"} {
		q := newQEMUFile(t, nil)
		q.run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "data_file="+q.path+".data,data_file_raw="+raw, q.path, "10M")
		q.bitmap("--add", q.path, "b")
		f, err := storage.Open(q.path, storage.ReadWrite)
		do(t, err)
		img := open(t, f, qcow.Options{Gate: qcow.Beside(q.path)})
		writeAt(t, img, repeated(1, 512), 1<<20)
		do(t, img.Resize(t.Context(), 5<<20))
		do(t, img.Resize(t.Context(), 6<<20))
		do(t, img.Close())
		q.expectClean()
		q.expectDirty("b", []qcow.DirtyExtent{{1 << 20, 64 << 10}, {5 << 20, 1 << 20}})
	}
}

// TestBitmapsOfOtherWork expects that bitmaps stay valid while the image is compacted, streamed to, committed and emptied, that they record nothing of
// that, and that those of the backing file record what is committed to it.
func TestBitmapsOfOtherWork(t *testing.T) {
	require.Tool(t, "qemu-img")
	const mib = 1 << 20
	dir := t.TempDir()
	base, top := &qemuFile{t, filepath.Join(dir, "base.qcow2")}, &qemuFile{t, filepath.Join(dir, "top.qcow2")}
	base.run("qemu-img", "create", "-q", "-f", "qcow2", base.path, "8M")
	base.change(func(img *qcow.Image) {
		addBitmap(t, img, "b", qcow.BitmapOptions{})
		writeAt(t, img, repeated(1, mib), 0)
		do(t, img.ClearBitmap(t.Context(), "b"))
	})
	top.run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "base.qcow2", top.path)
	withChain := func(o qcow.Options, do func(img *qcow.Image)) {
		f, err := storage.Open(top.path, storage.ReadWrite)
		if err != nil {
			t.Fatal(err)
		}
		o.Gate = qcow.Beside(top.path)
		change := open(t, f, o)
		do(change)
		if err := change.Close(); err != nil {
			t.Fatal(err)
		}
	}
	want := []qcow.DirtyExtent{{3 * mib, mib}}
	withChain(qcow.Options{CommitDepth: 1}, func(img *qcow.Image) {
		ctx := t.Context()
		writeAt(t, img, repeated(2, 2*mib), mib)
		addBitmap(t, img, "on", qcow.BitmapOptions{})
		addBitmap(t, img, "off", qcow.BitmapOptions{Granularity: 512})
		writeAt(t, img, repeated(3, mib), 3*mib)
		do(t, img.DisableBitmap(ctx, "off"))
		do(t, img.Commit(ctx, qcow.CommitOptions{Empty: true}))
		expectDirty(t, img, "on", want)
	})
	base.read(func(img *qcow.Image) { expectDirty(t, img, "b", []qcow.DirtyExtent{{mib, 3 * mib}}) })
	base.expectClean()
	top.expectClean()
	withChain(qcow.Options{}, func(img *qcow.Image) {
		expectDirty(t, img, "on", want)
		do(t, img.Stream(t.Context(), qcow.StreamOptions{}))
		do(t, img.Discard(0, mib))
		do(t, img.Flush())
		expectDirty(t, img, "on", []qcow.DirtyExtent{{0, mib}, {3 * mib, mib}})
		_, err := img.Compact(t.Context(), nil)
		do(t, err)
		expectDirty(t, img, "off", want)
	})
	top.expectClean()
	top.read(func(img *qcow.Image) {
		expectDirty(t, img, "off", want)
		expectDirty(t, img, "on", []qcow.DirtyExtent{{0, mib}, {3 * mib, mib}})
	})
}

// TestBitmapsCost expects that recording allocates nothing.
func TestBitmapsCost(t *testing.T) {
	img := open(t, create(t, qcow.CreateOptions{Size: 64 << 20}), qcow.Options{})
	p := repeated(1, 4096)
	rng := rand.New(rand.NewPCG(1, 1))
	write := func() { writeAt(t, img, p, rng.Int64N(img.Size()/4096)*4096) }
	writeAt(t, img, make([]byte, 64<<20), 0)
	without := testing.AllocsPerRun(1000, write)
	addBitmap(t, img, "b", qcow.BitmapOptions{Granularity: 4096})
	addBitmap(t, img, "c", qcow.BitmapOptions{})
	write()
	if with := testing.AllocsPerRun(1000, write); with > without+0.1 {
		t.Errorf("a write allocates %v times, without bitmaps %v", with, without)
	}
	do(t, img.Close())
}

// BenchmarkRecording writes in place with so many bitmaps.
func BenchmarkRecording(b *testing.B) {
	for _, n := range []int{0, 1, 4} {
		b.Run(fmt.Sprintf("bitmaps=%d", n), func(b *testing.B) {
			img := open(b, create(b, qcow.CreateOptions{Size: 64 << 20}), qcow.Options{})
			writeAt(b, img, make([]byte, 64<<20), 0)
			for i := range n {
				addBitmap(b, img, fmt.Sprint(i), qcow.BitmapOptions{Granularity: 4096 << i})
			}
			p := make([]byte, 512)
			b.RunParallel(func(pb *testing.PB) {
				for off := int64(0); pb.Next(); off = (off + 4096*7) % img.Size() {
					if _, err := img.WriteAt(p, off); err != nil {
						b.Fatal(err)
					}
				}
			})
			do(b, img.Close())
		})
	}
}

// TestBitmapsConcurrent lets many goroutines write while bitmaps are cleared, merged, disabled and read. Whatever is written after a bitmap was cleared is in it, or in the one
// that it was merged into before.
func TestBitmapsConcurrent(t *testing.T) {
	const writers, each, granule = 4, 64, 4096
	f := create(t, qcow.CreateOptions{Size: writers * each * granule, ClusterSize: 4096})
	img := open(t, f, qcow.Options{})
	ctx := t.Context()
	addBitmap(t, img, "now", qcow.BitmapOptions{Granularity: granule})
	addBitmap(t, img, "sum", qcow.BitmapOptions{Granularity: granule, Disabled: true})
	rounds := 60
	if testing.Short() {
		rounds = 10
	}
	var wg sync.WaitGroup
	stop := make(chan struct{})
	written := make([][]bool, writers)
	for w := range writers {
		written[w] = make([]bool, each)
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(w), 9))
			for {
				select {
				case <-stop:
					return
				default:
				}
				i := rng.Int64N(each)
				off := (int64(w)*each + i) * granule
				var err error
				switch rng.IntN(4) {
				case 0:
					err = img.Discard(off, granule)
				case 1:
					_, err = img.WriteSync(repeated(1, granule), off)
				default:
					_, err = img.WriteAt(repeated(byte(rng.Uint32()), granule), off)
				}
				if err != nil {
					t.Error(err)
					return
				}
				written[w][i] = true
			}
		})
	}
	wg.Go(func() {
		for range rounds * 4 {
			for _, err := range img.DirtyExtents("now", 0, img.Size()) {
				if err != nil {
					t.Error(err)
				}
			}
			if _, err := img.Bitmaps(); err != nil {
				t.Error(err)
			}
		}
	})
	for i := range rounds {
		// Between the two steps the other bitmap records as well, so nothing falls through.
		other := fmt.Sprint("other", i)
		addBitmap(t, img, other, qcow.BitmapOptions{Granularity: granule << (i % 2)})
		do(t, img.MergeBitmap(ctx, "sum", "now"))
		do(t, img.ClearBitmap(ctx, "now"))
		do(t, img.MergeBitmap(ctx, "now", other))
		do(t, img.RemoveBitmap(ctx, other))
		if i%8 == 0 {
			do(t, img.DisableBitmap(ctx, "sum"))
			do(t, img.Flush())
		}
	}
	close(stop)
	wg.Wait()
	do(t, img.MergeBitmap(ctx, "sum", "now"))
	do(t, img.Close())
	read := open(t, storage.NewMemoryFrom(f.Bytes()), qcow.Options{ReadOnly: true})
	dirty, err := dirtySectors(read, "sum")
	do(t, err)
	for w := range written {
		for i, yes := range written[w] {
			if s := (w*each + i) * granule / sector; yes && !dirty[s] {
				t.Errorf("sector %d was written, and is not dirty", s)
			}
		}
	}
	do(t, read.Close())
	expectClean(t, f.Bytes())
}

// TestBitmapsSurviveProcess lets another process, QEMU, find what was not closed: the file as it is at some moment.
func TestBitmapsSurviveProcess(t *testing.T) {
	require.Tool(t, "qemu-img", "qemu-nbd", "nbdinfo")
	q := newQEMUFile(t, create(t, qcow.CreateOptions{Size: 10 << 20}).Bytes())
	look := func(want string) *qemuFile {
		t.Helper()
		content, err := os.ReadFile(q.path)
		do(t, err)
		now := newQEMUFile(t, content)
		if got := fmt.Sprint(now.bitmaps()); got != want {
			t.Errorf("QEMU sees %s, want %s", got, want)
		}
		return now
	}
	q.change(func(img *qcow.Image) {
		writeAt(t, img, repeated(1, 512), 0)
		addBitmap(t, img, "b", qcow.BitmapOptions{})
		look("[{b 65536 [auto]}]")
		writeAt(t, img, repeated(1, 512), 1<<20)
		look("[{b 65536 [in-use auto]}]")
		do(t, img.DisableBitmap(t.Context(), "b"))
		writeAt(t, img, repeated(1, 512), 2<<20)
		want := []qcow.DirtyExtent{{1 << 20, 64 << 10}}
		look("[{b 65536 []}]").expectDirty("b", want)
		do(t, img.EnableBitmap(t.Context(), "b"))
		look("[{b 65536 [auto]}]").expectDirty("b", want)
	})
}
