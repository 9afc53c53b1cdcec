package format

import "math/bits"

// GuestOffset is a byte offset in the virtual disk.
type GuestOffset uint64

// HostOffset is a byte offset in the image file.
type HostOffset uint64

// Cluster is the number of a host cluster: its host offset divided by the cluster size.
type Cluster uint64

// Geometry is what the addresses of an image are computed from, and its L2 entries read by.
type Geometry struct {
	ClusterBits   uint32 // log2 of the cluster size, 9 to 21
	RefcountOrder uint32 // log2 of the refcount width in bits, 0 to 6
	ExtendedL2    bool   // L2 entries are 16 bytes wide and map 32 subclusters each
	DataFile      bool   // guest clusters are in an external data file, where offset 0 is as good as any other
}

// ClusterSize returns the cluster size in bytes.
func (g Geometry) ClusterSize() uint64 { return 1 << g.ClusterBits }

// RefcountBits returns the width of a refcount in bits.
func (g Geometry) RefcountBits() uint { return 1 << g.RefcountOrder }

// MaxRefcount returns the largest refcount that the width can hold.
func (g Geometry) MaxRefcount() uint64 { return ^uint64(0) >> (64 - g.RefcountBits()) }

// L2EntrySize returns the size of an L2 entry in bytes: EntrySize, or twice that with extended L2 entries.
func (g Geometry) L2EntrySize() uint64 {
	if g.ExtendedL2 {
		return 2 * EntrySize
	}
	return EntrySize
}

// L2Bits returns log2 of the number of entries of an L2 table, which fills one cluster.
func (g Geometry) L2Bits() uint32 {
	if g.ExtendedL2 {
		return g.ClusterBits - 4
	}
	return g.ClusterBits - 3
}

// L2Entries returns the number of entries of an L2 table.
func (g Geometry) L2Entries() uint64 { return 1 << g.L2Bits() }

// L2Span returns the number of guest bytes that one L2 table maps.
func (g Geometry) L2Span() uint64 { return 1 << (g.ClusterBits + g.L2Bits()) }

// L1Index returns the index of the L1 entry that maps off.
func (g Geometry) L1Index(off GuestOffset) uint64 { return uint64(off) >> (g.ClusterBits + g.L2Bits()) }

// L2Index returns the index, in its L2 table, of the entry that maps off.
func (g Geometry) L2Index(off GuestOffset) uint64 {
	return uint64(off) >> g.ClusterBits & (g.L2Entries() - 1)
}

// InCluster returns the offset of off within its guest cluster.
func (g Geometry) InCluster(off GuestOffset) uint64 { return uint64(off) & (g.ClusterSize() - 1) }

// Subclusters returns how many subclusters a cluster has: 32 with extended L2 entries, else 1, which is the
// cluster itself.
func (g Geometry) Subclusters() uint64 { return 1 << (g.ClusterBits - g.SubclusterBits()) }

// SubclusterBits returns log2 of the subcluster size.
func (g Geometry) SubclusterBits() uint32 {
	if g.ExtendedL2 {
		return g.ClusterBits - 5
	}
	return g.ClusterBits
}

// SubclusterSize returns the subcluster size in bytes.
func (g Geometry) SubclusterSize() uint64 { return 1 << g.SubclusterBits() }

// SubclusterIndex returns the index, in its cluster, of the subcluster that holds off.
func (g Geometry) SubclusterIndex(off GuestOffset) uint64 {
	return uint64(off) >> g.SubclusterBits() & (g.Subclusters() - 1)
}

// InSubcluster returns the offset of off within its subcluster.
func (g Geometry) InSubcluster(off GuestOffset) uint64 { return uint64(off) & (g.SubclusterSize() - 1) }

// L1EntriesFor returns how many L1 entries a virtual disk of size bytes needs.
func (g Geometry) L1EntriesFor(size uint64) uint64 {
	span := g.L2Span()
	n := size / span
	if size%span != 0 {
		n++
	}
	return n
}

// ClustersFor returns how many clusters n bytes fill, the last one perhaps in part.
func (g Geometry) ClustersFor(n uint64) uint64 {
	c := n >> g.ClusterBits
	if n&(g.ClusterSize()-1) != 0 {
		c++
	}
	return c
}

// Aligned reports whether off is the start of a cluster.
func (g Geometry) Aligned(off HostOffset) bool { return uint64(off)&(g.ClusterSize()-1) == 0 }

// ClusterOf returns the host cluster that holds off.
func (g Geometry) ClusterOf(off HostOffset) Cluster { return Cluster(off >> g.ClusterBits) }

// OffsetOf returns the first byte of a host cluster.
func (g Geometry) OffsetOf(c Cluster) HostOffset { return HostOffset(c) << g.ClusterBits }

// BlockEntries returns how many refcounts one refcount block, which fills a cluster, holds.
func (g Geometry) BlockEntries() uint64 { return 1 << g.BlockBits() }

// BlockBits returns log2 of BlockEntries.
func (g Geometry) BlockBits() uint32 { return g.ClusterBits + 3 - g.RefcountOrder }

// MaxVirtualSize returns the largest virtual size in bytes that an L1 table of MaxL1Bytes can map, at most the
// largest multiple of a sector below 2^63.
func (g Geometry) MaxVirtualSize() uint64 {
	const limit = uint64(1)<<63 - SectorSize
	hi, lo := bits.Mul64(MaxL1Bytes/EntrySize, g.L2Span())
	if hi != 0 || lo > limit {
		return limit
	}
	return lo
}
