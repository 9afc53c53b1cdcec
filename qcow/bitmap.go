package qcow

import (
	"fmt"
	"iter"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// BitmapInfo describes a dirty bitmap, which says what of the disk was changed since it was made or cleared (specification, "Bitmaps
// extension").
type BitmapInfo struct {
	Name        string
	Granularity int64 // bytes of the disk that one bit stands for: a power of two from 512 to 2 GiB
	Enabled     bool  // it records what changes
	// Inconsistent says that nobody knows what was changed: whoever used the bitmap last did not save it, or it has extra data
	// that is not understood. It can only be removed.
	Inconsistent bool
	Persistent   bool  // the image keeps it
	Count        int64 // bytes that are dirty
}

// DirtyExtent is a range of the disk that was changed.
type DirtyExtent struct {
	Offset, Length int64 // bytes
}

// bitmap is a dirty bitmap. It never changes, but for its bits, which are only ever set, and for what the image file has of it: an
// operation puts another one in its place.
type bitmap struct {
	name        string
	granularity uint8 // log2 of bytes
	enabled     bool
	transient   bool
	flags       uint32 // of its directory entry, those that are kept as they are
	extra       []byte // of its directory entry, kept as it is
	bits        *bitSet

	stored *storedBitmap // nil: nothing yet
	// inUse says that the image file says so: its bits there are out of date. Changed under a freeze, or as recording.mark describes.
	inUse bool
}

// storedBitmap is what the image file has of a bitmap.
type storedBitmap struct {
	at    format.HostOffset
	table []byte // as on disk
}

// length returns how many bits a bitmap of a disk of size bytes has.
func (b *bitmap) length(size uint64) uint64 {
	return bitmapLength(size, b.granularity)
}

func bitmapLength(size uint64, granularity uint8) uint64 {
	n := size >> granularity
	if n<<granularity != size {
		n++
	}
	return n
}

// usable returns why the bits mean nothing, or nil.
func (b *bitmap) usable() error {
	switch {
	case b.bits != nil:
		return nil
	case len(b.extra) > 0 && b.flags&format.BitmapExtraCompatible == 0:
		return format.Unsupportedf("bitmap directory", 0, "bitmap %q has extra data", b.name)
	}
	return format.Invalidf("bitmap %q is inconsistent: it was not saved after its last use, and can only be removed", b.name)
}

// note records that n bytes at off change, at least one.
func (b *bitmap) note(off, n uint64) {
	b.bits.add(off>>b.granularity, (off+n-1)>>b.granularity+1)
}

// with returns a changed copy.
func (b *bitmap) with(change func(c *bitmap)) *bitmap {
	c := *b
	change(&c)
	return &c
}

// saved returns a copy that is to be in the image file as it is now.
func (b *bitmap) saved() *bitmap {
	return b.with(func(c *bitmap) {
		c.inUse = false
		if c.bits.changed.Load() {
			c.stored = nil
		}
	})
}

// bitmaps are the dirty bitmaps of an image. They are loaded when it is opened for writing, else when somebody asks for them. In the image file
// those that are enabled become in_use before the first guest write changes anything, and thereby inconsistent after a crash; Close
// saves them. So does every operation for the bitmap that it is about, up to the next guest write; the ones that are disabled stay valid throughout.
//
// The list, and all that the image file has of bitmaps, changes under a freeze only: whoever is inside an epoch for a change finds them as they are.
type bitmaps struct {
	memory    bitMemory
	limit     int64 // bytes of memory
	recording atomic.Pointer[recording]

	directory   []byte // as on disk; none where there are no persistent bitmaps
	directoryAt format.HostOffset

	mu     sync.Mutex // guards what follows, for those who are not in the way of a freeze
	loaded bool
	failed error // of an image that is open for reading
	list   []*bitmap
}

// allBitmaps returns the bitmaps.
func (img *Image) allBitmaps() ([]*bitmap, error) {
	if err := img.usable(); err != nil {
		return nil, err
	}
	k := &img.bitmaps
	k.mu.Lock()
	defer k.mu.Unlock()
	if !k.loaded {
		k.loaded = true
		size, err := img.file.Size()
		if err == nil {
			err = img.loadBitmaps(uint64(size))
		}
		k.failed = err
	}
	return k.list, k.failed
}

// findBitmap returns the index of a bitmap in a list.
func findBitmap(list []*bitmap, name string) (int, error) {
	i := slices.IndexFunc(list, func(b *bitmap) bool { return b.name == name })
	if i < 0 {
		return 0, fmt.Errorf("bitmap %q: %w", name, ErrNotFound)
	}
	return i, nil
}

// findUsable is findBitmap for a bitmap whose bits are wanted.
func findUsable(list []*bitmap, name string) (int, error) {
	i, err := findBitmap(list, name)
	if err == nil {
		err = list[i].usable()
	}
	return i, err
}

// Bitmaps returns the dirty bitmaps, in the order of their directory. One that the image says not to be up to date with its data, since
// a program without support for bitmaps has changed it, does not exist any more (see [Info]); nor does any for an image that shows an internal
// snapshot. Of an image that is open for reading they are read by the first call, which fails with ErrCorrupt and the like therefore.
func (img *Image) Bitmaps() ([]BitmapInfo, error) {
	list, err := img.allBitmaps()
	if err != nil {
		return nil, err
	}
	size := uint64(img.Size())
	infos := make([]BitmapInfo, len(list))
	for i, b := range list {
		infos[i] = BitmapInfo{
			Name:         b.name,
			Granularity:  1 << b.granularity,
			Enabled:      b.enabled,
			Inconsistent: b.bits == nil,
			Persistent:   !b.transient,
		}
		if b.bits != nil {
			infos[i].Count = b.dirtyBytes(size)
		}
	}
	return infos, nil
}

// dirtyBytes returns how many bytes of a disk of size bytes are dirty.
func (b *bitmap) dirtyBytes(size uint64) int64 {
	n := b.length(size)
	count := b.bits.count(n) << b.granularity
	if n > 0 && b.bits.find(n-1, n, true) < n {
		count -= n<<b.granularity - size // the last bit stands for less
	}
	return int64(count)
}

// DirtyExtents returns what a bitmap says to be changed of the n bytes at off, in order; neighbours are one. It stops after the first error: ErrNotFound
// where there is no such bitmap, ErrInvalid for one that is inconsistent, and for a range that is not inside the disk.
//
// Requests that have returned when DirtyExtents begins are in it, those under way may be or not. Whoever copies what was changed, again and
// again, makes the next bitmap first, and disables this one: then every change is in the one or the other, or in both.
func (img *Image) DirtyExtents(name string, off, n int64) iter.Seq2[DirtyExtent, error] {
	return func(yield func(DirtyExtent, error) bool) {
		b, err := img.bitmapToRead(name, off, n)
		if err != nil {
			yield(DirtyExtent{}, err)
			return
		}
		for e := range b.extents(uint64(off), uint64(n)) {
			if !yield(e, nil) {
				return
			}
		}
	}
}

func (img *Image) bitmapToRead(name string, off, n int64) (*bitmap, error) {
	list, err := img.allBitmaps()
	if err != nil {
		return nil, err
	}
	if size := img.Size(); off < 0 || n < 0 || off > size || n > size-off {
		return nil, format.Invalidf("%d bytes at %d are outside the virtual disk of %d", n, off, size)
	}
	i, err := findUsable(list, name)
	if err != nil {
		return nil, err
	}
	return list[i], nil
}

// extents returns what is dirty of the n bytes at off.
func (b *bitmap) extents(off, n uint64) iter.Seq[DirtyExtent] {
	return func(yield func(DirtyExtent) bool) {
		if n == 0 {
			return
		}
		last := (off+n-1)>>b.granularity + 1
		for i := off >> b.granularity; ; {
			first := b.bits.find(i, last, true)
			if first == last {
				return
			}
			i = b.bits.find(first, last, false)
			start, stop := max(first<<b.granularity, off), min(i<<b.granularity, off+n)
			if !yield(DirtyExtent{Offset: int64(start), Length: int64(stop - start)}) {
				return
			}
		}
	}
}
