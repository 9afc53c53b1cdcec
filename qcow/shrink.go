package qcow

import (
	"context"
	"fmt"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// shrink cuts the disk off at size: the entries behind it, the refcounts and the size in the header change at once.
func (img *Image) shrink(ctx context.Context, size int64) error {
	g := img.geometry
	keep := g.ClustersFor(uint64(size)) // guest clusters
	err := img.underShadow(func(s *shadow) (func(*format.Header), func(), error) {
		s.stop = ctx.Err
		l1 := append([]byte(nil), img.l1...)
		err := s.eachTable(img.l1, img.l1offset, func(i uint64, e format.L1Entry, table []byte) error {
			first := i << g.L2Bits() // guest cluster of the table's first entry
			if first+g.L2Entries() <= keep {
				return nil
			}
			now, err := s.cutTable(e, table, max(keep, first)-first)
			format.PutEntry(l1, i, uint64(now))
			return err
		})
		if err != nil {
			return nil, nil, err
		}
		change, done, err := s.replaceL1(l1, uint64(size), img.snapshots)
		return s.carryBitmaps(uint64(size), nil, change, done, err)
	})
	if err != nil || !img.external() {
		return err
	}
	if err := img.data.Truncate(size); err != nil {
		return fmt.Errorf("the disk is smaller, but not its data file: %w", err)
	}
	return nil
}

// cutTable makes an L2 table without the entries from kept on, and returns the L1 entry for it.
func (s *shadow) cutTable(e format.L1Entry, table []byte, kept uint64) (format.L1Entry, error) {
	g := s.img.geometry
	err := s.eachClusterFrom(kept, table, e.Offset(), func(x run, _ *format.MappingEntry) error { return s.drop(x) })
	if err != nil {
		return e, err
	}
	if err := s.retire(e.Offset(), g.ClusterSize()); err != nil || kept == 0 {
		return 0, err
	}
	for i := kept; i < g.L2Entries(); i++ {
		g.PutMappingEntry(table, i, format.MappingEntry{})
	}
	// COPIED may be missing in a table that a snapshot has too.
	if _, err := s.flag(table, e.Offset()); err != nil {
		return e, err
	}
	x, err := s.write(table)
	return format.NewL1Entry(g.OffsetOf(x.first), true), err
}
