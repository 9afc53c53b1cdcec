package qcow

import "github.com/qcow-csi/qcow-csi/qcow/format"

// layout places the clusters of a new image: the header, the refcount table, its blocks, the L1 table, the encryption
// header, and where the disk is preallocated the L2 tables and the data, each of them in one piece.
type layout struct {
	format.Geometry
	backed    bool   // preallocated clusters must not hide the backing file
	l1Entries uint64 // of the L1 table
	guest     uint64 // preallocated clusters of the disk

	tableAt, blocksAt, l1At, luksAt, l2At, dataAt   format.Cluster
	tableClusters, blocks, l2Clusters, dataClusters uint64
	end                                             uint64 // clusters of the file
}

func newLayout(g format.Geometry, o *CreateOptions, encryption uint64) (layout, error) {
	size := uint64(o.Size)
	l := layout{Geometry: g, backed: o.BackingFile != "", l1Entries: max(g.L1EntriesFor(size), 1), tableClusters: 1, blocks: 1}
	if o.preallocation() != PreallocationOff {
		l.guest = g.ClustersFor(size)
		l.l2Clusters = g.L1EntriesFor(size)
		if !g.DataFile {
			l.dataClusters = l.guest
		}
	}
	// Every cluster has a refcount, the refcount blocks and their table too. The numbers only ever rise, so this ends.
	for {
		at := format.Cluster(1)
		for _, part := range []struct {
			at *format.Cluster
			n  uint64
		}{
			{&l.tableAt, l.tableClusters},
			{&l.blocksAt, l.blocks},
			{&l.l1At, g.ClustersFor(l.l1Entries * format.EntrySize)},
			{&l.luksAt, g.ClustersFor(encryption)},
			{&l.l2At, l.l2Clusters},
			{&l.dataAt, l.dataClusters},
		} {
			*part.at = at
			at += format.Cluster(part.n)
		}
		l.end = uint64(at)
		blocks := (l.end + g.BlockEntries() - 1) / g.BlockEntries()
		table := g.ClustersFor(blocks * format.EntrySize)
		if blocks == l.blocks && table == l.tableClusters {
			break
		}
		l.blocks, l.tableClusters = blocks, table
	}
	if l.tableClusters<<g.ClusterBits > max(format.MaxRefcountTableBytes, g.ClusterSize()) || l.end > uint64(format.MaxHostOffset)>>g.ClusterBits {
		return l, format.Invalidf("%d bytes in clusters of %d can't be preallocated: they have more refcounts of %d bits than a refcount table leads to",
			size, g.ClusterSize(), g.RefcountBits())
	}
	return l, nil
}

// refcountTable fills b with the bytes of the refcount table from pos on.
func (l *layout) refcountTable(b []byte, pos uint64) {
	for i, entry := uint64(0), pos/format.EntrySize; i < uint64(len(b))/format.EntrySize && entry < l.blocks; i, entry = i+1, entry+1 {
		format.PutEntry(b, i, uint64(l.OffsetOf(l.blocksAt)+format.HostOffset(entry<<l.ClusterBits)))
	}
}

// refcounts fills b with the refcount blocks: every cluster up to the end of the file is in use once.
func (l *layout) refcounts(b []byte, pos uint64) {
	first := pos * 8 >> l.RefcountOrder
	for i := range min(uint64(len(b))*8>>l.RefcountOrder, max(l.end, first)-first) {
		format.PutRefcount(b, l.RefcountOrder, i, 1)
	}
}

// l1Table fills b with the L1 table.
func (l *layout) l1Table(b []byte, pos uint64) {
	for i, entry := uint64(0), pos/format.EntrySize; i < uint64(len(b))/format.EntrySize && entry < l.l2Clusters; i, entry = i+1, entry+1 {
		format.PutEntry(b, i, uint64(format.NewL1Entry(l.OffsetOf(l.l2At+format.Cluster(entry)), true)))
	}
}

// l2Tables fills b with L2 tables: guest clusters have their host clusters in order.
func (l *layout) l2Tables(b []byte, pos uint64) {
	for i, guest := uint64(0), pos/l.L2EntrySize(); i < uint64(len(b))/l.L2EntrySize() && guest < l.guest; i, guest = i+1, guest+1 {
		at := format.HostOffset(guest << l.ClusterBits)
		if !l.DataFile {
			at += l.OffsetOf(l.dataAt)
		}
		e := preallocatedEntry(l.Geometry, at)
		if l.backed { // then there are subclusters, and each reads from the backing file until it is written
			e.Subclusters = 0
		}
		l.PutMappingEntry(b, i, e)
	}
}

// preallocatedEntry returns the entry of a cluster at host, which holds zeroes.
func preallocatedEntry(g format.Geometry, host format.HostOffset) format.MappingEntry {
	e := format.MappingEntry{L2Entry: format.NewL2Entry(host, true)}
	if g.ExtendedL2 {
		e.Subclusters = format.AllData
	}
	return e
}

// parts returns everything but the first sector, which makes a file an image.
//
// Tables are written whole, so that the disk has room for every entry that is ever set in them.
func (c *creation) parts(header []byte) []part {
	g := c.Geometry
	table := func(at format.Cluster, clusters uint64, fill func(b []byte, pos uint64)) part {
		return part{c.file, g.OffsetOf(at), clusters << g.ClusterBits, fill}
	}
	parts := []part{
		table(0, 1, func(b []byte, pos uint64) {
			copy(b, header[min(pos, uint64(len(header))):])
			if pos == 0 {
				clear(b[:format.SectorSize])
			}
		}),
		table(c.tableAt, c.tableClusters, c.refcountTable),
		table(c.blocksAt, c.blocks, c.refcounts),
		table(c.l1At, g.ClustersFor(c.l1Entries*format.EntrySize), c.l1Table),
		table(c.luksAt, g.ClustersFor(uint64(len(c.luks))), func(b []byte, pos uint64) { copy(b, c.luks[min(pos, uint64(len(c.luks))):]) }),
		table(c.l2At, c.l2Clusters, c.l2Tables),
	}
	data := dataArea{to: c.data, at: g.OffsetOf(c.dataAt), n: c.dataClusters << g.ClusterBits, cipher: c.cipher, unread: c.backed}
	if g.DataFile {
		data.at, data.n = 0, uint64(c.o.Size)
	}
	return data.appendTo(parts, c.o.preallocation())
}
