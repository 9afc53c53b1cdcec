package check

import (
	"context"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// readRefcountTable decodes the refcount table into c.blocks.
func (c *checker) readRefcountTable(ctx context.Context) error {
	start := c.h.RefcountTableOffset
	n := c.h.RefcountTableBytes()
	if uint64(start) >= c.size {
		return nil // referRefcounts reports it
	}
	n = min(n, c.size-uint64(start)) &^ (format.EntrySize - 1)
	return c.stream(ctx, RefcountTable, start, n, func(at format.HostOffset, b []byte) error {
		for i := range uint64(len(b)) / format.EntrySize {
			e := format.RefcountTableEntry(format.Entry(b, i))
			if e == 0 {
				continue
			}
			at := at + format.HostOffset(i*format.EntrySize)
			index := uint64(at-start) / format.EntrySize
			if r := e.Reserved(); r != 0 {
				c.found(ReservedBits, RefcountTable, at, "entry %d is %#x", index, uint64(e))
			}
			switch off := e.Offset(); {
			case off == 0:
			case !c.h.Aligned(off):
				c.found(Misaligned, RefcountTable, at, "entry %d: refcount block at %#x", index, uint64(off))
			case uint64(off) >= c.size:
				c.found(OutsideFile, RefcountTable, at, "entry %d: refcount block at %#x, file of %d bytes", index, uint64(off), c.size)
			default:
				for uint64(len(c.blocks)) <= index {
					c.blocks = append(c.blocks, 0)
				}
				c.blocks[index] = off
			}
		}
		return nil
	})
}

// referRefcounts counts the references to the refcount table and its blocks.
func (c *checker) referRefcounts(ctx context.Context) error {
	_, err := c.referTable(ctx, RefcountTable, c.h.RefcountTableOffset, c.h.RefcountTableBytes(), HeaderCluster, 48)
	if err != nil {
		return err
	}
	for i, off := range c.blocks {
		if off == 0 {
			continue
		}
		before, _, err := c.refer(RefcountBlock, uint64(c.h.ClusterOf(off)), 1)
		if err != nil {
			return err
		}
		// A hostile table can name one block many times. Where it describes clusters of the file it is still
		// compared with them, which the length of the file bounds.
		if before != Nothing && uint64(i)<<c.h.BlockBits() >= c.clusters {
			c.blocks[i] = 0
		}
	}
	return ctx.Err()
}
