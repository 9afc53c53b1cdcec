package qcow

import (
	"iter"

	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/luks"
)

// Measurement is how large the file of an image becomes.
type Measurement struct {
	Required       int64 // bytes with the source stored; the tables are counted as if every cluster had data
	FullyAllocated int64 // bytes when the guest has written to every cluster
}

// Measure computes the largest length that the file of an image with the properties of o can reach, without internal snapshots and
// persistent bitmaps. It shall hold what source describes in ascending order and without overlaps, as [Image.Extents] does, of which only
// ExtentData and ExtentCompressed take space; with nil, nothing yet. On top of a backing file any cluster of the source may have to be stored,
// and counts. The numbers are exactly those of qemu-img measure -O qcow2. It fails with ErrInvalid on options that no image
// can have, and with whatever error the source ends with.
func Measure(o CreateOptions, source iter.Seq2[Extent, error]) (Measurement, error) {
	g, err := o.geometry()
	if err != nil {
		return Measurement{}, err
	}
	encryption := uint64(0)
	if o.Encryption != nil {
		if encryption, err = luks.HeaderSize(o.Encryption.CreateOptions); err != nil {
			return Measurement{}, err
		}
	}
	guest := g.ClustersFor(uint64(o.Size))
	stored := uint64(0)
	switch {
	case o.Preallocation > PreallocationMetadata, o.BackingFile != "" && source != nil:
		stored = guest
	case source != nil:
		if stored, err = storedClusters(g, source); err != nil {
			return Measurement{}, err
		}
	}
	overhead := tableClusters(g, guest) + g.ClustersFor(encryption)
	return Measurement{
		Required:       int64((overhead + stored) << g.ClusterBits),
		FullyAllocated: int64((overhead + guest) << g.ClusterBits),
	}, nil
}

// storedClusters counts the guest clusters in which a source has data.
func storedClusters(g format.Geometry, source iter.Seq2[Extent, error]) (n uint64, err error) {
	counted := uint64(0) // clusters below this one are
	for e, err := range source {
		if err != nil {
			return 0, err
		}
		if e.Length <= 0 || e.Kind != ExtentData && e.Kind != ExtentCompressed {
			continue
		}
		first := max(uint64(e.Offset)>>g.ClusterBits, counted)
		if end := g.ClustersFor(uint64(e.Offset + e.Length)); end > first {
			n += end - first
			counted = end
		}
	}
	return n, nil
}

// tableClusters counts the clusters of header and tables for an image whose guest clusters all have host clusters.
func tableClusters(g format.Geometry, guest uint64) uint64 {
	l2 := (guest + g.L2Entries() - 1) >> g.L2Bits()
	l1 := g.ClustersFor(l2 * format.EntrySize)
	described := 1 + l1 + l2 + guest
	// Refcount table and blocks describe themselves too.
	var table, blocks uint64
	for {
		n := (described + table + blocks + g.BlockEntries() - 1) >> g.BlockBits()
		if n == blocks {
			return 1 + l1 + l2 + table + blocks
		}
		table, blocks = g.ClustersFor(n*format.EntrySize), n
	}
}
