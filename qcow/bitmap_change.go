package qcow

import (
	"context"
	"iter"
	"math/bits"
	"slices"
	"strings"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// BitmapOptions are the properties of a new bitmap.
type BitmapOptions struct {
	// Granularity is how many bytes of the disk one bit stands for, a power of two from 512 to 2 GiB; 0 means the size of a cluster, but at least
	// 4 KiB and at most 64 KiB.
	Granularity int64
	Disabled    bool // it does not record what changes
	// Transient keeps the bitmap in memory only: Close drops it. Such a bitmap any image can have.
	Transient bool
}

// granularity returns log2 of the granularity, in an image of clusters of g.
func (o BitmapOptions) granularity(g format.Geometry) (uint8, error) {
	n := o.Granularity
	if n == 0 {
		n = min(max(int64(g.ClusterSize()), 4<<10), 64<<10)
	}
	if n < 1<<format.MinBitmapGranularity || n > 1<<format.MaxBitmapGranularity || bits.OnesCount64(uint64(n)) != 1 {
		return 0, format.Invalidf("a bitmap's granularity of %d is not a power of two from %d to %d", n, 1<<format.MinBitmapGranularity, int64(1)<<format.MaxBitmapGranularity)
	}
	return uint8(bits.TrailingZeros64(uint64(n))), nil
}

// AddBitmap makes a dirty bitmap, with nothing dirty in it, of a name that no other has, from 1 to 1023 bytes. From then on it records every
// change, unless it is disabled. It is durable when AddBitmap returns nil, as after every operation on bitmaps; a crash leaves the bitmaps
// of before or those of after. Requests that change the image wait meanwhile. After the first of them the image file
// says of those that are enabled that they are in use: a crash makes them inconsistent, Close saves them.
//
// It fails with ErrInvalid where the options, or a bitmap so large, are not possible, or where the header has no room, with ErrUnsupported
// for an image of version 2, which can't have bitmaps that are kept.
func (img *Image) AddBitmap(ctx context.Context, name string, o BitmapOptions) error {
	granularity, err := o.granularity(img.geometry)
	switch {
	case err != nil:
		return err
	case name == "" || len(name) > format.MaxBitmapName || strings.ContainsRune(name, 0):
		return format.Invalidf("a bitmap's name of %d bytes, or with a NUL in it", len(name))
	case img.version < 3 && !o.Transient:
		return format.Unsupportedf("header", 4, "bitmaps in an image of version 2")
	}
	return img.changeBitmaps(ctx, func(list []*bitmap) ([]*bitmap, error) {
		if _, err := findBitmap(list, name); err == nil {
			return nil, format.Invalidf("there is a bitmap %q already", name)
		}
		b := &bitmap{name: name, granularity: granularity, enabled: !o.Disabled, transient: o.Transient, bits: &bitSet{memory: &img.bitmaps.memory}}
		return append(list, b), bitmapFits(name, b.length(uint64(img.Size())))
	})
}

// RemoveBitmap removes a bitmap. It fails with ErrNotFound.
func (img *Image) RemoveBitmap(ctx context.Context, name string) error {
	return img.changeBitmaps(ctx, func(list []*bitmap) ([]*bitmap, error) {
		i, err := findBitmap(list, name)
		if err != nil {
			return nil, err
		}
		return slices.Delete(list, i, i+1), nil
	})
}

// ClearBitmap makes nothing dirty in a bitmap. What has returned before is not in it then, what begins later is, if it is enabled.
// It fails with ErrNotFound, and with ErrInvalid for a bitmap that is inconsistent.
func (img *Image) ClearBitmap(ctx context.Context, name string) error {
	return img.changeBitmap(ctx, name, func(b *bitmap) error {
		b.bits, b.stored = &bitSet{memory: &img.bitmaps.memory}, nil
		return nil
	})
}

// EnableBitmap makes a bitmap record what changes. It fails as ClearBitmap does.
func (img *Image) EnableBitmap(ctx context.Context, name string) error {
	return img.changeBitmap(ctx, name, func(b *bitmap) error {
		b.enabled = true
		return nil
	})
}

// DisableBitmap makes a bitmap stay as it is. It fails as ClearBitmap does.
func (img *Image) DisableBitmap(ctx context.Context, name string) error {
	return img.changeBitmap(ctx, name, func(b *bitmap) error {
		b.enabled = false
		return nil
	})
}

// MergeBitmap makes dirty in target what is dirty in source, which stays as it is. Where their granularities differ, so do the
// bounds of what is dirty: it becomes as much more as target's granularity demands. It fails as ClearBitmap does.
func (img *Image) MergeBitmap(ctx context.Context, target, source string) error {
	return img.changeBitmaps(ctx, func(list []*bitmap) ([]*bitmap, error) {
		i, err := findUsable(list, target)
		if err != nil {
			return nil, err
		}
		k, err := findUsable(list, source)
		if err != nil || i == k {
			return list, err
		}
		size := uint64(img.Size())
		from := list[k].bits
		if list[i].granularity != list[k].granularity {
			if from, err = list[i].collect(ctx, list[k].infallible(0, size), size); err != nil {
				return nil, err
			}
		}
		list[i] = list[i].merged(from, size)
		return list, nil
	})
}

// MergeExtents makes extents dirty in a bitmap, such as the DirtyExtents of another image's: all of those, or, when it fails, none. It fails as
// ClearBitmap does, with whatever error extents end with, and with ErrInvalid for one that is not inside the disk.
func (img *Image) MergeExtents(ctx context.Context, target string, extents iter.Seq2[DirtyExtent, error]) error {
	end, err := img.maintain(ctx)
	if err != nil {
		return err
	}
	defer end()
	list := slices.Clone(img.bitmaps.list)
	i, err := findUsable(list, target)
	if err != nil {
		return err
	}
	size := uint64(img.Size())
	from, err := list[i].collect(ctx, extents, size)
	if err != nil {
		return err
	}
	return img.replaceUnderShadow(ctx, func() ([]*bitmap, error) {
		list[i] = list[i].merged(from, size)
		return list, nil
	})
}

// merged returns a copy in which what is set in from is set as well.
func (b *bitmap) merged(from *bitSet, size uint64) *bitmap {
	return b.with(func(c *bitmap) {
		c.bits, c.stored, c.inUse = b.bits.union(b.length(size), from), nil, false
	})
}

// infallible returns the extents of b in the form in which others come that may fail.
func (b *bitmap) infallible(off, n uint64) iter.Seq2[DirtyExtent, error] {
	return func(yield func(DirtyExtent, error) bool) {
		for e := range b.extents(off, n) {
			if !yield(e, nil) {
				return
			}
		}
	}
}

// collect returns the extents as bits of b's granularity, for a disk of size bytes.
func (b *bitmap) collect(ctx context.Context, extents iter.Seq2[DirtyExtent, error], size uint64) (*bitSet, error) {
	c := b.with(func(c *bitmap) { c.bits = &bitSet{memory: b.bits.memory} })
	for e, err := range extents {
		switch {
		case err != nil:
			return nil, err
		case e.Offset < 0 || e.Length < 0 || uint64(e.Offset) > size || uint64(e.Length) > size-uint64(e.Offset):
			return nil, format.Invalidf("%d bytes at %d are outside the virtual disk of %d", e.Length, e.Offset, size)
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case e.Length > 0:
			c.note(uint64(e.Offset), uint64(e.Length))
		}
	}
	return c.bits, nil
}

// changeBitmap lets edit change a copy of a bitmap whose bits can be used, which is saved then.
func (img *Image) changeBitmap(ctx context.Context, name string, edit func(b *bitmap) error) error {
	return img.changeBitmaps(ctx, func(list []*bitmap) ([]*bitmap, error) {
		i, err := findUsable(list, name)
		if err != nil {
			return nil, err
		}
		list[i] = list[i].saved()
		return list, edit(list[i])
	})
}

// changeBitmaps gives the image the bitmaps that edit makes of a copy of its list.
func (img *Image) changeBitmaps(ctx context.Context, edit func(list []*bitmap) ([]*bitmap, error)) error {
	end, err := img.maintain(ctx)
	if err != nil {
		return err
	}
	defer end()
	return img.replaceUnderShadow(ctx, func() ([]*bitmap, error) { return edit(slices.Clone(img.bitmaps.list)) })
}

// replaceUnderShadow gives the image the bitmaps that edit, called under the freeze, returns.
func (img *Image) replaceUnderShadow(ctx context.Context, edit func() ([]*bitmap, error)) error {
	return img.underShadow(func(s *shadow) (func(*format.Header), func(), error) {
		s.stop = ctx.Err
		list, err := edit()
		if err != nil {
			return nil, nil, err
		}
		nothing := slices.Equal(persistent(img.bitmaps.list), persistent(list))
		change, done, err := s.replaceBitmaps(list, uint64(img.Size()))
		if err == nil && nothing { // for the image file to keep
			done()
			return nil, nil, nil
		}
		return change, done, err
	})
}
