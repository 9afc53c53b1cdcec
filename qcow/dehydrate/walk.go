package dehydrate

import (
	"context"
	"encoding/binary"
	"slices"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// inFile returns how much of the n bytes at off is in the file, and notes what is not.
func (d *dehydrator) inFile(table string, off, n uint64) (start, length uint64) {
	switch {
	case n == 0:
		return off, 0
	case !d.Aligned(format.HostOffset(off)):
		d.leftOut(table, off, "not the start of a cluster")
		return off, 0
	case off >= d.size:
		d.leftOut(table, off, "outside the file of %d bytes", d.size)
		return off, 0
	case n > d.size-off:
		if d.ClustersFor(off+n) > d.ClustersFor(d.size) { // else only the end of the last cluster is missing
			d.leftOut(table, off, "%d of %d bytes are outside the file", n-(d.size-off), n)
		}
		n = d.size - off
	}
	return off, n
}

// known reports whether there is a header to start from.
func (d *dehydrator) known() bool { return d.ClusterBits != 0 }

// walkRefcounts adds the refcount table and its blocks.
func (d *dehydrator) walkRefcounts(ctx context.Context) error {
	if !d.known() {
		return nil
	}
	off, n := d.inFile("refcount table", d.header.refTable, min(d.header.refBytes, format.MaxRefcountTableBytes))
	d.ranges.add(off, n)
	return d.entries(ctx, "refcount table", off, n, func(e uint64) {
		d.addTable("refcount block", uint64(format.RefcountTableEntry(e).Offset()))
	})
}

// addTable adds a table of one cluster that another table names, if it is where one can be.
func (d *dehydrator) addTable(table string, off uint64) bool {
	if off == 0 {
		return false
	}
	off, n := d.inFile(table, off, d.ClusterSize())
	d.tables.add(off, n)
	return n > 0
}

// mayWalk reports whether n more bytes of tables are worth walking. In an image they are not more than the file has;
// tables that lie on each other can be more.
func (d *dehydrator) mayWalk(table string, off, n uint64) bool {
	const reserve = 64 << 20
	if n > d.size+reserve-min(d.walked, d.size+reserve) {
		d.leftOut(table, off, "the tables are longer than the file")
		return false
	}
	d.walked += n
	return true
}

// walkL1Tables adds the L1 tables of the disk and the snapshots, and the L2 tables that they name.
func (d *dehydrator) walkL1Tables(ctx context.Context) error {
	if !d.known() {
		return nil
	}
	off, n := d.inFile("L1 table", d.header.l1, min(d.header.l1Bytes, format.MaxL1Bytes))
	d.ranges.add(off, n)
	if err := d.walkL1(ctx, "L1 table", off, n); err != nil {
		return err
	}
	return d.walkSnapshots(ctx)
}

func (d *dehydrator) walkL1(ctx context.Context, table string, off, n uint64) error {
	if !d.mayWalk(table, off, n) {
		return nil
	}
	return d.entries(ctx, table, off, n, func(e uint64) {
		l2 := uint64(format.L1Entry(e).Offset())
		if d.addTable("L2 table", l2) {
			d.l2Tables = append(d.l2Tables, l2)
			if len(d.l2Tables) >= 2*d.distinctL2 {
				d.compact()
			}
		}
	})
}

// compact forgets tables that were named before: many entries may name one.
func (d *dehydrator) compact() {
	const small = 1 << 16
	slices.Sort(d.l2Tables)
	d.l2Tables = slices.Compact(d.l2Tables)
	d.distinctL2 = max(len(d.l2Tables), small)
	d.tables = d.tables.merged()
}

// walkSnapshots adds the snapshot table and what its entries name. Where an entry cannot be decoded those behind it
// cannot be found.
func (d *dehydrator) walkSnapshots(ctx context.Context) error {
	const fixed, align = 40, 8
	count := d.header.snapshots
	if count == 0 {
		return nil
	}
	// Only its entries tell how long the table is. Where the end of the last cluster is missing they go on with zeroes.
	start, inFile := d.inFile("snapshot table", d.header.snapshotTable, min(format.MaxSnapshotTableBytes, d.size-min(d.header.snapshotTable, d.size)))
	rest := uint64(0)
	if inFile > 0 {
		rest = min(format.MaxSnapshotTableBytes, d.ClustersFor(d.size)<<d.ClusterBits-start)
	}
	used := uint64(0)
	for i := range count {
		at := (used + align - 1) &^ (align - 1)
		b := make([]byte, fixed)
		if i >= format.MaxSnapshots || at+fixed > rest {
			d.leftOut("snapshot table", start+at, "entries %d to %d", i, count-1)
			break
		}
		if err := d.read("snapshot table", b, start+at); err != nil {
			return err
		}
		size := fixed + uint64(binary.BigEndian.Uint32(b[36:])) + uint64(binary.BigEndian.Uint16(b[12:])) + uint64(binary.BigEndian.Uint16(b[14:]))
		if size > rest-at {
			used = at + fixed // so that what is wrong can be seen
			d.leftOut("snapshot table", start+at, "entry %d has %d bytes", i, size)
			break
		}
		used = at + size
		n := min(uint64(binary.BigEndian.Uint32(b[8:]))*format.EntrySize, format.MaxL1Bytes)
		l1, n := d.inFile("snapshot L1 table", binary.BigEndian.Uint64(b), n)
		d.tables.add(l1, n)
		if err := d.walkL1(ctx, "snapshot L1 table", l1, n); err != nil {
			return err
		}
	}
	d.ranges.add(start, min(used, inFile))
	return nil
}

// walkBitmaps adds the bitmaps, if the header vouches for them: what it does not vouch for may be guest data by now.
func (d *dehydrator) walkBitmaps(ctx context.Context) error {
	h := d.header.decoded
	if h == nil || h.Autoclear&format.AutoclearBitmaps == 0 {
		return nil
	}
	ext, err := h.Bitmaps()
	if err != nil {
		d.leftOut("bitmaps", 0, "%v", err)
		return nil
	}
	if ext == nil {
		return nil
	}
	off, n := d.inFile("bitmap directory", uint64(ext.DirectoryOffset), ext.DirectorySize)
	d.ranges.add(off, n)
	b := make([]byte, n)
	if err := d.read("bitmap directory", b, off); err != nil {
		return err
	}
	list, err := format.DecodeBitmaps(b, ext.Count)
	if err != nil {
		d.leftOut("bitmaps", off, "%v", err)
	}
	for i := range list {
		m := &list[i]
		off, n := d.inFile("bitmap table", uint64(m.TableOffset), uint64(m.TableEntries)*format.EntrySize)
		d.tables.add(off, n)
		if !d.mayWalk("bitmap table", off, n) {
			continue
		}
		err := d.entries(ctx, "bitmap table", off, n, func(e uint64) {
			d.addTable("bitmap", uint64(format.BitmapTableEntry(e).Offset()))
		})
		if err != nil {
			return err
		}
		d.tables = d.tables.merged()
	}
	return nil
}
