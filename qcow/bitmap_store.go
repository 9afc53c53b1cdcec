package qcow

import (
	"fmt"
	"slices"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// replaceBitmaps makes the image have the bitmaps of list, for a disk of size bytes. It writes those that the image file does not have as they are
// to be, and a new directory; what these take the place of is retired. The extension in the header switches from one to the other, together with
// all else that the shadow changes.
func (s *shadow) replaceBitmaps(list []*bitmap, size uint64) (change func(*format.Header), done func(), err error) {
	img := s.img
	k := &img.bitmaps
	if slices.Equal(persistent(k.list), persistent(list)) {
		return func(*format.Header) {}, func() { img.installBitmaps(list, k.directory, k.directoryAt) }, nil
	}
	if err := s.retireBitmaps(list); err != nil {
		return nil, nil, err
	}
	places := make([]*storedBitmap, len(list))
	var entries []format.Bitmap
	for i, b := range list {
		if b.transient {
			continue
		}
		if places[i] = b.stored; b.stored == nil {
			if places[i], err = s.writeBitmap(b, size); err != nil {
				return nil, nil, fmt.Errorf("bitmap %q: %w", b.name, err)
			}
		}
		entries = append(entries, b.entry(places[i]))
	}
	directory := format.EncodeBitmaps(entries)
	if len(entries) > format.MaxBitmaps || len(directory) > format.MaxBitmapDirectoryBytes {
		return nil, nil, format.Invalidf("%d bitmaps, with a directory of %d bytes, exceed the limits of the format", len(entries), len(directory))
	}
	x, err := s.write(directory)
	if err != nil {
		return nil, nil, err
	}
	at := img.geometry.OffsetOf(x.first)
	change = func(h *format.Header) {
		if len(entries) == 0 {
			h.SetExtension(format.ExtBitmaps, nil)
			h.Autoclear &^= format.AutoclearBitmaps
			return
		}
		h.SetExtension(format.ExtBitmaps, format.BitmapsExtension{
			Count: uint32(len(entries)), DirectorySize: uint64(len(directory)), DirectoryOffset: at,
		}.Encode())
		h.Autoclear |= format.AutoclearBitmaps
	}
	done = func() {
		for i, b := range list {
			if places[i] != b.stored {
				b.stored = places[i]
				b.bits.changed.Store(false)
			}
		}
		img.installBitmaps(list, directory, at)
	}
	return change, done, nil
}

func persistent(list []*bitmap) []*bitmap {
	return slices.DeleteFunc(slices.Clone(list), func(b *bitmap) bool { return b.transient })
}

// entry returns the bitmap's entry of the directory.
func (b *bitmap) entry(stored *storedBitmap) format.Bitmap {
	e := format.Bitmap{
		TableOffset:     stored.at,
		TableEntries:    uint32(len(stored.table) / format.EntrySize),
		Flags:           b.flags,
		GranularityBits: b.granularity,
		Name:            b.name,
		Extra:           b.extra,
	}
	if b.inUse {
		e.Flags |= format.BitmapInUse
	}
	if b.enabled {
		e.Flags |= format.BitmapAuto
	}
	return e
}

// installBitmaps puts a list in memory, with its directory. The image is frozen.
func (img *Image) installBitmaps(list []*bitmap, directory []byte, at format.HostOffset) {
	k := &img.bitmaps
	k.mu.Lock()
	k.list = list
	k.mu.Unlock()
	k.directory, k.directoryAt = directory, at
	left := k.limit - int64(len(directory))
	for _, b := range list {
		if b.stored != nil {
			left -= int64(len(b.stored.table))
		}
		if b.bits != nil {
			left -= b.bits.bytes()
		}
	}
	k.memory.left.Store(left)
	k.recording.Store(newRecording(list))
}

// retireBitmaps drops the present directory and the clusters of bitmaps that are not part of list as the image file has them.
func (s *shadow) retireBitmaps(list []*bitmap) error {
	k, g := &s.img.bitmaps, s.img.geometry
	if len(k.directory) > 0 {
		if err := s.retire(k.directoryAt, uint64(len(k.directory))); err != nil {
			return err
		}
	}
	stays := map[*storedBitmap]bool{}
	for _, b := range list {
		stays[b.stored] = true
	}
	for _, b := range k.list {
		if b.stored == nil || stays[b.stored] {
			continue
		}
		if err := s.retire(b.stored.at, uint64(len(b.stored.table))); err != nil {
			return err
		}
		for i := range uint64(len(b.stored.table)) / format.EntrySize {
			if off := format.BitmapTableEntry(format.Entry(b.stored.table, i)).Offset(); off != 0 {
				if err := s.retire(off, g.ClusterSize()); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// writeBitmap writes the bits and the table of a bitmap.
func (s *shadow) writeBitmap(b *bitmap, size uint64) (*storedBitmap, error) {
	g := s.img.geometry
	length := b.length(size)
	perCluster := g.ClusterSize() * 8
	entries := g.ClustersFor((length + 7) / 8)
	if err := bitmapFits(b.name, length); err != nil {
		return nil, err
	}
	stored := &storedBitmap{table: make([]byte, entries*format.EntrySize)}
	cluster := make([]byte, g.ClusterSize())
	for i := range entries {
		if s.stop != nil {
			if err := s.stop(); err != nil {
				return nil, err
			}
		}
		first, end := i*perCluster, min((i+1)*perCluster, length)
		switch {
		case b.bits.find(first, end, true) == end:
		case b.bits.find(first, end, false) == end:
			format.PutEntry(stored.table, i, bitmapAllOnes)
		default:
			b.bits.encode(cluster, first, end)
			x, err := s.write(cluster)
			if err != nil {
				return nil, err
			}
			format.PutEntry(stored.table, i, uint64(g.OffsetOf(x.first)))
		}
	}
	x, err := s.write(stored.table)
	stored.at = g.OffsetOf(x.first)
	return stored, err
}

// bitmapAllOnes is the entry of a bitmap table for a cluster whose bits are all set.
const bitmapAllOnes = 1

// bitmapFits checks that there can be a bitmap of so many bits.
func bitmapFits(name string, length uint64) error {
	switch {
	case length == 0:
		return format.Invalidf("bitmap %q: a disk without a byte has no bitmaps", name)
	case length > maxBits:
		return format.Invalidf("bitmap %q would have %d bits, more than %d: it needs a larger granularity", name, length, uint64(maxBits))
	}
	return nil
}

// saveBitmaps makes the image file have every bitmap as it is.
func (img *Image) saveBitmaps() error {
	list := persistent(img.bitmaps.list)
	save := false
	for i, b := range list {
		if b.inUse && b.bits != nil {
			list[i], save = b.saved(), true
		}
	}
	if !save {
		return nil
	}
	err := img.underShadow(func(s *shadow) (func(*format.Header), func(), error) {
		return s.replaceBitmaps(list, uint64(img.Size()))
	})
	if err != nil {
		return fmt.Errorf("save bitmaps: %w", err)
	}
	return nil
}
