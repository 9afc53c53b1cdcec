package check

import (
	"context"
	"encoding/binary"
	"fmt"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// referHeader counts the references to the header and to the encryption header.
func (c *checker) referHeader(ctx context.Context) error {
	if _, _, err := c.refer(HeaderCluster, 0, 1); err != nil {
		return err
	}
	ext := c.h.Extension(format.ExtFullDisk)
	if ext == nil {
		return nil
	}
	if len(ext.Data) != 16 { // offset and length
		c.found(BadTable, HeaderCluster, 0, "encryption header pointer of %d bytes", len(ext.Data))
		return nil
	}
	off, n := binary.BigEndian.Uint64(ext.Data), binary.BigEndian.Uint64(ext.Data[8:])
	if off > c.size || n > c.size-min(off, c.size)+c.h.ClusterSize() {
		c.found(OutsideFile, HeaderCluster, 0, "encryption header of %d bytes at %#x, file of %d bytes", n, off, c.size)
		return nil
	}
	_, err := c.referTable(ctx, EncryptionHeader, format.HostOffset(off), n, HeaderCluster, 0)
	return err
}

// The bitmaps extension and the entries of the bitmap directory that it points at (specification, "Bitmaps"). An entry
// has 24 bytes of fixed fields, extra data and a name, padded to a multiple of 8 bytes.
const (
	bitmapExtension    = 24
	bitmapFixed        = 24
	bitmapAlign        = 8
	bitmapMax          = 65535
	bitmapDirectoryMax = bitmapMax * 1024
	bitmapDataMax      = 512 << 20
	bitmapNameMax      = 1023
	bitmapTypeTracking = 1

	bitmapGranularityMin = 9
	bitmapGranularityMax = 31

	bitmapOffsetMask   = 0x00fffffffffffe00
	bitmapReserved     = 0xff000000000001fe
	bitmapAllOnes      = 1
	bitmapFlagInUse    = 1
	bitmapFlagReserved = 0xfffffffc
)

// walkBitmaps counts the references of the bitmap directory. Bitmaps that the header does not vouch for do not count:
// the next writer drops them, and their clusters are leaked.
func (c *checker) walkBitmaps(ctx context.Context) error {
	ext := c.h.Extension(format.ExtBitmaps)
	if ext == nil || c.h.Autoclear&format.AutoclearBitmaps == 0 {
		return nil
	}
	if len(ext.Data) != bitmapExtension {
		c.found(BadTable, HeaderCluster, 0, "bitmaps extension of %d bytes", len(ext.Data))
		return nil
	}
	count := binary.BigEndian.Uint32(ext.Data)
	reserved := binary.BigEndian.Uint32(ext.Data[4:])
	length := binary.BigEndian.Uint64(ext.Data[8:])
	start := binary.BigEndian.Uint64(ext.Data[16:])
	if count == 0 || count > bitmapMax || reserved != 0 || length == 0 || length > bitmapDirectoryMax || start >= uint64(format.MaxHostOffset) {
		c.found(BadTable, HeaderCluster, 0, "bitmaps extension with %d bitmaps, directory of %d bytes at %#x", count, length, start)
		return nil
	}
	n, err := c.referTable(ctx, BitmapDirectory, format.HostOffset(start), length, HeaderCluster, 0)
	if err != nil || n != length {
		return err
	}

	return c.walkBitmapDirectory(ctx, format.HostOffset(start), length, count)
}

func (c *checker) walkBitmapDirectory(ctx context.Context, start format.HostOffset, length uint64, count uint32) error {
	names := make(map[string]bool)
	at, end := start, start+format.HostOffset(length)
	for i := range count {
		var fixed [bitmapFixed]byte
		if at+bitmapFixed > end {
			c.found(BadTable, BitmapDirectory, start, "%d bytes hold only %d of %d entries", length, i, count)
			return nil
		}
		if err := c.read(BitmapDirectory, fixed[:], at); err != nil {
			return err
		}
		b := bitmap{
			table:       format.HostOffset(binary.BigEndian.Uint64(fixed[0:])),
			entries:     uint64(binary.BigEndian.Uint32(fixed[8:])),
			flags:       binary.BigEndian.Uint32(fixed[12:]),
			kind:        fixed[16],
			granularity: fixed[17],
			name:        make([]byte, binary.BigEndian.Uint16(fixed[18:])),
			extra:       binary.BigEndian.Uint32(fixed[20:]),
		}
		if err := c.read(BitmapDirectory, b.name, at+bitmapFixed); err != nil {
			return err
		}
		if reason := b.invalid(c.h); reason != "" {
			c.found(BadTable, BitmapDirectory, at, "entry %d: %s", i, reason)
			return nil
		}
		if names[string(b.name)] {
			c.found(BadTable, BitmapDirectory, at, "entry %d: a second bitmap has the name %q", i, b.name)
		}
		names[string(b.name)] = true
		n, err := c.referTable(ctx, BitmapTable, b.table, b.entries*format.EntrySize, BitmapDirectory, at)
		if err != nil {
			return err
		}
		if err := c.walkBitmapTable(ctx, b.table, n); err != nil {
			return err
		}
		at += (bitmapFixed + format.HostOffset(len(b.name)) + bitmapAlign - 1) &^ (bitmapAlign - 1)
	}
	if at != end {
		c.found(BadTable, BitmapDirectory, start, "%d entries do not fill %d bytes", count, length)
	}
	return nil
}

// bitmap is an entry of the bitmap directory.
type bitmap struct {
	table       format.HostOffset
	entries     uint64
	flags       uint32
	kind        byte
	granularity byte // log2 of the guest bytes of a bit
	name        []byte
	extra       uint32
}

// invalid says what is wrong with the entry, if something is.
func (b *bitmap) invalid(h *format.Header) string {
	switch {
	case b.kind != bitmapTypeTracking:
		return fmt.Sprintf("type %d", b.kind)
	case b.flags&bitmapFlagReserved != 0:
		return fmt.Sprintf("flags %#x", b.flags)
	case b.extra != 0:
		return fmt.Sprintf("%d bytes of extra data", b.extra)
	case len(b.name) > bitmapNameMax:
		return fmt.Sprintf("name of %d bytes", len(b.name))
	case b.granularity < bitmapGranularityMin || b.granularity > bitmapGranularityMax:
		return fmt.Sprintf("granularity 2^%d", b.granularity)
	case b.table == 0 || b.table >= format.MaxHostOffset:
		return fmt.Sprintf("table at %#x", uint64(b.table))
	case b.entries == 0 || b.entries<<h.ClusterBits > bitmapDataMax:
		return fmt.Sprintf("table of %d entries", b.entries)
	}
	// A bitmap whose bits are not valid may be of the size that the disk had before.
	bits := (h.Size + 1<<b.granularity - 1) >> b.granularity
	if need := h.ClustersFor((bits + 7) / 8); b.flags&bitmapFlagInUse == 0 && b.entries != need {
		return fmt.Sprintf("table of %d entries, not %d", b.entries, need)
	}
	return ""
}

func (c *checker) walkBitmapTable(ctx context.Context, table format.HostOffset, n uint64) error {
	return c.stream(ctx, BitmapTable, table, n, func(at format.HostOffset, b []byte) error {
		for i := range uint64(len(b)) / format.EntrySize {
			e := format.Entry(b, i)
			at := at + format.HostOffset(i*format.EntrySize)
			off := format.HostOffset(e & bitmapOffsetMask)
			switch {
			case e&bitmapReserved != 0, off != 0 && e&bitmapAllOnes != 0:
				c.found(ReservedBits, BitmapTable, at, "entry %#x", e)
			case off != 0:
				if _, err := c.referTable(ctx, BitmapData, off, c.h.ClusterSize(), BitmapTable, at); err != nil {
					return err
				}
			}
		}
		return nil
	})
}
