package qcow_test

import (
	"errors"
	"fmt"
	"runtime"
	"strings"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/check"
	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// Offsets in an entry of the bitmap directory.
const (
	atBitmapTable       = 0
	atBitmapEntries     = 8
	atBitmapFlags       = 12
	atBitmapType        = 16
	atBitmapGranularity = 17
	atBitmapNameLength  = 18
	atBitmapExtraLength = 20
)

// handmadeBitmaps is an image with bitmaps, whose bytes a test changes.
type handmadeBitmaps struct {
	*handmade
	directory format.HostOffset
	list      []format.Bitmap
	entries   []format.HostOffset // of the directory
}

// newHandmadeBitmaps makes an image with two enabled bitmaps, "a" and "b", of which the first has a data cluster. Each is as long as a
// cluster.
func newHandmadeBitmaps(t testing.TB) *handmadeBitmaps {
	return readHandmadeBitmaps(newHandmade(t, qcow.CreateOptions{Size: 2 << 20, ClusterSize: 512, RefcountBits: 16}, func(img *qcow.Image) {
		addBitmap(t, img, "a", qcow.BitmapOptions{Granularity: 512})
		addBitmap(t, img, "b", qcow.BitmapOptions{Granularity: 4096})
		writeAt(t, img, repeated(1, 512), 3*512)
		writeAt(t, img, repeated(1, 512), 1<<20)
		do(t, img.ClearBitmap(t.Context(), "b"))
	}))
}

func readHandmadeBitmaps(m *handmade) *handmadeBitmaps {
	m.t.Helper()
	ext, err := m.h.Bitmaps()
	do(m.t, err)
	h := &handmadeBitmaps{handmade: m, directory: ext.DirectoryOffset}
	h.list, err = format.DecodeBitmaps(m.b[h.directory:][:ext.DirectorySize], ext.Count)
	do(m.t, err)
	at := h.directory
	for _, b := range h.list {
		h.entries = append(h.entries, at)
		at += format.HostOffset(len(format.EncodeBitmaps([]format.Bitmap{b})))
	}
	return h
}

// field changes n bytes at a place in entry i of the directory.
func (h *handmadeBitmaps) field(i, at, n int, v uint64) { h.patchHeader(int(h.entries[i])+at, n, v) }

// extension returns where the data of the bitmaps extension is.
func (h *handmadeBitmaps) extension() int {
	at := int(h.h.HeaderLength)
	for i := range h.h.Extensions {
		e := &h.h.Extensions[i]
		if e.Type == format.ExtBitmaps {
			return at + 8
		}
		at += 8 + (len(e.Data)+7)&^7
	}
	h.t.Fatal("no bitmaps extension")
	return 0
}

// TestHostileBitmaps damages directory, tables and the header's extension. The image is refused for writing, in time and at little cost; for reading
// it can be opened, but for its bitmaps.
func TestHostileBitmaps(t *testing.T) {
	base := newHandmadeBitmaps(t)
	data := base.entry(base.list[0].TableOffset)
	size := uint64(len(base.b))
	for _, c := range []struct {
		name   string
		damage func(h *handmadeBitmaps)
		class  error
		what   string
	}{
		{"directory behind the file", func(h *handmadeBitmaps) { h.patchHeader(h.extension()+16, 8, size) }, qcow.ErrCorrupt, "past the end"},
		{"directory between clusters", func(h *handmadeBitmaps) { h.patchHeader(h.extension()+16, 8, uint64(h.directory)+8) }, qcow.ErrCorrupt, "start of a cluster"},
		{"directory in the L1 table", func(h *handmadeBitmaps) { h.patchHeader(h.extension()+16, 8, uint64(h.h.L1Offset)) }, qcow.ErrCorrupt, "overlaps"},
		{"directory of 64 MiB", func(h *handmadeBitmaps) { h.patchHeader(h.extension()+8, 8, 60<<20) }, qcow.ErrCorrupt, "past the end"},
		{"directory of 16 EiB", func(h *handmadeBitmaps) { h.patchHeader(h.extension()+8, 8, 1<<64-1) }, qcow.ErrCorrupt, "bitmaps extension"},
		{"4 billion bitmaps", func(h *handmadeBitmaps) { h.patchHeader(h.extension(), 4, 1<<32-1) }, qcow.ErrCorrupt, "bitmaps extension"},
		{"no bitmap", func(h *handmadeBitmaps) { h.patchHeader(h.extension(), 4, 0) }, qcow.ErrCorrupt, "bitmaps extension"},
		{"one bitmap more", func(h *handmadeBitmaps) { h.patchHeader(h.extension(), 4, 3) }, qcow.ErrCorrupt, "cut off"},
		{"one bitmap fewer", func(h *handmadeBitmaps) { h.patchHeader(h.extension(), 4, 1) }, qcow.ErrCorrupt, "do not fill"},
		{"reserved field", func(h *handmadeBitmaps) { h.patchHeader(h.extension()+4, 4, 1) }, qcow.ErrCorrupt, "reserved"},
		{"type 2", func(h *handmadeBitmaps) { h.field(1, atBitmapType, 1, 2) }, qcow.ErrUnsupported, "type 2"},
		{"unknown flag", func(h *handmadeBitmaps) { h.field(1, atBitmapFlags, 4, 8) }, qcow.ErrCorrupt, "flags"},
		{"granularity of 256", func(h *handmadeBitmaps) { h.field(0, atBitmapGranularity, 1, 8) }, qcow.ErrCorrupt, "granularity"},
		{"granularity of 4 GiB", func(h *handmadeBitmaps) { h.field(0, atBitmapGranularity, 1, 32) }, qcow.ErrCorrupt, "granularity"},
		{"long name", func(h *handmadeBitmaps) { h.field(1, atBitmapNameLength, 2, 1<<16-1) }, qcow.ErrCorrupt, "cut off"},
		{"much extra data", func(h *handmadeBitmaps) { h.field(1, atBitmapExtraLength, 4, 1<<32-1) }, qcow.ErrCorrupt, "cut off"},
		{"two of a name", func(h *handmadeBitmaps) { h.b[h.entries[1]+24] = 'a' }, qcow.ErrCorrupt, "second bitmap"},
		{"table too long", func(h *handmadeBitmaps) { h.field(0, atBitmapEntries, 4, 2) }, qcow.ErrCorrupt, "table of 2 entries"},
		{"table without an entry", func(h *handmadeBitmaps) { h.field(0, atBitmapEntries, 4, 0) }, qcow.ErrCorrupt, "table of 0 entries"},
		{"finer than its table", func(h *handmadeBitmaps) { h.patchHeader(atSize, 8, 4<<20); h.growL1() }, qcow.ErrCorrupt, "table of 1 entries"},
		{"in use, of 512 MiB and a cluster", func(h *handmadeBitmaps) {
			h.field(0, atBitmapFlags, 4, 3)
			h.field(0, atBitmapEntries, 4, 1<<20+1)
		}, qcow.ErrCorrupt, "table of 1048577 entries"},
		{"in use, of 512 MiB", func(h *handmadeBitmaps) {
			h.field(0, atBitmapFlags, 4, 3)
			h.field(0, atBitmapEntries, 4, 1<<20)
		}, qcow.ErrCorrupt, "past the end"},
		{"table behind the file", func(h *handmadeBitmaps) { h.field(0, atBitmapTable, 8, size) }, qcow.ErrCorrupt, "past the end"},
		{"table near 2^64", func(h *handmadeBitmaps) { h.field(0, atBitmapTable, 8, 1<<64-512) }, qcow.ErrCorrupt, "table at"},
		{"table between clusters", func(h *handmadeBitmaps) { h.field(0, atBitmapTable, 8, 520) }, qcow.ErrCorrupt, "start of a cluster"},
		{"table in the header", func(h *handmadeBitmaps) { h.field(0, atBitmapTable, 8, 0) }, qcow.ErrCorrupt, "table at"},
		{"table in a refcount block", func(h *handmadeBitmaps) { h.field(0, atBitmapTable, 8, uint64(h.block())) }, qcow.ErrCorrupt, "overlaps"},
		{"one table for two", func(h *handmadeBitmaps) { h.field(1, atBitmapTable, 8, uint64(h.list[0].TableOffset)) }, qcow.ErrCorrupt, "overlaps"},
		{"reserved bits", func(h *handmadeBitmaps) { h.put(h.list[0].TableOffset, data|1<<60) }, qcow.ErrCorrupt, "reserved bits"},
		{"ones and data", func(h *handmadeBitmaps) { h.put(h.list[0].TableOffset, data|1) }, qcow.ErrCorrupt, "reserved bits"},
		{"data behind the file", func(h *handmadeBitmaps) { h.put(h.list[0].TableOffset, size) }, qcow.ErrCorrupt, "past the end"},
		{"data in the L2 table", func(h *handmadeBitmaps) { h.put(h.list[0].TableOffset, uint64(h.l2Table(3))) }, qcow.ErrCorrupt, "overlaps"},
		{"one data cluster for two", func(h *handmadeBitmaps) { h.put(h.list[1].TableOffset, data) }, qcow.ErrCorrupt, "overlaps"},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := readHandmadeBitmaps(&handmade{t, base.file().Bytes(), base.h})
			c.damage(h)
			h.expectRefused(qcow.Options{}, c.class, c.what)
			img := open(t, h.file(), qcow.Options{ReadOnly: true})
			for range 2 {
				_, err := img.Bitmaps()
				expectClass(t, "list", err, c.class)
				_, err = dirtyExtents(img, "a")
				expectClass(t, "read", err, c.class)
			}
			do(t, img.Close())
		})
	}
}

// growL1 makes the L1 table of an image say that it has twice as many entries; what they hold is zeroes.
func (h *handmadeBitmaps) growL1() {
	n := h.h.L1EntriesFor(4 << 20)
	h.patchHeader(atL1Entries, 4, n)
	at := uint64(len(h.b))
	h.b = append(h.b, make([]byte, h.h.ClustersFor(n*format.EntrySize)<<h.h.ClusterBits)...)
	copy(h.b[at:], h.b[h.h.L1Offset:][:h.h.L1Bytes()])
	h.patchHeader(atL1Offset, 8, at)
}

// TestBitmapsWithExtraData keeps extra data that is not understood: a bitmap that may be used all the same is, the other not.
func TestBitmapsWithExtraData(t *testing.T) {
	for _, compatible := range []bool{true, false} {
		t.Run(fmt.Sprintf("compatible=%v", compatible), func(t *testing.T) {
			h := newHandmadeBitmaps(t)
			for i := range h.list {
				h.list[i].Extra = []byte("0123456789")
				if compatible {
					h.list[i].Flags |= format.BitmapExtraCompatible
				}
			}
			h.list[1].Flags &^= format.BitmapAuto
			directory := format.EncodeBitmaps(h.list)
			copy(h.b[h.directory:], directory)
			h.patchHeader(h.extension()+8, 8, uint64(len(directory)))
			f := h.file()
			if !compatible {
				change(t, f, func(img *qcow.Image) {
					for _, name := range []string{"a", "b"} {
						_, err := dirtyExtents(img, name)
						expectClass(t, "read", err, qcow.ErrUnsupported)
						expectClass(t, "clear", img.ClearBitmap(t.Context(), name), qcow.ErrUnsupported)
					}
				})
			}
			change(t, f, func(img *qcow.Image) { writeAt(t, img, repeated(1, 512), 0) })
			change(t, f, func(img *qcow.Image) { addBitmap(t, img, "c", qcow.BitmapOptions{}) })
			after := readHandmadeBitmaps(&handmade{t, f.Bytes(), headerOf(t, f)})
			for i, flags := range []uint32{format.BitmapAuto | format.BitmapInUse, 0} { // what could not be recorded in is inconsistent
				if compatible {
					flags = flags&format.BitmapAuto | format.BitmapExtraCompatible
				}
				if b := after.list[i]; string(b.Extra) != "0123456789" || b.Flags != flags {
					t.Errorf("%+v, want the flags %#x", b, flags)
				}
			}
			if compatible {
				change(t, f, func(img *qcow.Image) {
					expectDirty(t, img, "a", []qcow.DirtyExtent{{0, 512}, {3 * 512, 512}, {1 << 20, 512}})
					do(t, img.RemoveBitmap(t.Context(), "a"))
				})
			}
			change(t, f, func(img *qcow.Image) {
				do(t, img.Resize(t.Context(), 4<<20))
				do(t, img.RemoveBitmap(t.Context(), "b"))
			})
		})
	}
}

func headerOf(t testing.TB, f *storage.Memory) *format.Header {
	t.Helper()
	h, err := format.DecodeHeader(f.Bytes())
	do(t, err)
	return h
}

// TestBitmapsWithoutMemory opens images whose bitmaps need more memory than they may have: for writing they are given up, with the autoclear bit, and
// reading says so.
func TestBitmapsWithoutMemory(t *testing.T) {
	require.Tool(t, "qemu-img")
	f := create(t, qcow.CreateOptions{Size: 64 << 20, ClusterSize: 512})
	change(t, f, func(img *qcow.Image) {
		addBitmap(t, img, "a", qcow.BitmapOptions{Granularity: 512})
		for off := int64(0); off < img.Size(); off += 8 << 20 {
			writeAt(t, img, repeated(1, 512), off)
		}
	})
	o := qcow.Options{BitmapBytes: 16 << 10}
	img := open(t, storage.NewMemoryFrom(f.Bytes()), qcow.Options{ReadOnly: true, BitmapBytes: o.BitmapBytes})
	if _, err := img.Bitmaps(); err == nil || !strings.Contains(err.Error(), "memory") {
		t.Errorf("list: %v", err)
	}
	do(t, img.Close())
	img = open(t, f, o)
	list, err := img.Bitmaps()
	if info := img.Info(); err != nil || len(list) != 0 || !info.BitmapsIgnored || info.Bitmaps != 1 {
		t.Errorf("bitmaps %v, %v, info %+v", list, err, info)
	}
	writeAt(t, img, repeated(1, 512), 512)
	do(t, img.Close())
	if h := headerOf(t, f); h.Autoclear&format.AutoclearBitmaps != 0 {
		t.Error("the autoclear bit is still set")
	}
	if list := newQEMUFile(t, f.Bytes()).bitmaps(); len(list) != 0 {
		t.Errorf("QEMU sees %v", list)
	}

	// Where the memory ends while a bitmap records, too much is dirty.
	f = create(t, qcow.CreateOptions{Size: 1 << 30})
	img = open(t, f, o)
	addBitmap(t, img, "a", qcow.BitmapOptions{Granularity: 4096})
	for off := int64(0); off < img.Size(); off += 64 << 20 {
		writeAt(t, img, repeated(1, 512), off)
	}
	got := map[int64]bool{}
	for e, err := range img.DirtyExtents("a", 0, img.Size()) {
		do(t, err)
		for off := e.Offset; off < e.Offset+e.Length; off += 4096 {
			got[off] = true
		}
	}
	for off := int64(0); off < img.Size(); off += 64 << 20 {
		if !got[off] {
			t.Errorf("%d is not dirty", off)
		}
	}
	if len(got) == 1<<30/4096 || len(got) == 16 {
		t.Errorf("%d granules are dirty", len(got))
	}
	do(t, img.Close())
	expectClean(t, f.Bytes())
}

// TestBitmapsIgnored opens an image that was changed by a program without support for bitmaps, which cleared the autoclear bit.
func TestBitmapsIgnored(t *testing.T) {
	require.Tool(t, "qemu-img")
	h := newHandmadeBitmaps(t)
	h.patchHeader(atAutoclear, 8, 0)
	f := h.file()
	for _, readOnly := range []bool{true, false} {
		img := open(t, keptOpen{f}, qcow.Options{ReadOnly: readOnly})
		list, err := img.Bitmaps()
		if info := img.Info(); err != nil || len(list) != 0 || !info.BitmapsIgnored || info.Bitmaps != 2 {
			t.Errorf("bitmaps %v, %v, info %+v", list, err, info)
		}
		if !readOnly {
			writeAt(t, img, repeated(1, 512), 0)
			expectClass(t, "remove", img.RemoveBitmap(t.Context(), "a"), qcow.ErrNotFound)
		}
		do(t, img.Close())
	}
	change(t, keptOpen{f}, func(img *qcow.Image) {
		addBitmap(t, img, "a", qcow.BitmapOptions{})
		if info := img.Info(); info.BitmapsIgnored || info.Bitmaps != 1 {
			t.Errorf("info %+v", info)
		}
	})
	report, err := check.Check(t.Context(), f, check.Options{})
	if err != nil || report.Corruptions > 0 || report.Leaks == 0 {
		t.Errorf("%v, %v", report, err)
	}
	q := newQEMUFile(t, f.Bytes())
	q.run("qemu-img", "check", "-q", "-r", "leaks", q.path)
	q.expectDirty("a", nil)
	q.expectClean()
}

// fuzzBitmapsLimit bounds the file and the memory of a fuzzer's input.
const fuzzBitmapsLimit = 1 << 20

// FuzzBitmaps damages the bitmaps of an image and uses what can still be opened: nothing may panic, hang, or take memory without bound; an image
// that the checker has nothing against can be used, and stays so.
func FuzzBitmaps(f *testing.F) {
	base := newHandmadeBitmaps(f)
	for _, seed := range []string{
		"", "\x00\x00\x07", "\x01\x0c\x03", "\x01\x0f\x01\x02\x0f\x01", "\x01\x11\x10", "\x02\x11\x1f", "\x01\x14\x08", "\x03\x00\x80", "\x03\x07\x01", "\x04\x07\x01",
		"\x03\x06\x02", "\x00\x08\x01", "\x00\x17\x10", "\x01\x05\x10", "\x05\x01\xff", "\x01\x0b\x80\x01\x0f\x03", "\x06\x00\x00",
	} {
		f.Add([]byte(seed), []byte("\x00\x05\x01\x10\x02\x20\x03\x04\x05\x06\x07\x08"))
	}
	f.Fuzz(func(t *testing.T, patches, code []byte) {
		h := readHandmadeBitmaps(&handmade{t, base.file().Bytes(), base.h})
		places := []format.HostOffset{
			format.HostOffset(h.extension()), h.entries[0], h.entries[1], h.list[0].TableOffset, h.list[1].TableOffset, format.HostOffset(h.entry(h.list[0].TableOffset)), atAutoclear,
		}
		for c, n := bytecode(patches), 0; len(c) > 0 && n < fuzzSteps; n++ {
			at := places[int(c.byte())%len(places)] + format.HostOffset(c.byte())
			h.b[min(int(at), len(h.b)-1)] = c.byte()
		}
		file := storage.NewMemoryFrom(h.b)
		file.Limit(fuzzBitmapsLimit)
		report, err := check.Check(t.Context(), file, check.Options{})
		sound := err == nil && sound(report)
		tolerate := func(err error) {
			t.Helper()
			switch {
			case err == nil, errors.Is(err, qcow.ErrNoSpace), errors.Is(err, qcow.ErrNotFound), errors.Is(err, qcow.ErrInvalid), errors.Is(err, qcow.ErrUnsupported):
			case sound || !errors.Is(err, qcow.ErrCorrupt):
				t.Fatalf("the checker says %v, the engine: %v", report, err)
			}
		}
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		img, err := qcow.Open(file, qcow.Options{ReserveBytes: 4096})
		tolerate(err)
		if err != nil {
			return
		}
		ctx := t.Context()
		for c, steps := bytecode(code), 0; len(c) > 0 && steps < fuzzSteps; steps++ {
			name, off := []string{"a", "b", "c"}[c.byte()%3], int64(c.byte())<<12
			switch c.byte() % 10 {
			case 0, 1:
				_, err = img.WriteAt(repeated(1, 5000), off)
			case 2:
				err = img.AddBitmap(ctx, name, qcow.BitmapOptions{Granularity: 512 << (off >> 12 % 24)})
			case 3:
				err = img.RemoveBitmap(ctx, name)
			case 4:
				err = img.ClearBitmap(ctx, name)
			case 5:
				err = img.MergeBitmap(ctx, name, "a")
			case 6:
				err = img.EnableBitmap(ctx, name)
			case 7:
				err = img.DisableBitmap(ctx, name)
			case 8:
				err = img.Resize(ctx, 512+off*8)
			case 9:
				for _, err = range img.DirtyExtents(name, 0, img.Size()) {
					tolerate(err)
				}
			}
			if off > img.Size() {
				err = nil
			}
			tolerate(err)
		}
		_, err = img.Bitmaps()
		tolerate(err)
		tolerate(img.Close())
		runtime.ReadMemStats(&after)
		if took := after.TotalAlloc - before.TotalAlloc; took > 64<<20+uint64(len(code))<<20 {
			t.Fatalf("%d bytes were allocated", took)
		}
		if !sound {
			return
		}
		if report, err := check.Check(t.Context(), file, check.Options{}); err != nil || report.Corruptions > 0 {
			t.Fatalf("a sound image was damaged: %v, %v", report, err)
		}
	})
}
