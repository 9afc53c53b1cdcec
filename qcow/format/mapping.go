package format

import "fmt"

// Subclusters is the second word of an extended L2 entry (specification, "Extended L2 Entries"): bit i says that
// subcluster i has its data in the host cluster, bit 32+i that it reads as zeroes.
type Subclusters uint64

const (
	AllData Subclusters = 1<<32 - 1     // every subcluster has data
	AllZero Subclusters = AllData << 32 // every subcluster reads as zeroes
)

// subclusters returns the allocation bits of n subclusters from first on.
func subclusters(first, n uint64) Subclusters { return (1<<n - 1) << first & AllData }

// Allocated reports whether subcluster i has its data in the host cluster.
func (b Subclusters) Allocated(i uint64) bool { return b>>i&1 != 0 }

// Zero reports whether subcluster i reads as zeroes.
func (b Subclusters) Zero(i uint64) bool { return b>>(32+i)&1 != 0 }

// WithData returns b with data in n subclusters from first on.
func (b Subclusters) WithData(first, n uint64) Subclusters {
	return b.WithNothing(first, n) | subclusters(first, n)
}

// WithZero returns b with zeroes in n subclusters from first on.
func (b Subclusters) WithZero(first, n uint64) Subclusters {
	return b.WithNothing(first, n) | subclusters(first, n)<<32
}

// WithNothing returns b with n subclusters from first on unallocated: they read from the backing file.
func (b Subclusters) WithNothing(first, n uint64) Subclusters {
	m := subclusters(first, n)
	return b &^ (m | m<<32)
}

// Invalid returns a bit for each subcluster that is marked as both data and zeroes; a valid word has none.
func (b Subclusters) Invalid() uint32 { return uint32(b) & uint32(b>>32) }

// MappingEntry is an L2 entry of either width. Subclusters is 0 and without meaning unless the image has extended L2 entries.
type MappingEntry struct {
	L2Entry
	Subclusters Subclusters
}

// MappingEntry reads entry i of an L2 table, or of a part of one that begins with its entry 0.
func (g Geometry) MappingEntry(table []byte, i uint64) MappingEntry {
	if g.ExtendedL2 {
		return MappingEntry{L2Entry(Entry(table, 2*i)), Subclusters(Entry(table, 2*i+1))}
	}
	return MappingEntry{L2Entry: L2Entry(Entry(table, i))}
}

// PutMappingEntry writes entry i of an L2 table, or of a part of one that begins with its entry 0.
func (g Geometry) PutMappingEntry(table []byte, i uint64, e MappingEntry) {
	if !g.ExtendedL2 {
		PutEntry(table, i, uint64(e.L2Entry))
		return
	}
	PutEntry(table, 2*i, uint64(e.L2Entry))
	PutEntry(table, 2*i+1, uint64(e.Subclusters))
}

// HasHost reports whether a standard entry has a host cluster, at e.Offset(). In a data file it may be the one at offset 0:
// there COPIED, which every cluster has, tells it from none.
func (g Geometry) HasHost(e MappingEntry) bool {
	switch {
	case e.L2Entry&flagCompressed != 0:
		return false
	case e.Offset() != 0:
		return true
	}
	return g.DataFile && e.Copied() && (g.ExtendedL2 || e.L2Entry&flagZero == 0)
}

// MayBeCopied reports whether the entry of the guest cluster at guest may have COPIED, as far as the entry says: one with a
// host cluster; and the zero cluster at offset 0 of a data file, which is how QEMU leaves the first cluster when it zeroes
// it in place. QEMU reads that one, and so do we, as without a host cluster, which in a data file makes no difference.
func (g Geometry) MayBeCopied(e MappingEntry, guest GuestOffset) bool {
	if g.HasHost(e) {
		return true
	}
	return g.DataFile && !g.ExtendedL2 && guest == 0 && e.Offset() == 0 && e.L2Entry&flagZero != 0
}

// Kind classifies subcluster sub of a valid entry ([Geometry.CheckEntry]), which is 0 for the whole cluster
// without extended L2 entries.
func (g Geometry) Kind(e MappingEntry, sub uint64) Kind {
	if e.L2Entry&flagCompressed != 0 {
		return Compressed
	}
	data, zero := true, e.L2Entry&flagZero != 0
	if g.ExtendedL2 {
		data, zero = e.Subclusters.Allocated(sub), e.Subclusters.Zero(sub)
	}
	host := g.HasHost(e)
	switch {
	case zero && host:
		return ZeroAllocated
	case zero:
		return ZeroedPlain
	case host && data:
		return Data
	case host:
		return UnallocatedHost
	}
	return Unallocated
}

// CheckEntry says what is wrong with an entry taken by itself, or "" when nothing is. It does not judge what needs more
// than the entry: COPIED, where the file ends, and the zero flag of a version 2 image.
func (g Geometry) CheckEntry(e MappingEntry) string {
	if e.L2Entry&flagCompressed != 0 {
		switch {
		case g.DataFile:
			return "compressed cluster in an image with an external data file"
		case e.Subclusters != 0:
			return fmt.Sprintf("compressed cluster with subclusters %#x", uint64(e.Subclusters))
		}
		return ""
	}
	reserved := e.Reserved()
	if g.ExtendedL2 {
		reserved |= uint64(e.L2Entry) & flagZero
	}
	switch {
	case reserved != 0:
		return fmt.Sprintf("reserved bits %#x are set", reserved)
	case !g.Aligned(e.Offset()):
		return fmt.Sprintf("points to %#x, which is not the start of a cluster", uint64(e.Offset()))
	case !g.ExtendedL2:
		return ""
	case e.Subclusters.Invalid() != 0:
		return fmt.Sprintf("subclusters %#x are both data and zeroes", e.Subclusters.Invalid())
	case e.Subclusters&AllData != 0 && !g.HasHost(e):
		return fmt.Sprintf("subclusters %#x have data without a host cluster", uint64(e.Subclusters&AllData))
	}
	return ""
}
