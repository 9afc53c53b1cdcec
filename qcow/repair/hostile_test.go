package repair_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"runtime"
	"strings"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow/check"
	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/repair"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// TestHostileImages are files made to cost much. They are repaired or refused within 256 MiB.
func TestHostileImages(t *testing.T) {
	g := format.Geometry{ClusterBits: 9, RefcountOrder: 6}
	big := format.Header{Geometry: g, Size: g.MaxVirtualSize() / 32} // an L1 table of 1 MiB
	if long() {
		big.Size = g.MaxVirtualSize()
	}
	for name, c := range map[string]struct {
		image func() []byte
		want  error
	}{
		"one L2 table for every L1 entry": {func() []byte {
			b := newBuilder(big)
			b.data(0, 1)
			return fillL1(b, func(uint64) format.HostOffset { return b.l2[0] })
		}, format.ErrCorrupt},
		"an L2 table in every cluster": {func() []byte {
			b := newBuilder(big)
			b.alloc(2 * b.h.L1Bytes())
			clusters := uint64(len(b.bytes)) >> 9
			return fillL1(b, func(i uint64) format.HostOffset {
				if i+1 >= clusters {
					return 0
				}
				return format.HostOffset((i + 1) << 9)
			})
		}, nil},
		"every L2 table behind the end": {func() []byte {
			b := newBuilder(big)
			end := uint64(len(b.bytes))
			return fillL1(b, func(i uint64) format.HostOffset { return format.HostOffset(end + i<<9) })
		}, nil},
		"every L2 table behind the end, with a backing file": {func() []byte {
			h := big
			h.BackingFile = "base"
			b := newBuilder(h)
			return fillL1(b, func(i uint64) format.HostOffset { return 1 << 40 })
		}, format.ErrCorrupt},
		"all snapshots with the same L1 table": {func() []byte {
			b := newBuilder(big)
			b.data(0, 1)
			for range format.MaxSnapshots {
				b.snapshots = append(b.snapshots, format.Snapshot{L1Offset: b.h.L1Offset, L1Entries: b.h.L1Entries})
			}
			return b.unfinished()
		}, format.ErrCorrupt},
		"one refcount block for everything": {func() []byte {
			h := big
			h.Size = 1 << 20
			b := newBuilder(h)
			table, block := b.alloc(format.MaxRefcountTableBytes), b.alloc(1)
			for i := range uint64(format.MaxRefcountTableBytes / 8) {
				format.PutEntry(b.bytes[table:], i, uint64(block))
			}
			for i := range b.h.ClusterSize() {
				b.bytes[uint64(block)+i] = 0xff
			}
			b.h.RefcountTableOffset, b.h.RefcountTableClusters = table, format.MaxRefcountTableBytes>>9
			return b.unfinished()
		}, nil},
		"bitmaps that share their table": {func() []byte {
			h := big
			h.Size = 1 << 20
			b := newBuilder(h)
			table := b.alloc(8 << 20)
			var list []format.Bitmap
			for i := range 65535 {
				list = append(list, format.Bitmap{TableOffset: table, TableEntries: 1 << 20, Flags: format.BitmapInUse, GranularityBits: 9, Name: string(rune('a'+i/256/26)) + string(rune(0x100+i))})
			}
			directory := format.EncodeBitmaps(list)
			at := b.alloc(uint64(len(directory)))
			copy(b.bytes[at:], directory)
			ext := format.BitmapsExtension{Count: 65535, DirectorySize: uint64(len(directory)), DirectoryOffset: at}
			b.h.SetExtension(format.ExtBitmaps, ext.Encode())
			b.h.Autoclear = format.AutoclearBitmaps
			return b.unfinished()
		}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			image := c.image()
			f, err := storage.Create(t.TempDir() + "/image")
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close() //nolint:errcheck // of a test
			if _, err := f.WriteAt(image, 0); err != nil {
				t.Fatal(err)
			}
			var before, after runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&before)
			_, err = repair.Run(t.Context(), f, repair.Options{Mode: repair.All, MaxMemory: 256 << 20})
			runtime.ReadMemStats(&after)
			if !errors.Is(err, c.want) {
				t.Fatalf("error %v, want %v", err, c.want)
			}
			t.Logf("%v; %d MiB allocated in all", err, (after.TotalAlloc-before.TotalAlloc)>>20)
			if err == nil {
				r, err := check.Check(t.Context(), f, check.Options{})
				if err != nil || !r.Clean() {
					t.Errorf("%v, error %v", r, err)
				}
			}
		})
	}
}

// fillL1 sets every entry of the L1 table.
func fillL1(b *builder, to func(i uint64) format.HostOffset) []byte {
	for i := range uint64(b.h.L1Entries) {
		format.PutEntry(b.bytes[b.h.L1Offset:], i, uint64(format.NewL1Entry(to(i), true)))
	}
	return b.unfinished()
}

func TestMemoryLimit(t *testing.T) {
	b := newBuilder(format.Header{Geometry: format.Geometry{ClusterBits: 9, RefcountOrder: 6}, Size: 8 << 20})
	for i := range uint64(4000) {
		b.data(i, 1)
	}
	image := b.unfinished()
	for _, c := range []struct {
		limit int64
		ok    bool
	}{{1 << 10, false}, {20 << 10, false}, {1 << 20, true}} {
		got, _, err := repaired(image, repair.Options{Mode: repair.All, MaxMemory: c.limit})
		if (err == nil) != c.ok {
			t.Errorf("with %d bytes: %v", c.limit, err)
		}
		if err != nil && (!strings.Contains(err.Error(), "memory") || !bytes.Equal(got, image)) {
			t.Errorf("with %d bytes: %v", c.limit, err)
		}
	}
}

// TestBeyondRepair has images from which nothing can be made. They stay as they are.
func TestBeyondRepair(t *testing.T) {
	valid := func() *builder {
		b := newBuilder(format.Header{Geometry: format.Geometry{ClusterBits: 12, RefcountOrder: 4}, Size: 100 << 12})
		b.data(1, 1)
		return b
	}
	edit := func(edit func(image []byte) []byte) func() []byte {
		return func() []byte { return edit(valid().image()) }
	}
	put64 := func(at int, v uint64) func() []byte {
		return edit(func(image []byte) []byte { binary.BigEndian.PutUint64(image[at:], v); return image })
	}
	for name, c := range map[string]struct {
		image func() []byte
		want  error
	}{
		"empty":                     {func() []byte { return nil }, format.ErrCorrupt},
		"not an image":              {func() []byte { return make([]byte, 1<<16) }, format.ErrCorrupt},
		"version 4":                 {edit(func(image []byte) []byte { image[7] = 4; return image }), format.ErrUnsupported},
		"unknown feature":           {put64(format.IncompatibleOffset, 1<<20), format.ErrUnsupported},
		"cluster size":              {edit(func(image []byte) []byte { image[23] = 40; return image }), format.ErrCorrupt},
		"L1 table between clusters": {put64(40, 0x3200), format.ErrCorrupt},
		"L1 table outside":          {put64(40, 1<<40), format.ErrCorrupt},
		"L1 table too small":        {put64(24, 1<<40), format.ErrCorrupt},
		"cut in the header":         {edit(func(image []byte) []byte { return image[:60] }), format.ErrCorrupt},
		"encryption header outside": {func() []byte {
			b := valid()
			pointer := make([]byte, 16)
			binary.BigEndian.PutUint64(pointer, 1<<20)
			binary.BigEndian.PutUint64(pointer[8:], 4096)
			b.h.SetExtension(format.ExtFullDisk, pointer)
			return b.unfinished()
		}, format.ErrCorrupt},
		"encryption header on the L1 table": {func() []byte {
			b := valid()
			pointer := make([]byte, 16)
			binary.BigEndian.PutUint64(pointer, uint64(b.h.L1Offset))
			binary.BigEndian.PutUint64(pointer[8:], 4096)
			b.h.SetExtension(format.ExtFullDisk, pointer)
			return b.unfinished()
		}, format.ErrCorrupt},
		"compressed data with too many references": {func() []byte {
			g := format.Geometry{ClusterBits: 9}
			b := newBuilder(format.Header{Geometry: g, Size: 64 << 9})
			off := b.alloc(512)
			b.set(0, format.MappingEntry{L2Entry: format.NewCompressedEntry(g, off, 100)})
			b.set(1, format.MappingEntry{L2Entry: format.NewCompressedEntry(g, off, 100)})
			return b.unfinished()
		}, format.ErrCorrupt},
		"encrypted data with too many references": {func() []byte {
			b := newBuilder(format.Header{Geometry: format.Geometry{ClusterBits: 9}, Size: 64 << 9, CryptMethod: 2})
			b.data(0, 1)
			b.set(1, b.h.MappingEntry(b.bytes[b.l2[0]:], 0))
			return b.unfinished()
		}, format.ErrCorrupt},
	} {
		t.Run(name, func(t *testing.T) {
			image := c.image()
			got, report, err := repaired(image, repair.Options{Mode: repair.All})
			if !errors.Is(err, c.want) || report != nil {
				t.Errorf("error %v, report %v", err, report)
			}
			if len(got) != len(image) || contentOf(image).lost(contentOf(got)) != "" {
				t.Error("the image has changed")
			}
			t.Log(err)
		})
	}
}

// unreadable is a file that cannot be read at some places.
type unreadable struct {
	storage.File
	off, n int64
}

var errUnreadable = errors.New("bad sector")

func (u unreadable) ReadAt(p []byte, off int64) (int, error) {
	if off < u.off+u.n && u.off < off+int64(len(p)) {
		return 0, errUnreadable
	}
	return u.File.ReadAt(p, off)
}

// withoutRefcounts takes the refcount blocks away.
func withoutRefcounts(image []byte) []byte {
	for _, off := range words(image)["refcount table"] {
		format.PutEntry(image[off:], 0, 0)
	}
	return image
}

// TestReadErrors repairs images of which something cannot be read. That is no reason to take it for lost.
func TestReadErrors(t *testing.T) {
	image := withoutRefcounts(fuzzSubjects[2].build())
	for off := 0; off < len(image); off += 512 {
		f := storage.NewMemoryFrom(bytes.Clone(image))
		_, err := repair.Run(t.Context(), unreadable{f, int64(off), 512}, repair.Options{Mode: repair.All})
		if err != nil && (!errors.Is(err, errUnreadable) || !bytes.Equal(f.Bytes(), image)) {
			t.Errorf("bad sector at %#x: %v", off, err)
		}
		if err == nil {
			if s := unclean(f.Bytes()); s != "" {
				t.Errorf("bad sector at %#x: %s", off, s)
			}
		}
	}
	if _, err := repair.Run(t.Context(), unreadable{storage.NewMemoryFrom(image), 0, 1}, repair.Options{}); !errors.Is(err, errUnreadable) {
		t.Error(err)
	}
}

// TestCancel ends repairs early.
func TestCancel(t *testing.T) {
	image := withoutRefcounts(fuzzSubjects[2].build())
	calls := 0
	for stop := 1; ; stop++ {
		ctx, cancel := context.WithCancel(t.Context())
		f := storage.NewMemoryFrom(bytes.Clone(image))
		calls = 0
		_, err := repair.Run(ctx, f, repair.Options{Mode: repair.All, Progress: func(done, total int64) {
			if calls++; calls == stop {
				cancel()
			}
			if done < 1 || done > total {
				t.Errorf("%d of %d", done, total)
			}
		}})
		cancel()
		if err == nil {
			break
		}
		if !errors.Is(err, context.Canceled) || different(image, f.Bytes()) != "" {
			t.Fatalf("stopped at %d: %v", stop, err)
		}
	}
	if calls < 4 {
		t.Errorf("%d calls of Progress", calls)
	}
}

// TestReport looks at what a repair says.
func TestReport(t *testing.T) {
	image := fuzzSubjects[2].build()
	h, err := format.DecodeHeader(image)
	if err != nil {
		t.Fatal(err)
	}
	format.PutEntry(image[h.L1Offset:], 1, 1<<63|0x2a01) // 0x2a00, a data cluster perhaps
	format.PutEntry(image[h.L1Offset:], 0, format.Entry(image[h.L1Offset:], 0)|1<<60)
	_, full, err := repaired(image, repair.Options{Mode: repair.All})
	if err != nil {
		t.Fatal(err)
	}
	_, short, err := repaired(image, repair.Options{Mode: repair.All, MaxChanges: 1})
	if err != nil {
		t.Fatal(err)
	}
	if len(short.Changes) != 1 || short.Count() != full.Count() || len(full.Changes) != full.Count() || full.Clean() {
		t.Errorf("%v\n%v", full, short)
	}
	for _, s := range []string{"entry corrected: L1 table at", "reserved bits 0x1000000000000000"} {
		if !strings.Contains(full.String(), s) {
			t.Errorf("%q is not in %v", s, full)
		}
	}
	if s := short.String(); !strings.Contains(s, "and ") || strings.Count(s, "\n") != 2 {
		t.Error(s)
	}
	sum := 0
	for k := repair.LeakRepaired; k <= repair.MarkCleared; k++ {
		sum += full.Count(k)
		if k.String() == "" {
			t.Errorf("kind %d has no name", k)
		}
	}
	if sum != full.Count() || full.Leaks()+full.Raised()+full.Corrected()+full.Copied() > sum {
		t.Error(full)
	}
	for table := repair.Header; table <= repair.Cluster; table++ {
		if table.String() == "" {
			t.Errorf("table %d has no name", table)
		}
	}
}

// TestSpaceComesBack looks at what a repair frees, in the file and at its end.
func TestSpaceComesBack(t *testing.T) {
	path := t.TempDir() + "/image"
	f, err := storage.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close() //nolint:errcheck // of a test
	b := newBuilder(format.Header{Geometry: format.Geometry{ClusterBits: 16, RefcountOrder: 4}, Size: 1 << 30})
	b.data(0, 1)
	for range 20 {
		off := b.alloc(1)
		copy(b.bytes[off:], bytes.Repeat([]byte{7}, 1<<16))
	}
	b.data(1, 2)
	tail := b.alloc(10 << 16)
	copy(b.bytes[tail:], bytes.Repeat([]byte{8}, 10<<16))
	image := b.image() // with everything that nothing refers to freed
	if _, err := f.WriteAt(b.bytes, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(image[:1<<16], 0); err != nil { // the header, and the refcounts, of the finished image
		t.Fatal(err)
	}
	h, err := format.DecodeHeader(image)
	if err != nil {
		t.Fatal(err)
	}
	block := format.Entry(image[h.RefcountTableOffset:], 0)
	for _, off := range []uint64{uint64(h.RefcountTableOffset), block} {
		if _, err := f.WriteAt(image[off:][:1<<16], int64(off)); err != nil {
			t.Fatal(err)
		}
	}
	for cl := range uint64(len(b.bytes)) >> 16 { // everything is in use, they say
		if _, err := f.WriteAt([]byte{0, 1}, int64(block+2*cl)); err != nil {
			t.Fatal(err)
		}
	}
	before, err := f.AllocatedBytes()
	if err != nil {
		t.Fatal(err)
	}
	report, err := repair.Run(t.Context(), f, repair.Options{Mode: repair.Leaks})
	if err != nil {
		t.Fatal(err)
	}
	after, err := f.AllocatedBytes()
	if err != nil {
		t.Fatal(err)
	}
	size, err := f.Size()
	if err != nil {
		t.Fatal(err)
	}
	if report.Leaks() < 28 || report.Freed < 28<<16 || before-after < 27<<16 || size > int64(len(b.bytes))-10<<16 {
		t.Errorf("%d leaks, %d bytes freed; %d bytes became %d, the file has %d", report.Leaks(), report.Freed, before, after, size)
	}
	got := make([]byte, size)
	if _, err := f.ReadAt(got, 0); err != nil && !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	if s := unclean(got); s != "" {
		t.Error(s)
	}
}

// TestMarkOfDataFileIsNotBelieved sets the bit for an external data file in an image without one. Taken at its word, it would make every entry
// wrong; so the repair changes nothing.
func TestMarkOfDataFileIsNotBelieved(t *testing.T) {
	for name, more := range map[string]func(b *builder){
		"data":      func(*builder) {},
		"snapshots": func(b *builder) { b.snapshot("1") },
	} {
		t.Run(name, func(t *testing.T) {
			b := newBuilder(format.Header{Geometry: format.Geometry{ClusterBits: 12, RefcountOrder: 4}, Size: 1 << 20})
			for guest := range uint64(20) {
				b.data(guest, byte(guest+1))
			}
			more(b)
			image := b.image()
			image[format.IncompatibleOffset+7] |= format.IncompatDataFile
			for _, mode := range []repair.Mode{repair.Leaks, repair.All} {
				got, _, err := repaired(image, repair.Options{Mode: mode})
				if !errors.Is(err, format.ErrCorrupt) || !bytes.Equal(got, image) {
					t.Errorf("mode %d: %v, changed %t", mode, err, !bytes.Equal(got, image))
				}
			}
		})
	}
}
