package format_test

import (
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// TestSubclusters compares the word with a plain list of what each subcluster is.
func TestSubclusters(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	var word format.Subclusters
	var model [32]byte // 'd'ata, 'z'ero or nothing
	for range 20000 {
		first := rng.Uint64N(32)
		n := rng.Uint64N(32-first) + 1
		var what byte
		switch rng.IntN(3) {
		case 0:
			word, what = word.WithData(first, n), 'd'
		case 1:
			word, what = word.WithZero(first, n), 'z'
		case 2:
			word, what = word.WithNothing(first, n), 0
		}
		for i := first; i < first+n; i++ {
			model[i] = what
		}
		for i, m := range model {
			if word.Allocated(uint64(i)) != (m == 'd') || word.Zero(uint64(i)) != (m == 'z') {
				t.Fatalf("subcluster %d of %#x should be %q", i, uint64(word), m)
			}
		}
		if word.Invalid() != 0 {
			t.Fatalf("%#x is invalid in %#x", uint64(word), word.Invalid())
		}
	}
	var none format.Subclusters
	if none.WithData(0, 32) != format.AllData || none.WithZero(0, 32) != format.AllZero || format.AllZero.WithNothing(0, 32) != 0 || format.AllZero.WithData(3, 0) != format.AllZero {
		t.Error("whole words")
	}
	if got := (format.AllData | 1<<32 | 1<<63).Invalid(); got != 1<<31|1 {
		t.Errorf("invalid %#x", got)
	}
}

var (
	plainGeometry    = format.Geometry{ClusterBits: 16, RefcountOrder: 4}
	extendedGeometry = format.Geometry{ClusterBits: 16, RefcountOrder: 4, ExtendedL2: true}
)

func withDataFile(g format.Geometry) format.Geometry {
	g.DataFile = true
	return g
}

func TestMappingEntriesInTables(t *testing.T) {
	table := make([]byte, 64)
	e := format.MappingEntry{L2Entry: 0x0102030405060708, Subclusters: 0x1112131415161718}
	extendedGeometry.PutMappingEntry(table, 1, e)
	if table[16] != 1 || table[31] != 0x18 || table[15] != 0 || table[32] != 0 || extendedGeometry.MappingEntry(table, 1) != e {
		t.Errorf("% x", table)
	}
	clear(table)
	plainGeometry.PutMappingEntry(table, 1, e)
	if table[8] != 1 || table[16] != 0 || plainGeometry.MappingEntry(table, 1) != (format.MappingEntry{L2Entry: e.L2Entry}) {
		t.Errorf("% x", table)
	}
}

func TestKindsOfMappingEntries(t *testing.T) {
	const copied, compressed, zero = 1 << 63, 1 << 62, 1
	for _, c := range []struct {
		name  string
		g     format.Geometry
		entry format.L2Entry
		subs  format.Subclusters
		want  [2]format.Kind // of subclusters 0 and 31
	}{
		{"nothing", plainGeometry, 0, 0, [2]format.Kind{format.Unallocated}},
		{"data", plainGeometry, 0x50000 | copied, 0, [2]format.Kind{format.Data}},
		{"zero", plainGeometry, zero, 0, [2]format.Kind{format.ZeroedPlain}},
		{"zero with host", plainGeometry, 0x50000 | zero, 0, [2]format.Kind{format.ZeroAllocated}},
		{"compressed", plainGeometry, 0x50001 | compressed, 0, [2]format.Kind{format.Compressed}},
		{"COPIED without host", plainGeometry, copied, 0, [2]format.Kind{format.Unallocated}},
		{"data at 0", withDataFile(plainGeometry), copied, 0, [2]format.Kind{format.Data}},
		{"nothing in data file", withDataFile(plainGeometry), 0, 0, [2]format.Kind{format.Unallocated}},
		{"zero in data file", withDataFile(plainGeometry), copied | zero, 0, [2]format.Kind{format.ZeroedPlain}},
		{"extended nothing", extendedGeometry, 0, 0, [2]format.Kind{format.Unallocated, format.Unallocated}},
		{"extended zero", extendedGeometry, 0, 1 << 63, [2]format.Kind{format.Unallocated, format.ZeroedPlain}},
		{"extended data", extendedGeometry, 0x50000 | copied, 1 << 31, [2]format.Kind{format.UnallocatedHost, format.Data}},
		{"extended mixed", extendedGeometry, 0x50000, 1<<31 | 1<<32, [2]format.Kind{format.ZeroAllocated, format.Data}},
		{"extended compressed", extendedGeometry, 0x50001 | compressed, 0, [2]format.Kind{format.Compressed, format.Compressed}},
		{"extended data at 0", withDataFile(extendedGeometry), copied, 1, [2]format.Kind{format.Data, format.UnallocatedHost}},
		{"extended nothing in data file", withDataFile(extendedGeometry), 0, 1 << 32, [2]format.Kind{format.ZeroedPlain, format.Unallocated}},
	} {
		e := format.MappingEntry{L2Entry: c.entry, Subclusters: c.subs}
		if problem := c.g.CheckEntry(e); problem != "" {
			t.Errorf("%s: %s", c.name, problem)
		}
		for i, sub := range []uint64{0, 31} {
			if !c.g.ExtendedL2 && i > 0 {
				break
			}
			if got := c.g.Kind(e, sub); got != c.want[i] {
				t.Errorf("%s: subcluster %d is %v, want %v", c.name, sub, got, c.want[i])
			}
		}
		if !c.g.ExtendedL2 && !c.g.DataFile && c.g.Kind(e, 0) != e.Kind() {
			t.Errorf("%s: the entry alone says %v", c.name, e.Kind())
		}
	}
}

func TestCheckEntry(t *testing.T) {
	const copied, compressed = 1 << 63, 1 << 62
	for _, c := range []struct {
		g     format.Geometry
		entry format.L2Entry
		subs  format.Subclusters
		want  string
	}{
		{plainGeometry, 1<<61 | 0x50000, 0, "reserved bits 0x2000000000000000"},
		{plainGeometry, 2, 0, "reserved bits 0x2"},
		{plainGeometry, 0x50200, 0, "0x50200, which is not the start of a cluster"},
		{plainGeometry, 0x50201, 0, "0x50200, which is not the start of a cluster"},
		{withDataFile(plainGeometry), compressed | 1, 0, "external data file"},
		{extendedGeometry, 1, 0, "reserved bits 0x1"},
		{extendedGeometry, 0x50001, format.AllData, "reserved bits 0x1"},
		{extendedGeometry, 0x58000, format.AllData, "not the start of a cluster"},
		{extendedGeometry, 0x50000, 1<<32 | 1<<33 | 2, "0x2 are both data and zeroes"},
		{extendedGeometry, 0, format.AllZero | 1, "0x1 are both data and zeroes"},
		{extendedGeometry, 0, 4, "0x4 have data without a host cluster"},
		{extendedGeometry, copied, 4, "0x4 have data without a host cluster"},
		{withDataFile(extendedGeometry), 0, 4, "0x4 have data without a host cluster"},
		{extendedGeometry, compressed | 1, 1 << 32, "compressed cluster with subclusters 0x100000000"},
	} {
		got := c.g.CheckEntry(format.MappingEntry{L2Entry: c.entry, Subclusters: c.subs})
		if !strings.Contains(got, c.want) || got == "" {
			t.Errorf("%#x %#x: %q, want %q", uint64(c.entry), uint64(c.subs), got, c.want)
		}
	}
}

func FuzzMappingEntry(f *testing.F) {
	f.Add(uint64(0x50000|1<<63), uint64(0), uint8(16), false, false)
	f.Add(uint64(1<<62|0x50001), uint64(1), uint8(9), false, true)
	f.Add(uint64(1<<63), uint64(1<<32|2), uint8(14), true, true)
	f.Fuzz(func(t *testing.T, entry, subs uint64, bits uint8, extended, dataFile bool) {
		g := format.Geometry{ClusterBits: 9 + uint32(bits)%13, RefcountOrder: 4, ExtendedL2: extended, DataFile: dataFile}
		if extended {
			g.ClusterBits = max(g.ClusterBits, format.MinExtendedL2ClusterBits)
		}
		e := format.MappingEntry{L2Entry: format.L2Entry(entry), Subclusters: format.Subclusters(subs)}
		if !extended {
			e.Subclusters = 0
		}
		table := make([]byte, 4*g.L2EntrySize())
		g.PutMappingEntry(table, 2, e)
		if g.MappingEntry(table, 2) != e || g.MappingEntry(table, 1) != (format.MappingEntry{}) || g.MappingEntry(table, 3) != (format.MappingEntry{}) {
			t.Fatalf("%+v does not survive", e)
		}
		off, n := e.CompressedRange(g)
		if n == 0 || n > 2*g.ClusterSize() || uint64(off)+n < uint64(off) {
			t.Errorf("compressed: %d bytes at %#x", n, off)
		}
		if g.CheckEntry(e) != "" {
			return
		}
		for sub := range g.Subclusters() {
			switch kind := g.Kind(e, sub); kind {
			case format.Data, format.ZeroAllocated, format.UnallocatedHost:
				if !g.HasHost(e) || !g.Aligned(e.Offset()) || e.Offset() >= format.MaxHostOffset || e.Offset() == 0 && !dataFile {
					t.Errorf("%+v: %v at %#x", e, kind, e.Offset())
				}
			case format.Unallocated, format.ZeroedPlain, format.Compressed:
				if g.HasHost(e) {
					t.Errorf("%+v: %v with a host cluster", e, kind)
				}
			default:
				t.Errorf("%+v: %v", e, kind)
			}
		}
	})
}

func FuzzCompressedEntry(f *testing.F) {
	f.Add(uint64(0x50001), uint64(1000), uint8(16))
	f.Add(uint64(1<<54-1), uint64(1<<16), uint8(16))
	f.Add(uint64(0), uint64(1), uint8(9))
	f.Fuzz(func(t *testing.T, at, n uint64, bits uint8) {
		g := format.Geometry{ClusterBits: 9 + uint32(bits)%13}
		n = n%g.ClusterSize() + 1
		at %= uint64(g.MaxCompressedOffset())
		e := format.NewCompressedEntry(g, format.HostOffset(at), n)
		off, length := e.CompressedRange(g)
		end := (at + n + format.SectorSize - 1) &^ (format.SectorSize - 1)
		if e.Kind() != format.Compressed || e.Copied() || uint64(off) != at || at+length != end {
			t.Errorf("%d bytes at %#x became %d at %#x", n, at, length, off)
		}
	})
}
