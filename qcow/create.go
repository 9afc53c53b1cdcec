package qcow

import (
	"fmt"
	"math/bits"

	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// CreateOptions are the properties of a new image. The zero value of each field but Size asks for the default.
type CreateOptions struct {
	Size         int64 // virtual size in bytes, a multiple of 512; 0 is allowed
	ClusterSize  int   // bytes, a power of two from 512 to 2 MiB; default 64 KiB
	RefcountBits int   // 1, 2, 4, 8, 16, 32 or 64; default 16
}

// geometry checks the options and returns what follows from them.
func (o CreateOptions) geometry() (format.Geometry, error) {
	g := format.Geometry{ClusterBits: format.DefaultClusterBits, RefcountOrder: format.DefaultRefcountOrder}
	if c := o.ClusterSize; c != 0 {
		if c < 1<<format.MinClusterBits || c > 1<<format.MaxClusterBits || bits.OnesCount(uint(c)) != 1 {
			return g, format.Invalidf("cluster size %d is not a power of two from %d to %d", c, 1<<format.MinClusterBits, 1<<format.MaxClusterBits)
		}
		g.ClusterBits = uint32(bits.TrailingZeros(uint(c)))
	}
	if r := o.RefcountBits; r != 0 {
		if r < 1 || r > 1<<format.MaxRefcountOrder || bits.OnesCount(uint(r)) != 1 {
			return g, format.Invalidf("refcount width %d is not a power of two from 1 to %d", r, 1<<format.MaxRefcountOrder)
		}
		g.RefcountOrder = uint32(bits.TrailingZeros(uint(r)))
	}
	if o.Size < 0 || o.Size%format.SectorSize != 0 || uint64(o.Size) > g.MaxVirtualSize() {
		return g, format.Invalidf("size %d is negative, not a multiple of %d, or exceeds the limit of %d for clusters of %d bytes", o.Size, format.SectorSize, g.MaxVirtualSize(), g.ClusterSize())
	}
	return g, nil
}

// Create formats f, which must be empty, as a version 3 image without any guest cluster. The image is durable when Create returns
// nil; before that f has no header, so a torn image is never taken for one. It fails with ErrInvalid on options that no
// image can have.
func Create(f storage.File, o CreateOptions) error {
	g, err := o.geometry()
	if err != nil {
		return err
	}
	if size, err := f.Size(); err != nil || size != 0 {
		return errorOr(err, format.Invalidf("the file is not empty: it has %d bytes", size))
	}
	l := newLayout(g, uint64(o.Size))
	header, err := l.header(uint64(o.Size))
	if err != nil {
		return err
	}
	// All but the header is made first, and made durable.
	if err := f.Truncate(int64(l.end << g.ClusterBits)); err != nil {
		return fmt.Errorf("create image: %w", err)
	}
	for _, part := range l.tables() {
		if _, err := f.WriteAt(part.b, int64(g.OffsetOf(part.at))); err != nil {
			return fmt.Errorf("create image: %w", err)
		}
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("create image: %w", err)
	}
	if _, err := f.WriteAt(header, 0); err != nil {
		return fmt.Errorf("create image: %w", err)
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("create image: %w", err)
	}
	return nil
}

func errorOr(err, otherwise error) error {
	if err != nil {
		return err
	}
	return otherwise
}

// layout places the clusters of a new image: the header, the refcount table, its blocks, the L1 table.
type layout struct {
	format.Geometry
	tableClusters, blocks, l1Clusters, l1Entries, end uint64
}

func newLayout(g format.Geometry, size uint64) layout {
	l := layout{Geometry: g, tableClusters: 1, blocks: 1, l1Entries: max(g.L1EntriesFor(size), 1)}
	l.l1Clusters = g.ClustersFor(l.l1Entries * format.EntrySize)
	for {
		l.end = 1 + l.tableClusters + l.blocks + l.l1Clusters
		blocks := (l.end + g.BlockEntries() - 1) / g.BlockEntries()
		table := g.ClustersFor(blocks * format.EntrySize)
		if blocks == l.blocks && table == l.tableClusters {
			return l
		}
		l.blocks, l.tableClusters = blocks, table
	}
}

func (l layout) tableAt() format.Cluster { return 1 }
func (l layout) blocksAt() format.Cluster {
	return l.tableAt() + format.Cluster(l.tableClusters)
}
func (l layout) l1At() format.Cluster { return l.blocksAt() + format.Cluster(l.blocks) }

func (l layout) header(size uint64) ([]byte, error) {
	h := format.Header{
		Geometry:              l.Geometry,
		Size:                  size,
		L1Entries:             uint32(l.l1Entries),
		L1Offset:              l.OffsetOf(l.l1At()),
		RefcountTableOffset:   l.OffsetOf(l.tableAt()),
		RefcountTableClusters: uint32(l.tableClusters),
		Extensions:            []format.Extension{format.FeatureNames()},
	}
	return h.Encode()
}

type tablePart struct {
	at format.Cluster
	b  []byte
}

// tables returns the tables. They are written whole, so that the disk has room for every entry that is ever set in them.
func (l layout) tables() []tablePart {
	table := make([]byte, l.tableClusters<<l.ClusterBits)
	parts := []tablePart{{l.tableAt(), table}, {l.l1At(), make([]byte, l.l1Clusters<<l.ClusterBits)}}
	for i := range l.blocks {
		at := l.blocksAt() + format.Cluster(i)
		format.PutEntry(table, i, uint64(l.OffsetOf(at)))
		block := make([]byte, l.ClusterSize())
		for k := range min(l.BlockEntries(), l.end-i*l.BlockEntries()) {
			format.PutRefcount(block, l.RefcountOrder, k, 1)
		}
		parts = append(parts, tablePart{at, block})
	}
	return parts
}
