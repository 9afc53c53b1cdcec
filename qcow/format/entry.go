package format

import "encoding/binary"

// EntrySize is the size in bytes of an entry of an L1 table, a standard L2 table or a refcount table.
const EntrySize = 8

const (
	offsetMask = 0x00fffffffffffe00 // bits 9 to 55

	l1Reserved       = 0x7f000000000001ff
	l2Reserved       = 0x3f000000000001fe
	refTableReserved = 0x00000000000001ff

	flagCopied     = 1 << 63
	flagCompressed = 1 << 62
	flagZero       = 1 << 0
)

// L1Entry points to an L2 table, or to none (specification, "Cluster mapping", L1 table entry).
type L1Entry uint64

// NewL1Entry returns the entry for an L2 table at off. Copied says that the table's refcount is exactly 1.
func NewL1Entry(off HostOffset, copied bool) L1Entry {
	return L1Entry(off & offsetMask).WithCopied(copied)
}

// Offset returns where the L2 table is; 0 means that there is none.
func (e L1Entry) Offset() HostOffset { return HostOffset(e & offsetMask) }

// Copied reports whether the L2 table may be written in place: its refcount is exactly 1.
func (e L1Entry) Copied() bool { return e&flagCopied != 0 }

// WithCopied returns the entry with the COPIED flag set or cleared.
func (e L1Entry) WithCopied(copied bool) L1Entry {
	if copied {
		return e | flagCopied
	}
	return e &^ flagCopied
}

// Reserved returns the reserved bits that are set; a valid entry has none.
func (e L1Entry) Reserved() uint64 { return uint64(e) & l1Reserved }

// L2Entry maps one guest cluster (specification, L2 table entry). With extended L2 entries it is the first of two
// words, see [MappingEntry].
type L2Entry uint64

// NewL2Entry returns the entry of a standard data cluster at off. Copied says that its refcount is exactly 1.
func NewL2Entry(off HostOffset, copied bool) L2Entry {
	return L2Entry(off & offsetMask).WithCopied(copied)
}

// NewCompressedEntry returns the entry of a cluster whose compressed data is the n bytes at off, which need not be
// aligned; n is at least 1 and at most the cluster size, off below g.MaxCompressedOffset.
func NewCompressedEntry(g Geometry, off HostOffset, n uint64) L2Entry {
	more := (uint64(off)+n-1)/SectorSize - uint64(off)/SectorSize
	return L2Entry(flagCompressed | more<<g.compressedShift() | uint64(off))
}

// WithOffset returns e, a standard entry, with another host cluster.
func (e L2Entry) WithOffset(off HostOffset) L2Entry {
	return e&^offsetMask | L2Entry(off&offsetMask)
}

// ZeroPlain is the entry of a cluster that reads as zeroes and has no host cluster. There is none such with extended L2
// entries: there AllZero says it.
const ZeroPlain L2Entry = flagZero

// Kind is what an L2 entry says of its guest cluster, an extended one of a subcluster.
type Kind uint8

const (
	Unallocated     Kind = iota // no host cluster; reads from the backing file, without one as zeroes
	ZeroedPlain                 // reads as zeroes, no host cluster
	ZeroAllocated               // reads as zeroes, with a host cluster whose content is undefined
	Data                        // a standard host cluster
	Compressed                  // compressed data, not aligned to clusters
	UnallocatedHost             // a subcluster that reads as Unallocated, in a cluster that has a host cluster
)

func (k Kind) String() string {
	switch k {
	case Unallocated:
		return "unallocated"
	case ZeroedPlain:
		return "zero"
	case ZeroAllocated:
		return "zero-allocated"
	case Data:
		return "data"
	case Compressed:
		return "compressed"
	case UnallocatedHost:
		return "unallocated-host"
	}
	return "unknown"
}

// Kind classifies a standard entry of an image without an external data file; [Geometry.Kind] knows them all.
func (e L2Entry) Kind() Kind {
	switch {
	case e&flagCompressed != 0:
		return Compressed
	case e&flagZero != 0 && e.Offset() != 0:
		return ZeroAllocated
	case e&flagZero != 0:
		return ZeroedPlain
	case e.Offset() != 0:
		return Data
	}
	return Unallocated
}

// Offset returns the host cluster of an entry that has one and is not compressed.
func (e L2Entry) Offset() HostOffset { return HostOffset(e & offsetMask) }

// Copied reports whether the host cluster may be written in place: its refcount is exactly 1.
func (e L2Entry) Copied() bool { return e&flagCopied != 0 }

// WithCopied returns the entry with the COPIED flag set or cleared.
func (e L2Entry) WithCopied(copied bool) L2Entry {
	if copied {
		return e | flagCopied
	}
	return e &^ flagCopied
}

// Reserved returns the reserved bits that are set; a valid standard entry has none. Compressed entries have no
// reserved bits.
func (e L2Entry) Reserved() uint64 {
	if e&flagCompressed != 0 {
		return 0
	}
	return uint64(e) & l2Reserved
}

// compressedShift returns the number of bits of a compressed entry that hold the host offset: x in the specification,
// "Compressed Clusters Descriptor".
func (g Geometry) compressedShift() uint32 { return 62 - (g.ClusterBits - 8) }

// MaxCompressedOffset returns the bound of the host offsets that a compressed entry can hold: its data starts below.
func (g Geometry) MaxCompressedOffset() HostOffset {
	return min(1<<g.compressedShift(), MaxHostOffset)
}

// CompressedRange returns the host bytes that a Compressed entry refers to: from off, which need not be aligned,
// n bytes up to the end of the last 512-byte sector used. The data itself may end earlier.
func (e L2Entry) CompressedRange(g Geometry) (off HostOffset, n uint64) {
	x := g.compressedShift()
	off = HostOffset(uint64(e) & (1<<x - 1))
	sectors := (uint64(e)&^(flagCopied|flagCompressed))>>x + 1
	return off, sectors*SectorSize - uint64(off)%SectorSize
}

// RefcountTableEntry points to a refcount block, or to none (specification, "Host cluster management").
type RefcountTableEntry uint64

// Offset returns where the refcount block is; 0 means that there is none and its refcounts are 0.
func (e RefcountTableEntry) Offset() HostOffset { return HostOffset(uint64(e) &^ refTableReserved) }

// Reserved returns the reserved bits that are set; a valid entry has none.
func (e RefcountTableEntry) Reserved() uint64 { return uint64(e) & refTableReserved }

// Entry reads entry i of a table of 64-bit big-endian entries.
func Entry(table []byte, i uint64) uint64 { return binary.BigEndian.Uint64(table[i*EntrySize:]) }

// PutEntry writes entry i of a table of 64-bit big-endian entries.
func PutEntry(table []byte, i, v uint64) { binary.BigEndian.PutUint64(table[i*EntrySize:], v) }
