package check_test

import (
	"reflect"
	"slices"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow/check"
	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// Images of other kinds than version 3 with plain L2 entries and the data in the same file.

func newVersion2(t testing.TB) *builder {
	b := newBuilder(t, 12, 4, 1<<20)
	b.h.Version = 2
	b.data(0)
	b.compressed(2, b.alloc(1), 1)
	return b
}

func newExtended(t testing.TB) *builder {
	b := newBuilderOf(t, format.Geometry{ClusterBits: 14, RefcountOrder: 4, ExtendedL2: true}, 1<<20)
	b.data(0)
	host := b.data(1)
	b.setSubclusters(1, format.NewL2Entry(host, true), format.AllZero.WithData(3, 5).WithNothing(20, 1))
	b.setSubclusters(2, 0, format.AllZero)
	b.compressed(3, b.alloc(1), 1)
	return b
}

func newDataFile(t testing.TB, extended bool) *builder {
	b := newBuilderOf(t, format.Geometry{ClusterBits: 16, RefcountOrder: 4, ExtendedL2: extended, DataFile: true}, 1<<20)
	b.data(0)
	b.data(1)
	b.data(9)
	return b
}

func TestVariantsAreClean(t *testing.T) {
	for name, c := range map[string]struct {
		b    *builder
		want check.Report
	}{
		"version 2":             {newVersion2(t), check.Report{TotalClusters: 256, AllocatedClusters: 2, FragmentedClusters: 1, CompressedClusters: 1}},
		"extended":              {newExtended(t), check.Report{TotalClusters: 64, AllocatedClusters: 3, FragmentedClusters: 1, CompressedClusters: 1}},
		"data file":             {newDataFile(t, false), check.Report{TotalClusters: 16, AllocatedClusters: 3, FragmentedClusters: 1}},
		"data file of extended": {newDataFile(t, true), check.Report{TotalClusters: 16, AllocatedClusters: 3, FragmentedClusters: 1}},
	} {
		m := c.b.image()
		c.want.ImageEnd = int64(len(m))
		if r := mustCheck(t, m); !reflect.DeepEqual(*r, c.want) {
			t.Errorf("%s:\ngot  %+v\nwant %+v", name, *r, c.want)
		}
	}
}

// TestSnapshotsOfVersion2 has entries without extra data, which version 3 must have.
func TestSnapshotsOfVersion2(t *testing.T) {
	for version, want := range map[uint32]int{2: 0, 3: 1} {
		b := newVersion2(t)
		b.h.Version = version
		b.snapshot("first")
		clear(b.snapshots[36:40])
		b.snapshots = slices.Delete(b.snapshots, 40, 56)
		if r := mustCheck(t, b.image()); r.Corruptions != want || r.Leaks != 0 {
			t.Errorf("version %d: %v", version, r)
		}
	}
}

// TestLongSnapshotTable has more entries than the first read finds.
func TestLongSnapshotTable(t *testing.T) {
	b := newBuilder(t, 16, 4, 1<<20)
	b.data(0)
	for range 1000 {
		b.snapshot("a name that takes a little space of its own")
	}
	m := b.image()
	if r := mustCheck(t, m); !r.Clean() || len(b.snapshots) < 1<<16 {
		t.Errorf("%d bytes: %v", len(b.snapshots), r)
	}
	last := m[int(b.h.SnapshotsOffset)+len(b.snapshots)-200:]
	for i := range 150 {
		last[i] = 0xff
	}
	if r := mustCheck(t, m); r.Corruptions == 0 || r.Findings[0].Kind != check.BadTable {
		t.Error(r)
	}
}

// TestSnapshotTableBehindTheEnd has a name that ends behind the end of the file, but within its last cluster: zeroes are there.
func TestSnapshotTableBehindTheEnd(t *testing.T) {
	b := newBuilder(t, 12, 4, 1<<20)
	b.data(0)
	b.snapshot("first")
	b.snapshots[15] += 100
	m := b.image()
	m = m[:int(b.h.SnapshotsOffset)+len(b.snapshots)]
	if r := mustCheck(t, m); !r.Clean() {
		t.Error(r)
	}
	m[b.h.SnapshotsOffset+14] = 0x20 // 8 KiB more
	if r := mustCheck(t, m); r.Corruptions == 0 || r.Findings[0].Kind != check.BadTable {
		t.Error(r)
	}
}

// TestFindingsInVariants damages images in the ways that only such images can be damaged.
func TestFindingsInVariants(t *testing.T) {
	const (
		copied   = 1 << 63
		zeroFlag = 1
	)
	dataFile := func(t testing.TB) *builder { return newDataFile(t, false) }
	both := func(t testing.TB) *builder { return newDataFile(t, true) }
	for name, c := range map[string]struct {
		image  func(t testing.TB) *builder
		damage func(b *builder)
		want   []check.Kind
	}{
		"zero flag in version 2":               {newVersion2, func(b *builder) { b.set(5, zeroFlag) }, []check.Kind{check.ReservedBits}},
		"zero flag of data in version 2":       {newVersion2, func(b *builder) { b.put(b.l2Entry(0), b.entry(b.l2Entry(0))|zeroFlag) }, []check.Kind{check.ReservedBits}},
		"odd compressed offset in version 2":   {newVersion2, func(b *builder) { b.put(b.l2Entry(2), b.entry(b.l2Entry(2))|zeroFlag) }, nil},
		"zero flag in extended":                {newExtended, func(b *builder) { b.set(5, zeroFlag) }, []check.Kind{check.ReservedBits}},
		"zero flag of data in extended":        {newExtended, func(b *builder) { b.put(b.l2Entry(0), b.entry(b.l2Entry(0))|zeroFlag) }, []check.Kind{check.ReservedBits}},
		"COPIED of nothing in extended":        {newExtended, func(b *builder) { b.set(5, copied) }, []check.Kind{check.CopiedSet}},
		"data and zeroes":                      {newExtended, func(b *builder) { b.put(b.l2Entry(0)+8, 1<<40|1<<8) }, []check.Kind{check.BadSubclusters}},
		"data and zeroes without host":         {newExtended, func(b *builder) { b.setSubclusters(5, 0, 1<<40|1<<8) }, []check.Kind{check.BadSubclusters}},
		"data without host":                    {newExtended, func(b *builder) { b.setSubclusters(5, 0, 1<<8) }, []check.Kind{check.BadSubclusters}},
		"compressed subclusters":               {newExtended, func(b *builder) { b.put(b.l2Entry(3)+8, 1<<33) }, []check.Kind{check.BadSubclusters, check.Leaked}},
		"host without data":                    {newExtended, func(b *builder) { b.put(b.l2Entry(0)+8, 0) }, nil},
		"misaligned in extended":               {newExtended, func(b *builder) { b.setSubclusters(5, 0x200, 0) }, []check.Kind{check.Misaligned}},
		"COPIED missing in extended":           {newExtended, func(b *builder) { b.put(b.l2Entry(0), b.entry(b.l2Entry(0))&^copied) }, []check.Kind{check.CopiedMissing}},
		"refcount 0 in extended":               {newExtended, func(b *builder) { b.setRefcount(b.cluster(format.L2Entry(b.entry(b.l2Entry(1))).Offset()), 0) }, []check.Kind{check.CopiedSet, check.RefcountTooLow}},
		"compressed in data file":              {dataFile, func(b *builder) { b.compressed(5, 0x1000, 1) }, []check.Kind{check.Forbidden}},
		"misplaced":                            {dataFile, func(b *builder) { b.set(5, format.NewL2Entry(0x70000, true)) }, []check.Kind{check.Misplaced}},
		"misplaced at 0":                       {dataFile, func(b *builder) { b.set(5, copied) }, []check.Kind{check.Misplaced}},
		"misplaced and COPIED missing":         {dataFile, func(b *builder) { b.set(5, 0x70000) }, []check.Kind{check.Misplaced, check.CopiedMissing}},
		"COPIED missing in data file":          {dataFile, func(b *builder) { b.put(b.l2Entry(9), b.entry(b.l2Entry(9))&^copied) }, []check.Kind{check.CopiedMissing}},
		"COPIED missing at 0":                  {dataFile, func(b *builder) { b.put(b.l2Entry(0), 0) }, nil}, // it is unallocated
		"misaligned in data file":              {dataFile, func(b *builder) { b.set(5, 0x50200|copied) }, []check.Kind{check.Misaligned}},
		"zero with host in data file":          {dataFile, func(b *builder) { b.set(5, 0x50000|copied|zeroFlag) }, nil},
		"zero with COPIED at 0":                {dataFile, func(b *builder) { b.put(b.l2Entry(0), copied|zeroFlag) }, nil},
		"zero with COPIED and no place":        {dataFile, func(b *builder) { b.set(5, copied|zeroFlag) }, []check.Kind{check.CopiedSet}},
		"past the end of the file":             {dataFile, func(b *builder) { b.set(15, format.NewL2Entry(0xf0000, true)) }, nil}, // which the data file need not share
		"snapshot in data file":                {dataFile, func(b *builder) { b.h.Snapshots = 1; b.snapshots = make([]byte, 56); b.snapshots[39] = 16 }, []check.Kind{check.Forbidden}},
		"refcount of what the data file holds": {dataFile, func(b *builder) { b.setRefcount(9, 1) }, []check.Kind{check.Leaked}},
		"data without host in data file":       {both, func(b *builder) { b.setSubclusters(5, 0, 1<<8) }, []check.Kind{check.BadSubclusters}},
		"subclusters at 0":                     {both, func(b *builder) { b.put(b.l2Entry(0)+8, 1<<8) }, nil},
		"misplaced in data file of extended":   {both, func(b *builder) { b.setSubclusters(5, format.NewL2Entry(0x70000, true), 1) }, []check.Kind{check.Misplaced}},
	} {
		t.Run(name, func(t *testing.T) {
			b := c.image(t)
			c.damage(b)
			r := mustCheck(t, b.image())
			var got []check.Kind
			for _, f := range r.Findings {
				got = append(got, f.Kind)
			}
			if !slices.Equal(got, c.want) {
				t.Errorf("%v\nwant %v", r, c.want)
			}
		})
	}
}
