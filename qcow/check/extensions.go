package check

import (
	"context"
	"fmt"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// referHeader counts the references to the header and to the encryption header.
func (c *checker) referHeader(ctx context.Context) error {
	if _, _, err := c.refer(HeaderCluster, 0, 1); err != nil {
		return err
	}
	off, n, err := c.h.Encryption()
	if err != nil {
		c.undecodable(HeaderCluster, 0, err)
		return nil
	}
	if n > c.size { // so that what referTable does is bounded
		c.found(OutsideFile, HeaderCluster, 0, "encryption header of %d bytes at %#x, file of %d bytes", n, uint64(off), c.size)
		return nil
	}
	_, err = c.referTable(ctx, EncryptionHeader, off, n, HeaderCluster, 0)
	return err
}

// walkBitmaps counts the references of the bitmap directory. Bitmaps that the header does not vouch for do not count:
// the next writer drops them, and their clusters are leaked.
func (c *checker) walkBitmaps(ctx context.Context) error {
	if c.h.Autoclear&format.AutoclearBitmaps == 0 {
		return nil
	}
	ext, err := c.h.Bitmaps()
	switch {
	case err != nil:
		c.undecodable(HeaderCluster, 0, err)
		return nil
	case ext == nil:
		return nil
	}
	n, err := c.referTable(ctx, BitmapDirectory, ext.DirectoryOffset, ext.DirectorySize, HeaderCluster, 0)
	if err != nil || n != ext.DirectorySize {
		return err
	}
	b, err := c.load(BitmapDirectory, ext.DirectoryOffset, n)
	if err != nil {
		return err
	}
	list, err := format.DecodeBitmaps(b, ext.Count)
	if err != nil {
		c.undecodable(BitmapDirectory, ext.DirectoryOffset, err)
	}
	for i := range list {
		m := &list[i]
		if reason := c.invalidBitmap(m); reason != "" {
			c.found(BadTable, BitmapDirectory, ext.DirectoryOffset, "bitmap %q: %s", m.Name, reason)
			continue
		}
		n, err := c.referTable(ctx, BitmapTable, m.TableOffset, uint64(m.TableEntries)*format.EntrySize, BitmapDirectory, ext.DirectoryOffset)
		if err != nil {
			return err
		}
		if err := c.walkBitmapTable(ctx, m.TableOffset, n); err != nil {
			return err
		}
	}
	return nil
}

// invalidBitmap says what, in this image or for QEMU, is wrong with a bitmap, if something is.
func (c *checker) invalidBitmap(m *format.Bitmap) string {
	entries := uint64(m.TableEntries)
	switch {
	case len(m.Extra) > 0 || m.Flags&format.BitmapExtraCompatible != 0:
		return fmt.Sprintf("%d bytes of extra data, flags %#x", len(m.Extra), m.Flags)
	case entries<<c.h.ClusterBits > format.MaxBitmapDataBytes:
		return fmt.Sprintf("table of %d entries", entries)
	}
	// A bitmap whose bits are not valid may be of the size that the disk had before.
	bits := (c.h.Size + 1<<m.GranularityBits - 1) >> m.GranularityBits
	if need := c.h.ClustersFor((bits + 7) / 8); m.Flags&format.BitmapInUse == 0 && entries != need {
		return fmt.Sprintf("table of %d entries, not %d", entries, need)
	}
	return ""
}

func (c *checker) walkBitmapTable(ctx context.Context, table format.HostOffset, n uint64) error {
	return c.stream(ctx, BitmapTable, table, n, func(at format.HostOffset, b []byte) error {
		for i := range uint64(len(b)) / format.EntrySize {
			e := format.BitmapTableEntry(format.Entry(b, i))
			at := at + format.HostOffset(i*format.EntrySize)
			switch {
			case e.Reserved() != 0:
				c.found(ReservedBits, BitmapTable, at, "entry %#x", uint64(e))
			case e.Offset() != 0:
				if _, err := c.referTable(ctx, BitmapData, e.Offset(), c.h.ClusterSize(), BitmapTable, at); err != nil {
					return err
				}
			}
		}
		return nil
	})
}
