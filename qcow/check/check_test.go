package check_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"reflect"
	"slices"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow/check"
	"github.com/qcow-csi/qcow-csi/qcow/format"
)

func mustCheck(t testing.TB, r check.Reader) *check.Report {
	t.Helper()
	report, err := check.Check(t.Context(), r, check.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return report
}

func TestValidImagesAreClean(t *testing.T) {
	for _, bits := range []uint32{9, 12, 16, 21} {
		for order := range uint32(format.MaxRefcountOrder + 1) {
			t.Run(fmt.Sprintf("cluster=%d/refcount_bits=%d", 1<<bits, 1<<order), func(t *testing.T) {
				b := newBuilder(t, bits, order, 5<<bits+512)
				b.data(0)
				b.data(1)
				b.set(2, format.ZeroPlain)
				zero := b.data(4)
				b.set(4, format.NewL2Entry(zero, true)|1)
				r := mustCheck(t, b.image())
				want := check.Report{
					TotalClusters: 6, AllocatedClusters: 3, ImageEnd: int64(len(b.bytes)),
				}
				if !reflect.DeepEqual(*r, want) {
					t.Errorf("got  %+v\nwant %+v", *r, want)
				}
			})
		}
	}
}

func TestEmptyImageIsClean(t *testing.T) {
	r := mustCheck(t, newBuilder(t, 16, 4, 0).image())
	if !r.Clean() || r.TotalClusters != 0 || r.AllocatedClusters != 0 {
		t.Errorf("%+v", r)
	}
}

func TestSnapshotsBitmapsAndEncryptionHeaderAreOwners(t *testing.T) {
	b := newBuilder(t, 12, 4, 1<<20)
	b.data(0)
	b.data(100)
	b.snapshot("first")
	b.snapshot("second")
	b.bitmap("dirty")
	b.h.CryptMethod = 2
	b.h.Extensions = append(b.h.Extensions, format.Extension{Type: format.ExtFullDisk, Data: encryptionPointer(b.alloc(10000), 10000)})
	if r := mustCheck(t, b.image()); !r.Clean() {
		t.Error(r)
	}
}

func TestBitmapsThatTheHeaderDoesNotVouchForAreLeaked(t *testing.T) {
	b := newBuilder(t, 12, 4, 1<<20)
	b.bitmap("dirty")
	b.h.Autoclear = 0
	if r := mustCheck(t, b.image()); r.Leaks != 3 || r.Corruptions != 0 {
		t.Error(r)
	}
}

func TestStatistics(t *testing.T) {
	b := newBuilder(t, 16, 4, 1<<30)
	b.data(0)
	b.data(3)
	c := b.alloc(1)
	b.compressed(5, c, 3)
	b.compressed(6, c+3*512, 2)
	b.setRefcount(b.cluster(c), 2)
	b.data(7) // not right behind guest cluster 3
	r := mustCheck(t, b.image())
	want := check.Report{
		TotalClusters: 1 << 14, AllocatedClusters: 5, FragmentedClusters: 3, CompressedClusters: 2, ImageEnd: int64(len(b.bytes)),
	}
	if !reflect.DeepEqual(*r, want) {
		t.Errorf("got  %+v\nwant %+v", *r, want)
	}
}

func TestHeaderFlagsAreReported(t *testing.T) {
	b := newBuilder(t, 16, 4, 1<<20)
	b.h.Incompatible = format.IncompatDirty | format.IncompatCorrupt
	if r := mustCheck(t, b.image()); !r.Dirty || !r.MarkedCorrupt || !r.Clean() {
		t.Errorf("%+v", r)
	}
}

// TestFindings damages one image in every way there is a kind of finding for.
func TestFindings(t *testing.T) {
	const (
		copied   = 1 << 63
		zeroFlag = 1
	)
	type image struct {
		*builder
		data0, data1, compressed     format.HostOffset
		directory, table, bitmapData format.HostOffset
	}
	one := func(k check.Kind, table check.Table) []check.Finding { return []check.Finding{{Kind: k, Table: table}} }
	for name, c := range map[string]struct {
		damage func(image)
		late   func(image, memory) memory // after the header has been written
		want   []check.Finding            // Kind and Table, in order
	}{
		"none": {},
		"leaked cluster": {
			damage: func(i image) { i.alloc(1) },
			want:   one(check.Leaked, check.Nothing),
		},
		"leaked references": {
			damage: func(i image) { i.setRefcount(i.cluster(i.compressed), 7) },
			want:   one(check.Leaked, check.CompressedData),
		},
		"leak past the end in a page with references": {
			damage: func(i image) { i.setRefcount(1000, 1) },
			want:   one(check.Leaked, check.Nothing),
		},
		"leak past the end": {
			damage: func(i image) { i.setRefcount(1500, 1) },
			want:   one(check.Leaked, check.Nothing),
		},
		"refcount 0": {
			damage: func(i image) { i.setRefcount(i.cluster(i.compressed), 0) },
			want:   one(check.RefcountTooLow, check.CompressedData),
		},
		"refcount 0 with COPIED": {
			damage: func(i image) { i.setRefcount(i.cluster(i.data0), 0) },
			want:   []check.Finding{{Kind: check.CopiedSet, Table: check.L2Table}, {Kind: check.RefcountTooLow, Table: check.GuestData}},
		},
		"refcount 0 of the header": {
			damage: func(i image) { i.setRefcount(0, 0) },
			want:   one(check.RefcountTooLow, check.HeaderCluster),
		},
		"refcount 2 with COPIED": {
			damage: func(i image) { i.setRefcount(i.cluster(i.data0), 2) },
			want:   []check.Finding{{Kind: check.CopiedSet, Table: check.L2Table}, {Kind: check.Leaked, Table: check.GuestData}},
		},
		"COPIED of an L2 table with refcount 2": {
			damage: func(i image) { i.setRefcount(i.cluster(i.l2[0]), 2) },
			want:   []check.Finding{{Kind: check.CopiedSet, Table: check.L1Table}, {Kind: check.Leaked, Table: check.L2Table}},
		},
		"COPIED missing in L1": {
			damage: func(i image) { i.put(i.l1Entry(0), i.entry(i.l1Entry(0))&^copied) },
			want:   one(check.CopiedMissing, check.L1Table),
		},
		"COPIED missing in L2": {
			damage: func(i image) { i.put(i.l2Entry(0), i.entry(i.l2Entry(0))&^copied) },
			want:   one(check.CopiedMissing, check.L2Table),
		},
		"COPIED without an L2 table":       {damage: func(i image) { i.put(i.l1Entry(1), copied) }, want: one(check.CopiedSet, check.L1Table)},
		"COPIED of an unallocated cluster": {damage: func(i image) { i.set(9, copied) }, want: one(check.CopiedSet, check.L2Table)},
		"COPIED of a zero cluster":         {damage: func(i image) { i.set(9, copied|zeroFlag) }, want: one(check.CopiedSet, check.L2Table)},
		"COPIED of a compressed cluster": {
			damage: func(i image) { i.put(i.l2Entry(2), i.entry(i.l2Entry(2))|copied) },
			want:   one(check.CopiedSet, check.L2Table),
		},
		"reserved bit in L1":             {damage: func(i image) { i.put(i.l1Entry(0), i.entry(i.l1Entry(0))|1<<56) }, want: one(check.ReservedBits, check.L1Table)},
		"reserved bit alone in L1":       {damage: func(i image) { i.put(i.l1Entry(1), 1) }, want: one(check.ReservedBits, check.L1Table)},
		"reserved bit in L2":             {damage: func(i image) { i.put(i.l2Entry(0), i.entry(i.l2Entry(0))|1<<61) }, want: one(check.ReservedBits, check.L2Table)},
		"reserved bit alone in L2":       {damage: func(i image) { i.set(9, 1<<57) }, want: one(check.ReservedBits, check.L2Table)},
		"reserved bit in refcount table": {damage: func(i image) { i.put(i.h.OffsetOf(tableAt)+8, 1) }, want: one(check.ReservedBits, check.RefcountTable)},
		"misaligned L2 table": {
			damage: func(i image) {
				i.put(i.l1Entry(1), uint64(format.NewL1Entry(i.h.OffsetOf(2)+512, false)))
			},
			want: one(check.Misaligned, check.L1Table),
		},
		"misaligned data": {
			damage: func(i image) { i.set(9, format.NewL2Entry(i.h.OffsetOf(2)+512, false)) },
			want:   one(check.Misaligned, check.L2Table),
		},
		"misaligned refcount block": {
			damage: func(i image) { i.put(i.h.OffsetOf(tableAt)+8, uint64(i.h.OffsetOf(2)+512)) },
			want:   one(check.Misaligned, check.RefcountTable),
		},
		"L2 table past the end": {
			damage: func(i image) { i.put(i.l1Entry(1), 1<<40) },
			want:   one(check.OutsideFile, check.L1Table),
		},
		"data past the end":            {damage: func(i image) { i.set(9, 1<<40) }, want: one(check.OutsideFile, check.L2Table)},
		"zero cluster past the end":    {damage: func(i image) { i.set(9, 1<<40|zeroFlag) }, want: one(check.OutsideFile, check.L2Table)},
		"compressed data past the end": {damage: func(i image) { i.builder.compressed(9, 1<<40, 1) }, want: one(check.OutsideFile, check.L2Table)},
		"refcount block past the end":  {damage: func(i image) { i.put(i.h.OffsetOf(tableAt)+8, 1<<40) }, want: one(check.OutsideFile, check.RefcountTable)},
		"data in the refcount table":   {damage: func(i image) { i.share(9, i.h.OffsetOf(tableAt)) }, want: one(check.Overlap, check.GuestData)},
		"data in the refcount block":   {damage: func(i image) { i.share(9, i.h.OffsetOf(blockAt)) }, want: one(check.Overlap, check.GuestData)},
		"data in the L1 table":         {damage: func(i image) { i.share(9, i.h.L1Offset) }, want: one(check.Overlap, check.GuestData)},
		"data in the bitmap directory": {damage: func(i image) { i.share(9, i.directory) }, want: one(check.Overlap, check.GuestData)},
		"data in a bitmap":             {damage: func(i image) { i.share(9, i.bitmapData) }, want: one(check.Overlap, check.GuestData)},
		"two guest clusters of one":    {damage: func(i image) { i.share(9, i.data1); i.put(i.l2Entry(1), uint64(i.data1)) }},
		"compressed data in a bitmap":  {damage: func(i image) { i.builder.compressed(9, i.bitmapData, 1); i.setRefcount(i.cluster(i.bitmapData), 2) }, want: one(check.Overlap, check.CompressedData)},
		"L2 table in the L1 table":     {damage: func(i image) { i.put(i.l1Entry(1), uint64(i.h.L1Offset)); i.setRefcount(l1At, 2) }, want: one(check.Overlap, check.L2Table)},
		"refcount block named twice": {damage: func(i image) {
			i.put(i.h.OffsetOf(tableAt)+8, uint64(i.h.OffsetOf(blockAt)))
			i.setRefcount(blockAt, 2)
		}, want: one(check.Overlap, check.RefcountBlock)},
		"file ends before a data cluster": {
			late: func(i image, m memory) memory { return append(m, make([]byte, 4096)...)[:len(m)-4096] },
			want: []check.Finding{{Kind: check.OutsideFile, Table: check.BitmapTable}, {Kind: check.Leaked, Table: check.Nothing}},
		},
		"file ends inside the last cluster": {
			late: func(i image, m memory) memory { return m[:len(m)-4095] },
		},
		"bitmap reserved bit":        {damage: func(i image) { i.put(i.table+0, i.entry(i.table)|2) }, want: []check.Finding{{Kind: check.ReservedBits, Table: check.BitmapTable}, {Kind: check.Leaked}}},
		"bitmap data misaligned":     {damage: func(i image) { i.put(i.table+0, i.entry(i.table)|512) }, want: []check.Finding{{Kind: check.Misaligned, Table: check.BitmapTable}, {Kind: check.Leaked}}},
		"bitmap of an unknown type":  {damage: func(i image) { i.bytes[i.directory+16] = 2 }, want: []check.Finding{{Kind: check.BadTable, Table: check.BitmapDirectory}, {Kind: check.Leaked}, {Kind: check.Leaked}}},
		"bitmap directory too short": {damage: func(i image) { i.h.Extensions[0].Data[15]-- }, want: []check.Finding{{Kind: check.BadTable, Table: check.BitmapDirectory}, {Kind: check.Leaked}, {Kind: check.Leaked}}},
		"bitmap extension empty": {
			damage: func(i image) { i.h.Extensions[0].Data = nil },
			want:   []check.Finding{{Kind: check.BadTable, Table: check.HeaderCluster}, {Kind: check.Leaked}, {Kind: check.Leaked}, {Kind: check.Leaked}},
		},
		"no bitmaps in the extension": {
			damage: func(i image) { clear(i.h.Extensions[0].Data[:4]) },
			want:   []check.Finding{{Kind: check.BadTable, Table: check.HeaderCluster}, {Kind: check.Leaked}, {Kind: check.Leaked}, {Kind: check.Leaked}},
		},
		"L1 table past the end": {
			damage: func(i image) { i.h.L1Offset = 1 << 40 },
			want:   []check.Finding{{Kind: check.OutsideFile, Table: check.HeaderCluster}},
		},
		"L1 table in the header": {
			damage: func(i image) { i.h.L1Offset = 1 << 12; i.h.RefcountTableOffset = 1 << 12 },
			want:   []check.Finding{{Kind: check.Overlap, Table: check.L1Table}},
		},
		"refcount table past the end": {
			damage: func(i image) { i.h.RefcountTableOffset = 1 << 40 },
			want:   []check.Finding{{Kind: check.OutsideFile, Table: check.HeaderCluster}},
		},
		"encryption header past the end": {
			damage: func(i image) {
				i.h.Extensions = append(i.h.Extensions, format.Extension{Type: format.ExtFullDisk, Data: encryptionPointer(1<<40, 4096)})
			},
			want: one(check.OutsideFile, check.HeaderCluster),
		},
		"encryption header larger than the file": {
			damage: func(i image) {
				i.h.Extensions = append(i.h.Extensions, format.Extension{Type: format.ExtFullDisk, Data: encryptionPointer(1<<12, 1<<50)})
			},
			want: one(check.OutsideFile, check.HeaderCluster),
		},
		"encryption header nowhere": {
			damage: func(i image) {
				i.h.Extensions = append(i.h.Extensions, format.Extension{Type: format.ExtFullDisk, Data: slices.Repeat([]byte{0xff}, 16)})
			},
			want: one(check.BadTable, check.HeaderCluster),
		},
		"encryption header pointer too short": {
			damage: func(i image) {
				i.h.Extensions = append(i.h.Extensions, format.Extension{Type: format.ExtFullDisk, Data: make([]byte, 8)})
			},
			want: one(check.BadTable, check.HeaderCluster),
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBuilder(t, 12, 4, 1<<22)
			i := image{builder: b, data0: b.data(0), data1: b.data(1)}
			i.compressed = b.alloc(1)
			b.compressed(2, i.compressed, 1)
			i.directory, i.table, i.bitmapData = b.bitmap("dirty")
			if c.damage != nil {
				c.damage(i)
			}
			m := b.image()
			if c.late != nil {
				m = c.late(i, m)
			}
			r := mustCheck(t, m)
			// Misplaced tables make everything behind them wrong as well; their own finding comes first.
			got := r.Findings
			if len(c.want) == 1 && c.want[0].Table == check.HeaderCluster && c.want[0].Kind == check.OutsideFile || name == "L1 table in the header" {
				got = got[:1]
			}
			if !slices.EqualFunc(got, c.want, func(a, b check.Finding) bool { return a.Kind == b.Kind && a.Table == b.Table }) {
				t.Errorf("got %v\nwant %v", r, c.want)
			}
		})
	}
}

func encryptionPointer(off format.HostOffset, n uint64) []byte {
	return binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(nil, uint64(off)), n)
}

// share makes a guest cluster a second owner of the host cluster at off, with a refcount that agrees.
func (b *builder) share(guest uint64, off format.HostOffset) {
	b.set(guest, format.NewL2Entry(off, false))
	b.setRefcount(b.cluster(off), b.refcount(b.cluster(off))+1)
}

func TestBrokenSnapshotTables(t *testing.T) {
	for name, c := range map[string]struct {
		damage func(entry []byte)
		want   check.Kind
	}{
		"no extra data":        {func(e []byte) { clear(e[36:40]) }, check.BadTable},
		"too much extra data":  {func(e []byte) { e[36] = 1 }, check.BadTable},
		"huge L1 table":        {func(e []byte) { e[8] = 1 }, check.BadTable},
		"misaligned L1 table":  {func(e []byte) { e[6] |= 2 }, check.Misaligned},
		"L1 table past end":    {func(e []byte) { e[2] = 1 }, check.OutsideFile},
		"L1 table is the disk": {func(e []byte) { binary.BigEndian.PutUint64(e, l1At<<12) }, check.Overlap},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBuilder(t, 12, 4, 1<<20)
			b.data(0)
			b.snapshot("first")
			c.damage(b.snapshots)
			r := mustCheck(t, b.image())
			if r.Corruptions == 0 || r.Findings[0].Kind != c.want {
				t.Errorf("got %v, want %v first", r, c.want)
			}
		})
	}

	t.Run("past the end", func(t *testing.T) {
		b := newBuilder(t, 12, 4, 1<<20)
		b.data(0)
		b.snapshot("first")
		b.h.SnapshotsOffset = 1 << 40
		r := mustCheck(t, b.image())
		if r.Corruptions == 0 || r.Findings[0].Kind != check.OutsideFile {
			t.Error(r)
		}
	})
}

func TestUncheckableImages(t *testing.T) {
	valid := func() *builder { return newBuilder(t, 12, 4, 1<<20) }
	for name, c := range map[string]struct {
		image func() memory
		class error
	}{
		"empty file":     {func() memory { return nil }, format.ErrCorrupt},
		"not an image":   {func() memory { return make(memory, 1<<16) }, format.ErrCorrupt},
		"ends in header": {func() memory { return valid().image()[:90] }, format.ErrCorrupt},
		"version 4":      {func() memory { m := valid().image(); m[7] = 4; return m }, format.ErrUnsupported},
		"extended L2":    {func() memory { b := valid(); b.h.Incompatible = format.IncompatExtendedL2; return b.image() }, format.ErrCorrupt}, // of 4 KiB
		"unknown":        {func() memory { b := valid(); b.h.Incompatible = 1 << 40; return b.image() }, format.ErrUnsupported},
	} {
		t.Run(name, func(t *testing.T) {
			r, err := check.Check(t.Context(), c.image(), check.Options{})
			if !errors.Is(err, c.class) || r != nil {
				t.Errorf("report %v, error %v, want %v", r, err, c.class)
			}
		})
	}
}

func TestHeaderExtensionsBeyondTheFirstReadAreSeen(t *testing.T) {
	b := newBuilder(t, 21, 4, 1<<20)
	b.h.Extensions = []format.Extension{{Type: 0x12345678, Data: make([]byte, 100<<10)}}
	b.bitmap("dirty") // its extension lies behind the first 64 KiB
	if r := mustCheck(t, b.image()); !r.Clean() {
		t.Error(r)
	}
}

func TestOptionsBoundFindingsAndMemory(t *testing.T) {
	b := newBuilder(t, 12, 4, 1<<20)
	for range 10 {
		b.alloc(1)
	}
	r, err := check.Check(t.Context(), b.image(), check.Options{MaxFindings: 3})
	if err != nil || len(r.Findings) != 3 || r.Leaks != 10 {
		t.Errorf("%v, error %v", r, err)
	}
	if s := r.String(); s[len(s)-len("and 7 more"):] != "and 7 more" {
		t.Errorf("String does not count the others: %s", s)
	}
	if _, err := check.Check(t.Context(), b.image(), check.Options{MaxMemory: 1000}); err == nil {
		t.Error("a page fitted into 1000 bytes")
	}
}

func TestContextEndsTheCheck(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := check.Check(ctx, newBuilder(t, 12, 4, 1<<20).image(), check.Options{}); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// broken fails every read that touches offset at.
type broken struct {
	memory
	at int64
}

func (b broken) ReadAt(p []byte, off int64) (int, error) {
	if off <= b.at && b.at < off+int64(len(p)) {
		return 0, io.ErrClosedPipe
	}
	return b.memory.ReadAt(p, off)
}

func TestReadErrorsEndTheCheck(t *testing.T) {
	b := newBuilder(t, 16, 4, 1<<20)
	b.data(0)
	b.snapshot("first")
	directory, table, data := b.bitmap("dirty")
	m := b.image()
	for name, at := range map[string]format.HostOffset{
		"header": 0, "refcount table": b.h.RefcountTableOffset, "refcount block": b.h.OffsetOf(blockAt), "L1 table": b.h.L1Offset,
		"L2 table": b.l2[0], "snapshot table": b.h.SnapshotsOffset, "bitmap directory": directory, "bitmap table": table,
	} {
		if r, err := check.Check(t.Context(), broken{m, int64(at)}, check.Options{}); !errors.Is(err, io.ErrClosedPipe) {
			t.Errorf("%s unreadable: report %v, error %v", name, r, err)
		}
	}
	if _, err := check.Check(t.Context(), broken{m, int64(data)}, check.Options{}); err != nil {
		t.Errorf("data was read: %v", err)
	}
}

// sparse is a huge file that holds an image at its beginning and zeroes behind.
type sparse struct {
	memory
	size int64
}

func (s sparse) ReadAt(p []byte, off int64) (int, error) {
	n, err := s.memory.ReadAt(p, off)
	if errors.Is(err, io.EOF) {
		clear(p[n:])
		return len(p), nil
	}
	return n, err
}

func (s sparse) Size() (int64, error) { return s.size, nil }

func TestHugeSparseFileCostsLittle(t *testing.T) {
	b := newBuilder(t, 9, 6, 1<<10)
	b.h.L1Entries = format.MaxL1Bytes / 8 // reaches far into the hole
	b.h.RefcountTableClusters = format.MaxRefcountTableBytes >> 9
	b.h.RefcountTableOffset = 1 << 60 >> 9 << 9 >> 6
	m := sparse{b.image(), 1 << 62}
	allocs := testing.AllocsPerRun(1, func() {
		if _, err := check.Check(t.Context(), m, check.Options{MaxFindings: 1, MaxMemory: 64 << 20}); err != nil {
			t.Error(err)
		}
	})
	t.Logf("%.0f allocations", allocs)
}

func TestSmallImageAllocatesLittle(t *testing.T) {
	m := smallImage(t)
	n := testing.AllocsPerRun(100, func() { mustCheck(t, m) })
	t.Logf("%.0f allocations", n)
	if n > 30 {
		t.Errorf("%.0f allocations for a small image", n)
	}
}

func smallImage(t testing.TB) memory {
	b := newBuilder(t, 16, 4, 64<<20)
	for i := range uint64(11) {
		b.data(i * 7)
	}
	return b.image()
}

func BenchmarkCheck1MiB(b *testing.B) {
	m := smallImage(b)
	b.ReportAllocs()
	for b.Loop() {
		mustCheck(b, m)
	}
}

func BenchmarkCheck512ByteClusters(b *testing.B) {
	img := newBuilder(b, 9, 1, 1<<20)
	for i := range uint64(1000) {
		img.data(i)
	}
	m := img.image()
	b.ReportAllocs()
	for b.Loop() {
		mustCheck(b, m)
	}
}
