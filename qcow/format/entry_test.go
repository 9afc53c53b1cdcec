package format_test

import (
	"math/rand/v2"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

func TestL1Entry(t *testing.T) {
	for _, c := range []struct {
		entry    format.L1Entry
		off      format.HostOffset
		copied   bool
		reserved uint64
	}{
		{0, 0, false, 0},
		{format.NewL1Entry(0x50000, true), 0x50000, true, 0},
		{format.NewL1Entry(1<<56-512, false), 1<<56 - 512, false, 0},
		{1<<63 | 1<<62 | 1<<56 | 512 | 1, 512, true, 1<<62 | 1<<56 | 1},
	} {
		if c.entry.Offset() != c.off || c.entry.Copied() != c.copied || c.entry.Reserved() != c.reserved {
			t.Errorf("%#x: offset %#x, copied %t, reserved %#x", uint64(c.entry), c.entry.Offset(), c.entry.Copied(), c.entry.Reserved())
		}
	}
}

func TestL2EntryKinds(t *testing.T) {
	for _, c := range []struct {
		entry    format.L2Entry
		kind     format.Kind
		copied   bool
		reserved uint64
	}{
		{0, format.Unallocated, false, 0},
		{1 << 63, format.Unallocated, true, 0},
		{format.ZeroPlain, format.ZeroedPlain, false, 0},
		{format.NewL2Entry(0x50000, true), format.Data, true, 0},
		{format.NewL2Entry(0x50000, false), format.Data, false, 0},
		{format.NewL2Entry(0x50000, true) | 1, format.ZeroAllocated, true, 0},
		{1<<62 | 1, format.Compressed, false, 0},
		{1<<62 | 1<<61 | 0x1fe, format.Compressed, false, 0}, // no reserved bits there
		{1<<61 | 2, format.Unallocated, false, 1<<61 | 2},
	} {
		if c.entry.Kind() != c.kind || c.entry.Copied() != c.copied || c.entry.Reserved() != c.reserved {
			t.Errorf("%#x: %v, copied %t, reserved %#x", uint64(c.entry), c.entry.Kind(), c.entry.Copied(), c.entry.Reserved())
		}
	}
	names := map[string]bool{}
	for k := format.Unallocated; k <= format.UnallocatedHost; k++ {
		names[k.String()] = true
	}
	if len(names) != 6 || names["unknown"] {
		t.Errorf("names of kinds: %v", names)
	}
}

// TestCompressedRange takes the examples apart as the specification words it: x = 62 - (cluster_bits - 8), host offset in
// the bits below x, the number of additional sectors from there to bit 61.
func TestCompressedRange(t *testing.T) {
	for _, c := range []struct {
		bits        uint32
		off, sector uint64 // host offset, additional sectors
		n           uint64
	}{
		{16, 0x50000, 0, 512},
		{16, 0x50001, 0, 511},
		{16, 0x501ff, 3, 3*512 + 1},
		{16, 1<<54 - 1, 255, 255*512 + 1},
		{9, 0x1234, 1, 2*512 - 0x34},
		{21, 1<<49 - 512, 8191, 8192 * 512},
	} {
		x := 62 - (c.bits - 8)
		e := format.L2Entry(1<<62 | c.sector<<x | c.off)
		off, n := e.CompressedRange(format.Geometry{ClusterBits: c.bits})
		if uint64(off) != c.off || n != c.n {
			t.Errorf("%+v: %d bytes at %#x", c, n, off)
		}
	}
}

func TestWithCopied(t *testing.T) {
	for _, off := range []format.HostOffset{0, 0x50000, 1<<56 - 512} {
		for _, was := range []bool{false, true} {
			for _, is := range []bool{false, true} {
				if got, want := format.NewL1Entry(off, was).WithCopied(is), format.NewL1Entry(off, is); got != want {
					t.Errorf("L1 entry %#x, want %#x", got, want)
				}
				if got, want := (format.NewL2Entry(off, was) | 1).WithCopied(is), format.NewL2Entry(off, is)|1; got != want {
					t.Errorf("L2 entry %#x, want %#x", got, want)
				}
			}
		}
	}
}

// TestCompressedEntryLimits encodes the largest offset and length of every cluster size.
func TestCompressedEntryLimits(t *testing.T) {
	for _, g := range geometries() {
		last, size := g.MaxCompressedOffset()-1, g.ClusterSize()
		if last >= format.MaxHostOffset {
			t.Errorf("%+v: compressed data at %#x", g, last)
		}
		off, n := format.NewCompressedEntry(g, last, size).CompressedRange(g)
		if off != last || uint64(last)+size > uint64(off)+n || n >= size+format.SectorSize {
			t.Errorf("%+v: %d bytes at %#x became %d at %#x", g, size, last, n, off)
		}
	}
}

func TestRefcountTableEntry(t *testing.T) {
	e := format.RefcountTableEntry(0xff00000000020000 | 0x1ff)
	if e.Offset() != 0xff00000000020000 || e.Reserved() != 0x1ff {
		t.Errorf("offset %#x, reserved %#x", e.Offset(), e.Reserved())
	}
}

func TestEntriesAreBigEndian(t *testing.T) {
	table := make([]byte, 24)
	format.PutEntry(table, 1, 0x0102030405060708)
	if table[8] != 1 || table[15] != 8 || format.Entry(table, 1) != 0x0102030405060708 || format.Entry(table, 0) != 0 || format.Entry(table, 2) != 0 {
		t.Errorf("% x", table)
	}
}

// TestRefcounts writes every width at random places and compares with a plain list of what should be there.
func TestRefcounts(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for order := range uint32(format.MaxRefcountOrder + 1) {
		g := format.Geometry{ClusterBits: 9, RefcountOrder: order}
		block, want := make([]byte, g.ClusterSize()), make([]uint64, g.BlockEntries())
		for range 20000 {
			i, v := rng.Uint64N(g.BlockEntries()), rng.Uint64()&g.MaxRefcount()
			format.PutRefcount(block, order, i, v)
			want[i] = v
		}
		for i, v := range want {
			if got := format.Refcount(block, order, uint64(i)); got != v {
				t.Fatalf("width %d, refcount %d: %d, want %d", g.RefcountBits(), i, got, v)
			}
		}
	}
}

// TestRefcountLayout fixes the bytes: big-endian from 8 bits up, the least significant bits first below.
func TestRefcountLayout(t *testing.T) {
	for _, c := range []struct {
		order uint32
		i, v  uint64
		want  []byte
	}{
		{0, 0, 1, []byte{0x01, 0}},
		{0, 9, 1, []byte{0, 0x02}},
		{1, 1, 3, []byte{0x0c, 0}},
		{2, 3, 0xa, []byte{0, 0xa0}},
		{3, 1, 0xab, []byte{0, 0xab}},
		{4, 0, 0x1234, []byte{0x12, 0x34}},
		{5, 0, 0x12345678, []byte{0x12, 0x34, 0x56, 0x78}},
		{6, 0, 0x123456789abcdef0, []byte{0x12, 0x34, 0x56, 0x78, 0x9a, 0xbc, 0xde, 0xf0}},
	} {
		got := make([]byte, len(c.want))
		format.PutRefcount(got, c.order, c.i, c.v)
		if string(got) != string(c.want) {
			t.Errorf("refcount %d = %#x of order %d: % x, want % x", c.i, c.v, c.order, got, c.want)
		}
	}
}
