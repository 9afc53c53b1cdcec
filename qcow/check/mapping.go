package check

import (
	"context"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

func (c *checker) walkActiveL1(ctx context.Context) error {
	n, err := c.referTable(ctx, L1Table, c.h.L1Offset, c.h.L1Bytes(), HeaderCluster, 40)
	if err != nil {
		return err
	}
	err = c.walkL1(ctx, L1Table, c.h.L1Offset, n)
	c.activeL2s = len(c.l2Tables)
	return err
}

// l2Table is an L2 table, and the index of the first L1 entry that refers to it: of the active L1 table if that one does.
type l2Table struct {
	off   format.HostOffset
	index uint64
}

const l2TableSize = 16 // bytes of memory

// walkL1 counts a reference to each L2 table of the n bytes of an L1 table at start, and lists the tables that were not
// known before in c.l2Tables.
func (c *checker) walkL1(ctx context.Context, t Table, start format.HostOffset, n uint64) error {
	return c.stream(ctx, t, start, n, func(at format.HostOffset, b []byte) error {
		for i := range uint64(len(b)) / format.EntrySize {
			e := format.L1Entry(format.Entry(b, i))
			if e == 0 {
				continue
			}
			at := at + format.HostOffset(i*format.EntrySize)
			if err := c.walkL1Entry(t, at, uint64(at-start)/format.EntrySize, e); err != nil {
				return err
			}
		}
		return nil
	})
}

func (c *checker) walkL1Entry(t Table, at format.HostOffset, index uint64, e format.L1Entry) error {
	if e.Reserved() != 0 {
		c.found(ReservedBits, t, at, "entry %#x", uint64(e))
	}
	off := e.Offset()
	switch {
	case off == 0:
		if e.Copied() {
			c.found(CopiedSet, t, at, "entry %#x has no L2 table", uint64(e))
		}
		return nil
	case !c.h.Aligned(off):
		c.found(Misaligned, t, at, "L2 table at %#x", uint64(off))
		return nil
	case uint64(off) >= c.size:
		c.found(OutsideFile, t, at, "L2 table at %#x, file of %d bytes", uint64(off), c.size)
		return nil
	}
	before, stored, err := c.refer(L2Table, uint64(c.h.ClusterOf(off)), 1)
	if err != nil {
		return err
	}
	if before == Nothing {
		c.l2Tables = append(c.l2Tables, l2Table{off, index})
	}
	if t == L1Table { // the flags in a snapshot's tables mean nothing until they are active again
		c.checkCopied(t, at, e.Copied(), stored, L2Table)
	}
	return nil
}

// checkCopied compares the COPIED flag of an entry with the stored refcount of the cluster that it refers to.
func (c *checker) checkCopied(t Table, at format.HostOffset, copied bool, stored uint64, target Table) {
	switch {
	case copied && stored != 1:
		c.found(CopiedSet, t, at, "%v with refcount %d", target, stored)
	case !copied && stored == 1:
		c.found(CopiedMissing, t, at, "%v with refcount 1", target)
	}
}

// walkL2Tables walks every L2 table once. What it refers to counts as often as the table is referred to itself.
func (c *checker) walkL2Tables(ctx context.Context) error {
	for i, t := range c.l2Tables {
		if err := ctx.Err(); err != nil {
			return err
		}
		p, j, err := c.page(uint64(c.h.ClusterOf(t.off)))
		if err != nil {
			return err
		}
		times := uint64(p.refs[j] & maxReferences)
		if err := c.readTable(L2Table, t.off, c.h.ClusterSize()); err != nil {
			return err
		}
		if err := c.walkL2(t, times, i < c.activeL2s); err != nil {
			return err
		}
	}
	return nil
}

// walkL2 counts the references of the L2 table t, whose bytes are in c.table and which is itself referred to n times.
func (c *checker) walkL2(t l2Table, n uint64, active bool) error {
	g := c.h.Geometry
	var next format.HostOffset // where the next data cluster is if it is not fragmented
	for i := range g.L2Entries() {
		e := g.MappingEntry(c.table, i)
		if e == (format.MappingEntry{}) {
			continue
		}
		at := t.off + format.HostOffset(i*g.L2EntrySize())
		guest := format.GuestOffset(t.index*g.L2Span() + i<<g.ClusterBits)
		counts := c.checkEntry(at, e, guest)
		switch {
		case !counts:
		case g.HasHost(e):
			if active {
				c.report.AllocatedClusters++
				if next != 0 && e.Offset() != next {
					c.report.FragmentedClusters++
				}
				next = e.Offset() + format.HostOffset(g.ClusterSize())
			}
			if err := c.walkData(at, e, guest, n, active); err != nil {
				return err
			}
		case e.Kind() == format.Compressed:
			if active {
				c.report.AllocatedClusters++
				c.report.CompressedClusters++
				c.report.FragmentedClusters++
			}
			if err := c.walkCompressed(at, e.L2Entry, n); err != nil {
				return err
			}
		}
	}
	return nil
}

// checkEntry judges what an L2 entry, at the offset `at` and of the guest cluster at guest, says of itself. It reports whether what it points to, if
// anything, counts.
func (c *checker) checkEntry(at format.HostOffset, e format.MappingEntry, guest format.GuestOffset) bool {
	compressed := e.Kind() == format.Compressed
	reserved := e.Reserved()
	if !compressed && (c.h.ExtendedL2 || c.h.Version == 2) {
		reserved |= uint64(e.L2Entry & format.ZeroPlain) // the flag came with version 3, and left with subclusters
	}
	if reserved != 0 {
		c.found(ReservedBits, L2Table, at, "entry %#x", uint64(e.L2Entry))
	}
	if e.Copied() && !c.h.MayBeCopied(e, guest) {
		c.found(CopiedSet, L2Table, at, "entry %#x of kind %v", uint64(e.L2Entry), e.Kind())
	}
	switch {
	case compressed && c.h.DataFile:
		c.found(Forbidden, L2Table, at, "compressed cluster in an image with an external data file")
		return false
	case compressed && e.Subclusters != 0:
		c.found(BadSubclusters, L2Table, at, "compressed cluster with subclusters %#x", uint64(e.Subclusters))
		return false
	case compressed:
	case e.Subclusters.Invalid() != 0:
		c.found(BadSubclusters, L2Table, at, "subclusters %#x are both data and zeroes", e.Subclusters.Invalid())
	case e.Subclusters&format.AllData != 0 && !c.h.HasHost(e):
		c.found(BadSubclusters, L2Table, at, "subclusters %#x have data without a host cluster", uint64(e.Subclusters&format.AllData))
	}
	return true
}

// walkData counts the reference of a standard entry at the offset `at`, which maps the cluster at guest.
func (c *checker) walkData(at format.HostOffset, e format.MappingEntry, guest format.GuestOffset, n uint64, active bool) error {
	off := e.Offset()
	switch {
	case !c.h.Aligned(off):
		c.found(Misaligned, L2Table, at, "guest cluster at %#x", uint64(off))
		return nil
	case c.h.DataFile:
		if active {
			if uint64(off) != uint64(guest) {
				c.found(Misplaced, L2Table, at, "guest cluster %#x is at %#x in the data file", uint64(guest), uint64(off))
			}
			c.checkCopied(L2Table, at, e.Copied(), 1, GuestData) // there are no refcounts: every cluster has one owner
		}
		return nil
	case uint64(off) >= c.size:
		c.found(OutsideFile, L2Table, at, "guest cluster at %#x, file of %d bytes", uint64(off), c.size)
		return nil
	}
	_, stored, err := c.refer(GuestData, uint64(c.h.ClusterOf(off)), n)
	if err == nil && active {
		c.checkCopied(L2Table, at, e.Copied(), stored, GuestData)
	}
	return err
}

// walkCompressed counts the references of a compressed entry: one to each cluster that its data touches.
func (c *checker) walkCompressed(at format.HostOffset, e format.L2Entry, n uint64) error {
	off, length := e.CompressedRange(c.h.Geometry)
	last := uint64(c.h.ClusterOf(off + format.HostOffset(length-1)))
	for cl := uint64(c.h.ClusterOf(off)); cl <= last; cl++ {
		if cl >= c.clusters {
			c.found(OutsideFile, L2Table, at, "%d compressed bytes at %#x, file of %d bytes", length, uint64(off), c.size)
			return nil
		}
		if _, _, err := c.refer(CompressedData, cl, n); err != nil {
			return err
		}
	}
	return nil
}
