package qcow

import (
	"fmt"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// mayResize checks that the bitmaps can have the size of a disk of size bytes.
func (k *bitmaps) mayResize(size uint64) error {
	for _, b := range k.list {
		if b.bits != nil {
			if err := bitmapFits(b.name, b.length(size)); err != nil {
				return err
			}
		}
	}
	return nil
}

// carryBitmaps adds to a shadow that gives the disk the size of size bytes, and other content, bitmaps that fit it, and takes and returns what build
// returns. What was cut off is cut off from them too, and those that are enabled record what touched tells. So they switch together with the disk.
func (s *shadow) carryBitmaps(size uint64, touched func(mark func(off, n uint64)) error, change func(*format.Header), done func(), err error) (func(*format.Header), func(), error) {
	img := s.img
	if err != nil || len(img.bitmaps.list) == 0 {
		return change, done, err
	}
	if err := img.bitmaps.mayResize(size); err != nil {
		return nil, nil, err
	}
	list := make([]*bitmap, len(img.bitmaps.list))
	fresh := make([]*bitmap, len(list)) // with the bits that are new
	for i, b := range img.bitmaps.list {
		fresh[i] = b.with(func(c *bitmap) { c.bits = &bitSet{memory: &img.bitmaps.memory} })
	}
	if touched != nil {
		err := touched(func(off, n uint64) {
			for _, b := range fresh {
				if b.enabled && n > 0 {
					b.note(off, n)
				}
			}
		})
		if err != nil {
			return nil, nil, fmt.Errorf("record in bitmaps: %w", err)
		}
	}
	kept := min(size, uint64(img.Size()))
	for i, b := range img.bitmaps.list {
		list[i] = b.with(func(c *bitmap) {
			if b.bits == nil { // its table is what it was: only one that is in use may have another size than the disk
				c.inUse = true
				return
			}
			c.bits, c.stored, c.inUse = b.bits.union(b.length(kept), fresh[i].bits), nil, false
		})
	}
	changeBitmaps, doneBitmaps, err := s.replaceBitmaps(list, size)
	if err != nil {
		return nil, nil, err
	}
	return func(h *format.Header) { change(h); changeBitmaps(h) }, func() { done(); doneBitmaps() }, nil
}

// switchSize gives the disk, which has grown otherwise, its size, and bitmaps for it.
func (img *Image) switchSize(old, size int64) error {
	resize := func(h *format.Header) { h.Size = uint64(size) }
	if len(img.bitmaps.list) == 0 {
		return img.changeHeader(resize)
	}
	return img.underShadow(func(s *shadow) (func(*format.Header), func(), error) {
		gained := func(mark func(off, n uint64)) error {
			mark(uint64(old), uint64(size-old))
			return nil
		}
		return s.carryBitmaps(uint64(size), gained, resize, func() {}, nil)
	})
}

// differing returns what tells where the disk's present content and that of another L1 table, for a disk of size bytes, may differ, as
// far as the tables tell: two entries that are alike refer to what nobody has written to since.
func (s *shadow) differing(other []byte, size uint64) func(mark func(off, n uint64)) error {
	return func(mark func(off, n uint64)) error {
		if len(s.img.bitmaps.list) == 0 {
			return nil
		}
		now := uint64(s.img.Size())
		if size > now {
			mark(now, size-now)
		}
		shared := min(now, size)
		d := &differences{shadow: s, mark: mark, size: shared}
		for i := range s.img.geometry.L1EntriesFor(shared) {
			if err := d.table(i, l1EntryOf(s.img.l1, i).Offset(), l1EntryOf(other, i).Offset()); err != nil {
				return err
			}
		}
		d.flush()
		return nil
	}
}

func l1EntryOf(l1 []byte, i uint64) format.L1Entry {
	if i >= uint64(len(l1))/format.EntrySize {
		return 0
	}
	return format.L1Entry(format.Entry(l1, i))
}

// differences finds where two trees differ.
type differences struct {
	*shadow
	mark        func(off, n uint64)
	size        uint64 // bytes of the disk that are compared
	start, stop uint64 // found, and not told yet
	a, b        []byte
}

// table compares the L2 tables of L1 entry i.
func (d *differences) table(i uint64, a, b format.HostOffset) error {
	if a == b {
		return nil
	}
	g := d.img.geometry
	var err error
	if d.a, err = d.read(d.a, a); err != nil {
		return err
	}
	if d.b, err = d.read(d.b, b); err != nil {
		return err
	}
	for k := range g.L2Entries() {
		x, y := g.MappingEntry(d.a, k), g.MappingEntry(d.b, k)
		if x.Subclusters == y.Subclusters && x.WithCopied(false) == y.WithCopied(false) {
			continue
		}
		start := i*g.L2Span() + k<<g.ClusterBits
		if d.stop == 0 || start != d.stop {
			d.flush()
			d.start = start
		}
		d.stop = start + g.ClusterSize()
	}
	return nil
}

// read returns the L2 table at at in b, which it makes if need be; where there is none, it has no entry.
func (d *differences) read(b []byte, at format.HostOffset) ([]byte, error) {
	if b == nil {
		b = make([]byte, d.img.geometry.ClusterSize())
	}
	if at == 0 {
		clear(b)
		return b, nil
	}
	if err := readFull(d.img.file, b, at); err != nil {
		return b, fmt.Errorf("read L2 table at %#x: %w", uint64(at), err)
	}
	return b, nil
}

// flush tells what was found.
func (d *differences) flush() {
	if stop := min(d.stop, d.size); d.start < stop {
		d.mark(d.start, stop-d.start)
	}
	d.start, d.stop = 0, 0
}
