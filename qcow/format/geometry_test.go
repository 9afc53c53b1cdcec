package format_test

import (
	"math/big"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

func geometries() []format.Geometry {
	var all []format.Geometry
	for bits := uint32(format.MinClusterBits); bits <= format.MaxClusterBits; bits++ {
		for order := range uint32(format.MaxRefcountOrder + 1) {
			g := format.Geometry{ClusterBits: bits, RefcountOrder: order}
			all = append(all, g)
			if g.ExtendedL2 = true; bits >= format.MinExtendedL2ClusterBits {
				all = append(all, g)
			}
		}
	}
	return all
}

func TestGeometryAgreesWithItself(t *testing.T) {
	for _, g := range geometries() {
		size := g.ClusterSize()
		if g.Subclusters()*g.SubclusterSize() != size || g.SubclusterSize() != 1<<g.SubclusterBits() || g.SubclusterSize() < format.SectorSize ||
			g.Subclusters() != map[bool]uint64{false: 1, true: 32}[g.ExtendedL2] {
			t.Errorf("%+v: %d subclusters of %d bytes", g, g.Subclusters(), g.SubclusterSize())
		}
		if g.L2Entries()*g.L2EntrySize() != size || g.L2EntrySize() != map[bool]uint64{false: 8, true: 16}[g.ExtendedL2] || g.L2Span() != g.L2Entries()*size {
			t.Errorf("%+v: an L2 table of %d entries spans %d", g, g.L2Entries(), g.L2Span())
		}
		if g.BlockEntries()*uint64(g.RefcountBits()) != size*8 || g.BlockEntries() != 1<<g.BlockBits() {
			t.Errorf("%+v: %d entries in a block", g, g.BlockEntries())
		}
		if want := new(big.Int).Sub(new(big.Int).Lsh(big.NewInt(1), g.RefcountBits()), big.NewInt(1)); want.Uint64() != g.MaxRefcount() {
			t.Errorf("%+v: maximum %d", g, g.MaxRefcount())
		}
		if size := g.MaxVirtualSize(); size%format.SectorSize != 0 || g.L1EntriesFor(size)*format.EntrySize > format.MaxL1Bytes {
			t.Errorf("%+v: %d bytes need an L1 table of %d entries", g, size, g.L1EntriesFor(size))
		}
	}
}

// TestAddressesComposeAgain splits guest offsets into indexes and puts them together again.
func TestAddressesComposeAgain(t *testing.T) {
	for _, g := range geometries() {
		for _, off := range []uint64{0, 1, 511, 512, g.ClusterSize() - 1, g.ClusterSize(), g.L2Span() - 1, g.L2Span(), g.L2Span() + 1, 1<<61 + 12345} {
			o := format.GuestOffset(off)
			if back := g.L1Index(o)*g.L2Span() + g.L2Index(o)*g.ClusterSize() + g.InCluster(o); back != off {
				t.Errorf("%+v: %#x became %#x", g, off, back)
			}
			if back := g.SubclusterIndex(o)*g.SubclusterSize() + g.InSubcluster(o); back != g.InCluster(o) {
				t.Errorf("%+v: %#x became %#x in its cluster", g, g.InCluster(o), back)
			}
			h := format.HostOffset(off)
			start := g.OffsetOf(g.ClusterOf(h))
			if start > h || uint64(h-start) >= g.ClusterSize() || !g.Aligned(start) || g.Aligned(h) != (start == h) {
				t.Errorf("%+v: %#x is in the cluster at %#x", g, off, start)
			}
		}
	}
}

func TestCountsRoundUp(t *testing.T) {
	for _, g := range geometries() {
		size, span := g.ClusterSize(), g.L2Span()
		for _, c := range []struct{ n, clusters, entries uint64 }{
			{0, 0, 0},
			{1, 1, 1},
			{size, 1, 1},
			{size + 1, 2, 1},
			{span, span / size, 1},
			{span + 1, span/size + 1, 2},
			{^uint64(0), ^uint64(0)/size + 1, ^uint64(0)/span + 1},
		} {
			if got := g.ClustersFor(c.n); got != c.clusters {
				t.Errorf("%+v: %d bytes are %d clusters, want %d", g, c.n, got, c.clusters)
			}
			if got := g.L1EntriesFor(c.n); got != c.entries {
				t.Errorf("%+v: %d bytes need %d L1 entries, want %d", g, c.n, got, c.entries)
			}
		}
	}
}
