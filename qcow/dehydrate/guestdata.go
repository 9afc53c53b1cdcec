package dehydrate

import (
	"cmp"
	"context"
	"slices"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// leaveOutGuestData adds the tables that other tables name, except where an L2 table says that guest data is there.
func (d *dehydrator) leaveOutGuestData(ctx context.Context) error {
	d.tables = d.tables.merged()
	if !d.known() {
		return nil
	}
	if d.o.Ambiguous || d.DataFile { // with a data file no guest data is in this one
		d.ranges = append(d.ranges, d.tables...)
		return nil
	}
	d.compact()
	guest := make(map[uint64]bool) // clusters of tables that are guest data too
	b := make([]byte, d.ClusterSize())
	for _, off := range d.l2Tables {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := d.read("L2 table", b, off); err != nil {
			return err
		}
		for i := range d.L2Entries() {
			if e := d.MappingEntry(b, i); e.L2Entry != 0 {
				d.markGuestData(e, guest)
			}
		}
	}
	for _, x := range d.tables {
		d.addExcept(x, guest)
	}
	return nil
}

// markGuestData notes the clusters of tables in which an L2 entry has guest data.
func (d *dehydrator) markGuestData(e format.MappingEntry, guest map[uint64]bool) {
	off, n := uint64(e.Offset()), d.ClusterSize()
	if e.Kind() == format.Compressed {
		o, length := e.CompressedRange(d.Geometry)
		off, n = uint64(o), length
	}
	if off == 0 && e.Kind() != format.Compressed {
		return
	}
	for cl := off >> d.ClusterBits; cl <= (off+n-1)>>d.ClusterBits; cl++ {
		if d.tables.meets(cl<<d.ClusterBits, d.ClusterSize()) {
			guest[cl] = true
		}
	}
}

// meets reports whether one of the places, which are merged, has a byte in common with n bytes at off.
func (r ranges) meets(off, n uint64) bool {
	i, found := slices.BinarySearchFunc(r, off, func(x bytesAt, off uint64) int { return cmp.Compare(x.off, off) })
	if found || i < len(r) && r[i].off < off+n {
		return true
	}
	return i > 0 && r[i-1].off+r[i-1].n > off
}

// addExcept adds the clusters of x that are not guest data.
func (d *dehydrator) addExcept(x bytesAt, guest map[uint64]bool) {
	for x.n > 0 {
		cl := x.off >> d.ClusterBits
		n := min(x.n, (cl+1)<<d.ClusterBits-x.off)
		if guest[cl] {
			d.leftOut("table", x.off, "it is guest data too")
		} else {
			d.ranges.add(x.off, n)
		}
		x.off, x.n = x.off+n, x.n-n
	}
}
