package check

import (
	"context"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

const (
	snapshotsAt      = 60 // offset in the header: their number
	snapshotTableAt  = 64 // where the table is
	snapshotReadSize = 64 << 10
)

// walkSnapshots counts the references of the snapshot table and of the L1 tables of the snapshots.
func (c *checker) walkSnapshots(ctx context.Context) error {
	if c.h.Snapshots == 0 {
		return nil
	}
	if c.h.DataFile {
		c.found(Forbidden, HeaderCluster, snapshotsAt, "%d snapshots in an image with an external data file", c.h.Snapshots)
	}
	start := c.h.SnapshotsOffset
	list, used, err := c.readSnapshots(ctx)
	if err != nil {
		return err
	}
	if _, err := c.referTable(ctx, SnapshotTable, start, used, HeaderCluster, snapshotTableAt); err != nil {
		return err
	}
	for i, s := range list {
		if s.Incomplete && c.h.Version > 2 {
			c.found(BadTable, SnapshotTable, start, "entry %d lacks the virtual size, which version 3 requires", i)
		}
		n := uint64(s.L1Entries) * format.EntrySize
		if n > format.MaxL1Bytes {
			c.found(BadTable, SnapshotTable, start, "entry %d has an L1 table of %d bytes", i, n)
			continue
		}
		n, err := c.referTable(ctx, SnapshotL1Table, s.L1Offset, n, SnapshotTable, start)
		if err != nil {
			return err
		}
		if err := c.walkL1(ctx, SnapshotL1Table, s.L1Offset, n); err != nil {
			return err
		}
	}
	return nil
}

// readSnapshots decodes the snapshot table, as far as that is possible. Since only its entries tell how long it is, it
// reads more and more of the file until the table fits. It may end in the last cluster of the file behind the end of the file.
func (c *checker) readSnapshots(ctx context.Context) ([]format.Snapshot, uint64, error) {
	start := c.h.SnapshotsOffset
	if uint64(start) >= c.size {
		return nil, 1, nil // it has to be somewhere, which referTable will say
	}
	most := min(uint64(c.h.OffsetOf(format.Cluster(c.clusters))-start), format.MaxSnapshotTableBytes)
	for n := min(snapshotReadSize, most); ; n = min(8*n, most) {
		if err := ctx.Err(); err != nil {
			return nil, 0, err
		}
		b, err := c.load(SnapshotTable, start, n)
		if err != nil {
			return nil, 0, err
		}
		list, used, err := format.DecodeSnapshots(b, c.h.Snapshots)
		if err != nil && n < most {
			continue
		}
		if err != nil {
			c.undecodable(SnapshotTable, start, err)
		}
		return list, used, nil
	}
}
