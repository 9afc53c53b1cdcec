package repair

import (
	"context"
	"errors"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// hasBitmaps reports whether the image has bitmaps that it vouches for.
func (r *repairer) hasBitmaps() bool {
	return r.h.Autoclear&format.AutoclearBitmaps != 0 && r.h.Extension(format.ExtBitmaps) != nil
}

// walkBitmaps claims what the bitmaps use.
func (r *repairer) walkBitmaps(ctx context.Context) error {
	if !r.hasBitmaps() {
		return nil
	}
	if r.dropBitmaps != "" {
		return r.reachBitmaps(ctx)
	}
	err := r.walkBitmapDirectory(ctx)
	if errors.Is(err, format.ErrCorrupt) || errors.Is(err, format.ErrUnsupported) {
		return r.bitmapsUnusable("%v", err)
	}
	return err
}

func (r *repairer) walkBitmapDirectory(ctx context.Context) error {
	ext, err := r.h.Bitmaps()
	if err != nil {
		return err
	}
	if err := r.claimBitmaps(ctx, ext.DirectoryOffset, ext.DirectorySize); err != nil {
		return err
	}
	b := make([]byte, ext.DirectorySize)
	if err := r.budget.take(2 * int64(len(b))); err != nil {
		return err
	}
	if err := r.read(Bitmaps, b, ext.DirectoryOffset); err != nil {
		return err
	}
	list, err := format.DecodeBitmaps(b, ext.Count)
	if err != nil {
		return err
	}
	for i := range list {
		m := &list[i]
		if err := r.bitmapProblem(ext.DirectoryOffset, m); err != nil {
			return err
		}
		n := uint64(m.TableEntries) * format.EntrySize
		if err := r.claimBitmaps(ctx, m.TableOffset, n); err != nil {
			return err
		}
		if err := r.walkBitmapTable(ctx, m.TableOffset, n); err != nil {
			return err
		}
	}
	return nil
}

// bitmapProblem fails with ErrCorrupt when the entry of the directory at off contradicts the image.
func (r *repairer) bitmapProblem(off format.HostOffset, m *format.Bitmap) error {
	clusters := uint64(m.TableEntries)
	if clusters<<r.h.ClusterBits > format.MaxBitmapDataBytes {
		return format.Corruptf("bitmap directory", off, "bitmap %q has %d clusters", m.Name, clusters)
	}
	if len(m.Extra) > 0 || m.Flags&format.BitmapExtraCompatible != 0 { // QEMU opens no image with such a bitmap
		return format.Unsupportedf("bitmap directory", off, "bitmap %q has %d bytes of extra data, flags %#x", m.Name, len(m.Extra), m.Flags)
	}
	bits := r.h.Size >> m.GranularityBits
	if r.h.Size&(1<<m.GranularityBits-1) != 0 {
		bits++
	}
	// A bitmap whose bits are not valid may be of the size that the disk had before.
	if need := r.h.ClustersFor((bits + 7) / 8); m.Flags&format.BitmapInUse == 0 && clusters != need {
		return format.Corruptf("bitmap directory", off, "bitmap %q has %d clusters, not %d", m.Name, clusters, need)
	}
	return nil
}

func (r *repairer) walkBitmapTable(ctx context.Context, off format.HostOffset, n uint64) error {
	return r.stream(ctx, Bitmaps, off, n, func(at format.HostOffset, b []byte) error {
		for i := range uint64(len(b)) / format.EntrySize {
			e := format.BitmapTableEntry(format.Entry(b, i))
			if e.Reserved() != 0 {
				return format.Corruptf("bitmap table", at+format.HostOffset(i*format.EntrySize), "entry %#x", uint64(e))
			}
			if e.Offset() == 0 {
				continue
			}
			if err := r.claimBitmaps(ctx, e.Offset(), r.h.ClusterSize()); err != nil {
				return err
			}
		}
		return nil
	})
}

// claimBitmaps claims the n bytes at off. It fails with ErrCorrupt when they are not in the file.
func (r *repairer) claimBitmaps(ctx context.Context, off format.HostOffset, n uint64) error {
	switch {
	case !r.h.Aligned(off):
		return format.Corruptf("bitmaps", off, "not the start of a cluster")
	case uint64(off) >= r.size || r.h.ClustersFor(uint64(off)+n) > r.end:
		return format.Corruptf("bitmaps", off, "%d bytes are not in the file of %d bytes", n, r.size)
	}
	return r.claim(ctx, bitmap, &region{off: off, bytes: n})
}

// reachBitmaps notes what the header of before reaches of bitmaps that are dropped, as far as it can be followed: until they are, others
// may use those that are sound.
func (r *repairer) reachBitmaps(ctx context.Context) error {
	ext, err := r.h.Bitmaps()
	if err != nil || uint64(ext.DirectoryOffset) >= r.size {
		return nil //nolint:nilerr // there is nothing to follow
	}
	b := make([]byte, min(ext.DirectorySize, r.size-uint64(ext.DirectoryOffset)))
	if err := r.budget.take(2 * int64(len(b))); err != nil {
		return err
	}
	if err := r.read(Bitmaps, b, ext.DirectoryOffset); err != nil {
		return err
	}
	if err := r.reach(uint64(r.h.ClusterOf(ext.DirectoryOffset)), r.h.ClustersFor(uint64(len(b)))+1); err != nil {
		return err
	}
	list, _ := format.DecodeBitmaps(b, ext.Count) // those before the error count
	left := r.size                                // tables that lie on each other are not worth more
	for i := range list {
		m := &list[i]
		if !r.h.Aligned(m.TableOffset) || uint64(m.TableOffset) >= r.size {
			continue
		}
		n := min(uint64(m.TableEntries)*format.EntrySize, r.size-uint64(m.TableOffset), left)
		left -= n
		if err := r.reachBitmapTable(ctx, m.TableOffset, n); err != nil {
			return err
		}
	}
	return nil
}

// reachBitmapTable does for n bytes of a bitmap table what reachBitmaps does.
func (r *repairer) reachBitmapTable(ctx context.Context, off format.HostOffset, n uint64) error {
	if err := r.reach(uint64(r.h.ClusterOf(off)), r.h.ClustersFor(n)); err != nil {
		return err
	}
	return r.stream(ctx, Bitmaps, off, n, func(_ format.HostOffset, b []byte) error {
		for i := range uint64(len(b)) / format.EntrySize {
			if off := format.BitmapTableEntry(format.Entry(b, i)).Offset(); off != 0 {
				if err := r.reach(uint64(r.h.ClusterOf(off)), 1); err != nil {
					return err
				}
			}
		}
		return nil
	})
}
