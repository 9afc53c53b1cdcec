package qcow_test

import (
	"errors"
	"fmt"
	"slices"

	"github.com/qcow-csi/qcow-csi/qcow"
)

// A modelBitmap is what is known of a bitmap: what is dirty in it for sure, and what may be, since it was asked for, or since tables differ
// that read alike.
type modelBitmap struct {
	name                         string
	enabled, transient, unusable bool
	inUse                        bool // the image may say so: if it is killed now the bitmap is lost
	must, may                    *dirtyModel
}

// usableBitmaps returns those whose bits mean something.
func (m *model) usableBitmaps() []*modelBitmap {
	return slices.DeleteFunc(slices.Clone(m.bitmaps), func(b *modelBitmap) bool { return b.unusable })
}

// requested notes that somebody asked for a change of n bytes at off.
func (m *model) requested(off, n int64) {
	for _, b := range m.usableBitmaps() {
		if b.enabled {
			b.inUse = true
			b.may.note(off, n)
		}
	}
}

// changed notes that n bytes at off have changed.
func (m *model) changed(off, n int64) {
	for _, b := range m.usableBitmaps() {
		if b.enabled {
			b.must.note(off, n)
		}
	}
}

// mayResize returns the class of error with which the disk does not get a size: a bitmap needs a byte.
func (m *model) mayResize(size int64) error {
	if size == 0 && len(m.usableBitmaps()) > 0 {
		return qcow.ErrInvalid
	}
	return nil
}

// resizeBitmaps gives the bitmaps the size of the disk; what it has gained is dirty.
func (m *model) resizeBitmaps(old, size int64) {
	for _, b := range m.usableBitmaps() {
		b.must.resize(size)
		b.may.resize(size)
		if size != old {
			b.inUse = false // they are stored with the new size
		}
	}
	if size > old {
		inUse := map[*modelBitmap]bool{}
		for _, b := range m.bitmaps {
			inUse[b] = b.inUse
		}
		m.requested(old, size-old)
		m.changed(old, size-old)
		for _, b := range m.bitmaps {
			b.inUse = inUse[b]
		}
	}
}

// replaceInBitmaps notes that the disk has got another content as a whole. Clusters that read alike may be dirty or not.
func (m *model) replaceInBitmaps(old, now []byte) {
	size := int64(len(now))
	m.resizeBitmaps(int64(len(old)), size)
	for _, b := range m.usableBitmaps() {
		b.inUse = false
		if !b.enabled {
			continue
		}
		b.may.note(0, size)
		for off := int64(0); off < min(size, int64(len(old))); off += b.must.granularity {
			end := min(off+b.must.granularity, size, int64(len(old)))
			if firstDifference(old[off:end], now[off:end]) >= 0 {
				b.must.note(off, end-off)
			}
		}
	}
}

// dropTransient forgets the bitmaps that were in memory only.
func (m *model) dropTransient() {
	m.bitmaps = slices.DeleteFunc(m.bitmaps, func(b *modelBitmap) bool { return b.transient })
	for _, b := range m.bitmaps {
		b.inUse = false
	}
}

// killBitmaps is for an image that was not closed: of a bitmap that was in use nobody knows what is dirty.
func (m *model) killBitmaps() {
	m.bitmaps = slices.DeleteFunc(m.bitmaps, func(b *modelBitmap) bool { return b.transient })
	for _, b := range m.bitmaps {
		b.unusable = b.unusable || b.inUse
	}
}

func (m *model) persistentBitmaps() (n int) {
	for _, b := range m.bitmaps {
		if !b.transient {
			n++
		}
	}
	return n
}

// compareBitmaps holds the bitmaps against the model. From then on it is known what is dirty.
func (m *model) compareBitmaps() error {
	list, err := m.img.Bitmaps()
	if err != nil {
		return err
	}
	if len(list) != len(m.bitmaps) {
		return fmt.Errorf("bitmaps %+v, %d of them are expected", list, len(m.bitmaps))
	}
	for i, b := range m.bitmaps {
		count := list[i].Count
		want := qcow.BitmapInfo{
			Name: b.name, Granularity: b.must.granularity, Enabled: b.enabled, Inconsistent: list[i].Inconsistent, Persistent: !b.transient, Count: count,
		}
		if list[i] != want || want.Inconsistent && !b.unusable {
			return fmt.Errorf("bitmap %+v, want %+v, usable %v", list[i], want, !b.unusable)
		}
		if b.unusable = want.Inconsistent; b.unusable {
			err = refused(errorOf(dirtyExtents(m.img, b.name)), qcow.ErrInvalid)
		} else {
			err = b.compare(m.img, count)
		}
		if err != nil {
			return fmt.Errorf("bitmap %q: %w", b.name, err)
		}
	}
	return nil
}

func errorOf[T any](_ T, err error) error { return err }

func (b *modelBitmap) compare(img *qcow.Image, count int64) error {
	extents, err := dirtyExtents(img, b.name)
	if err != nil {
		return err
	}
	got := newDirtyModel(b.must.size, b.must.granularity)
	for _, e := range extents {
		if e.Length <= 0 || e.Offset+e.Length > got.size {
			return fmt.Errorf("extent %+v of a disk of %d", e, got.size)
		}
		got.note(e.Offset, e.Length)
		count -= e.Length
	}
	for i, dirty := range got.dirty {
		if b.must.dirty[i] && !dirty {
			return fmt.Errorf("%d bytes at %d were changed, and are not dirty", b.must.granularity, int64(i)*b.must.granularity)
		}
		if dirty && !b.may.dirty[i] {
			return fmt.Errorf("%d bytes at %d are dirty, and nobody changed them", b.must.granularity, int64(i)*b.must.granularity)
		}
	}
	if count != 0 {
		return fmt.Errorf("the count is %d too large", count)
	}
	b.must, b.may = got, got.clone()
	return nil
}

func (m *dirtyModel) clone() *dirtyModel {
	return &dirtyModel{m.size, m.granularity, slices.Clone(m.dirty)}
}

// addBitmap makes a bitmap, up to four of them.
func (m *model) addBitmap(a, b uint64) error {
	name := fmt.Sprintf("bitmap %d", a%5)
	o := qcow.BitmapOptions{Granularity: 512 << (b % 10), Disabled: b>>8%4 == 0, Transient: b>>16%4 == 0}
	var class error
	switch there, _ := m.bitmap(name); {
	case m.version < 3 && !o.Transient:
		class = qcow.ErrUnsupported
	case there != nil || len(m.want) == 0:
		class = qcow.ErrInvalid
	}
	if b>>24%4 == 0 {
		o.Granularity = 0
	}
	if b>>32%32 == 0 {
		o.Granularity, class = 256, qcow.ErrInvalid
	}
	if err := m.img.AddBitmap(m.ctx, name, o); err != nil || class != nil {
		return refused(err, class)
	}
	if o.Granularity == 0 {
		o.Granularity = min(max(m.cluster, 4<<10), 64<<10)
	}
	size := int64(len(m.want))
	m.bitmaps = append(m.bitmaps, &modelBitmap{
		name: name, enabled: !o.Disabled, transient: o.Transient, must: newDirtyModel(size, o.Granularity), may: newDirtyModel(size, o.Granularity),
	})
	return nil
}

// bitmap returns the bitmap of the name, or the class of the error that an operation on it must have.
func (m *model) bitmap(name string) (*modelBitmap, error) {
	i := slices.IndexFunc(m.bitmaps, func(b *modelBitmap) bool { return b.name == name })
	switch {
	case i < 0:
		return nil, qcow.ErrNotFound
	case m.bitmaps[i].unusable:
		return m.bitmaps[i], qcow.ErrInvalid
	}
	return m.bitmaps[i], nil
}

// someBitmap returns the name of a bitmap, which there may not be.
func (m *model) someBitmap(a uint64) string {
	if n := uint64(len(m.bitmaps)); n > 0 && a%8 > 0 {
		return m.bitmaps[a>>8%n].name
	}
	return fmt.Sprintf("bitmap %d", a>>8%5)
}

// changeBitmap lets do change a bitmap, and notes that with note if that must succeed.
func (m *model) changeBitmap(a uint64, do func(name string) error, note func(b *modelBitmap)) error {
	name := m.someBitmap(a)
	b, class := m.bitmap(name)
	err := do(name)
	if class == nil && err == nil {
		b.inUse = false
		note(b)
	}
	return refused(err, class)
}

func (m *model) clearBitmap(a, _ uint64) error {
	return m.changeBitmap(a, func(name string) error { return m.img.ClearBitmap(m.ctx, name) }, func(b *modelBitmap) {
		clear(b.must.dirty)
		clear(b.may.dirty)
	})
}

func (m *model) enableBitmap(a, _ uint64) error {
	return m.changeBitmap(a, func(name string) error { return m.img.EnableBitmap(m.ctx, name) }, func(b *modelBitmap) { b.enabled = true })
}

func (m *model) disableBitmap(a, _ uint64) error {
	return m.changeBitmap(a, func(name string) error { return m.img.DisableBitmap(m.ctx, name) }, func(b *modelBitmap) { b.enabled = false })
}

func (m *model) removeBitmap(a, _ uint64) error {
	name := m.someBitmap(a)
	b, class := m.bitmap(name)
	if errors.Is(class, qcow.ErrInvalid) {
		class = nil // even if it can't be used
	}
	err := m.img.RemoveBitmap(m.ctx, name)
	if class == nil {
		m.bitmaps = slices.DeleteFunc(m.bitmaps, func(other *modelBitmap) bool { return other == b })
	}
	return refused(err, class)
}

func (m *model) mergeBitmaps(a, b uint64) error {
	source := m.someBitmap(b)
	from, sourceClass := m.bitmap(source)
	target := m.someBitmap(a)
	to, class := m.bitmap(target)
	if class == nil {
		class = sourceClass
	}
	var err error
	if a>>32%3 == 0 && sourceClass == nil {
		err = m.img.MergeExtents(m.ctx, target, m.img.DirtyExtents(source, 0, m.img.Size()))
	} else {
		err = m.img.MergeBitmap(m.ctx, target, source)
	}
	if class == nil && from != to {
		to.must.merge(from.must)
		to.may.merge(from.may)
	}
	return refused(err, class)
}

// merge makes dirty what is dirty in another one.
func (m *dirtyModel) merge(other *dirtyModel) {
	for _, e := range other.extents() {
		m.note(e.Offset, e.Length)
	}
}
