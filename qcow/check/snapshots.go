package check

import (
	"context"
	"encoding/binary"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// A snapshot table entry (specification, "Snapshots") begins with 40 bytes of fixed fields; extra data, the id and the
// name follow. Entries start at multiples of 8 bytes.
const (
	snapshotFixed         = 40
	snapshotAlign         = 8
	snapshotExtraRequired = 16 // in version 3: size of the VM state and of the disk
	snapshotExtraMax      = 1024
	snapshotTableMax      = 64 << 20
)

// walkSnapshots counts the references of the snapshot table and of the L1 tables of the snapshots.
func (c *checker) walkSnapshots(ctx context.Context) error {
	if c.h.Snapshots == 0 {
		return nil
	}
	type table struct {
		entry, l1 format.HostOffset
		bytes     uint64
	}
	var tables []table
	start := c.h.SnapshotsOffset
	end := start
	for i := range c.h.Snapshots {
		if i%contextInterval == 0 && ctx.Err() != nil {
			return ctx.Err()
		}
		at := (end + snapshotAlign - 1) &^ (snapshotAlign - 1)
		if uint64(at)+snapshotFixed > c.size {
			c.found(OutsideFile, HeaderCluster, 64, "entry %d of the snapshot table is at %#x, file of %d bytes", i, uint64(at), c.size)
			break
		}
		var fixed [snapshotFixed]byte
		if err := c.read(SnapshotTable, fixed[:], at); err != nil {
			return err
		}
		l1 := format.HostOffset(binary.BigEndian.Uint64(fixed[0:]))
		l1Bytes := uint64(binary.BigEndian.Uint32(fixed[8:])) * format.EntrySize
		names := uint64(binary.BigEndian.Uint16(fixed[12:])) + uint64(binary.BigEndian.Uint16(fixed[14:]))
		extra := uint64(binary.BigEndian.Uint32(fixed[36:]))
		next := at + snapshotFixed + format.HostOffset(extra+names)
		if extra > snapshotExtraMax || next-start > snapshotTableMax {
			c.found(BadTable, SnapshotTable, at, "entry %d has %d bytes of extra data and ends at %#x", i, extra, uint64(next))
			break
		}
		if extra < snapshotExtraRequired {
			c.found(BadTable, SnapshotTable, at, "entry %d has %d bytes of extra data, less than %d", i, extra, snapshotExtraRequired)
		}
		end = next
		if l1Bytes > format.MaxL1Bytes {
			c.found(BadTable, SnapshotTable, at, "entry %d has an L1 table of %d bytes", i, l1Bytes)
			continue
		}
		tables = append(tables, table{at, l1, l1Bytes})
	}

	if _, err := c.referTable(ctx, SnapshotTable, start, uint64(end-start), HeaderCluster, 64); err != nil {
		return err
	}
	for _, t := range tables {
		n, err := c.referTable(ctx, SnapshotL1Table, t.l1, t.bytes, SnapshotTable, t.entry)
		if err != nil {
			return err
		}
		if err := c.walkL1(ctx, SnapshotL1Table, t.l1, n); err != nil {
			return err
		}
	}
	return nil
}
