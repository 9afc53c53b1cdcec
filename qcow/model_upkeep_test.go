package qcow_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/qcow-csi/qcow-csi/qcow"
)

// upkeep is what is done to an image as a whole while a crew works on it.
var upkeep = []struct {
	what string
	do   func(c *crew) error
}{
	{"create snapshot", (*crew).createSnapshot},
	{"create snapshot", (*crew).createSnapshot},
	{"apply snapshot", (*crew).applySnapshot},
	{"apply snapshot", (*crew).applySnapshot},
	{"delete snapshot", (*crew).deleteSnapshot},
	{"read snapshots", (*crew).lookBack},
	{"resize", (*crew).resize},
	{"compact", func(c *crew) error { return errorOf(c.img.Compact(c.ctx, nil)) }},
	{"flush", func(c *crew) error { return c.img.Flush() }},
	{"add bitmap", (*crew).addBitmap},
	{"change bitmap", (*crew).changeBitmap},
	{"check bitmaps", (*crew).checkBitmaps},
	{"commit", (*crew).commit},
	{"rebase", (*crew).rebase},
	{"stream", (*crew).stream},
}

func (c *crew) createSnapshot() error {
	if len(c.kept) == 3 {
		return c.deleteSnapshot()
	}
	c.made++
	name := fmt.Sprintf("snapshot %d", c.made)
	begun := c.settle()
	if !c.kind.external {
		c.hurdles.Add(1)
	}
	_, err := c.img.CreateSnapshot(c.ctx, name, time.Unix(int64(c.made), 0))
	if c.kind.external {
		return refused(err, qcow.ErrUnsupported)
	}
	ended := c.clock.Add(1)
	if err != nil {
		return err
	}
	content, err := c.read(modelImage, name)
	if err != nil {
		return err
	}
	c.kept = append(c.kept, keptDisk{name, content})
	return c.isMoment(content, window{begun, ended})
}

func (c *crew) applySnapshot() error {
	if len(c.kept) == 0 {
		return refused(c.img.ApplySnapshot(c.ctx, "none"), qcow.ErrNotFound)
	}
	k := c.kept[c.rng.IntN(len(c.kept))]
	begun := c.settle()
	for _, h := range c.hands {
		h.beginApply(k.content[h.start:][:h.size])
	}
	err := c.img.ApplySnapshot(c.ctx, k.name)
	in := window{begun, c.clock.Add(1)}
	for _, h := range c.hands {
		h.endApply(in, err == nil)
	}
	c.sizeBitmaps(int64(len(k.content)))
	return err
}

func (c *crew) deleteSnapshot() error {
	if len(c.kept) == 0 {
		return nil
	}
	i := c.rng.IntN(len(c.kept))
	name := c.kept[i].name
	c.kept = slices.Delete(c.kept, i, i+1)
	return c.img.DeleteSnapshot(c.ctx, name)
}

// lookBack expects that the snapshots are what they were.
func (c *crew) lookBack() error {
	for _, k := range c.kept {
		content, err := c.read(modelImage, k.name)
		if err != nil {
			return err
		}
		if !bytes.Equal(content, k.content) {
			return fmt.Errorf("%s has changed at byte %d", k.name, firstDifference(content, k.content))
		}
	}
	return nil
}

// resize gives the disk another size, behind the area where the hands work.
func (c *crew) resize() error {
	size := (c.area + sector - 1 + sector*c.rng.Int64N(400)) / sector * sector
	o := qcow.ResizeOptions{}
	if size > c.img.Size() && c.rng.IntN(3) == 0 {
		o.Preallocation = qcow.PreallocationMetadata
	}
	err := c.img.ResizeWith(c.ctx, size, o)
	c.sizeBitmaps(size)
	return err
}

// commit writes a moment of the disk to the backing file.
func (c *crew) commit() error {
	o := qcow.CommitOptions{Empty: c.rng.IntN(2) == 0}
	begun := c.settle()
	err := c.img.Commit(c.ctx, o)
	ended := c.clock.Add(1)
	if err != nil {
		if c.open && len(c.kept) == 0 {
			return err
		}
		return refused(err, qcow.ErrInvalid)
	}
	if c.kind.below == nil || len(c.kept) > 0 {
		return errors.New("it is not refused")
	}
	target := c.kind.below[len(c.kind.below)-1]
	name := fmt.Sprintf("%d.%s", len(c.kind.below)-1, target.format())
	var content []byte
	if target.kind == "raw" {
		content = contentOf(c.t, c.files[name])
	} else if content, err = c.read(name, ""); err != nil {
		return err
	}
	return c.isMoment(content, window{begun, ended})
}

// rebase puts one of the other files behind the image, or none.
func (c *crew) rebase() error {
	o := qcow.RebaseOptions{Gate: c.files.gate, Passphrase: []byte(passphrase)}
	if other := c.pool[len(c.kind.below):]; len(other) > 0 && c.rng.IntN(3) > 0 {
		f := other[c.rng.IntN(len(other))]
		o.BackingFile, o.BackingFormat = f.name, f.format
	}
	c.hurdles.Add(1)
	err := c.img.Rebase(c.ctx, o)
	if len(c.kept) > 0 {
		return refused(err, qcow.ErrInvalid)
	}
	c.open = false
	return err
}

// stream pulls in what backing files hold while the crew, and what else is done to the image, goes on.
func (c *crew) stream() error {
	c.open = false
	c.streams.Wait()
	kept := len(c.kept)
	hurdles := c.hurdles.Load()
	c.streams.Go(func() {
		err := c.img.Stream(c.ctx, qcow.StreamOptions{Piece: c.cluster})
		if err != nil && !(errors.Is(err, qcow.ErrInvalid) && (kept > 0 || c.hurdles.Load() > hurdles)) {
			c.t.Errorf("stream: %v", err)
		}
	})
	return nil
}

// A crewBitmap is a bitmap, and what must be dirty in it.
type crewBitmap struct {
	name      string
	transient bool
	since     uint64 // deeds that began later are in it
	must      *dirtyModel
}

func (c *crew) addBitmap() error {
	if len(c.dirty) == 3 {
		return c.checkBitmaps()
	}
	c.made++
	b := &crewBitmap{name: fmt.Sprintf("bitmap %d", c.made), transient: c.version < 3 || c.rng.IntN(3) == 0}
	b.must = newDirtyModel(c.img.Size(), 512<<c.rng.IntN(6))
	if err := c.img.AddBitmap(c.ctx, b.name, qcow.BitmapOptions{Granularity: b.must.granularity, Transient: b.transient}); err != nil {
		return err
	}
	b.since = c.clock.Add(1)
	c.dirty = append(c.dirty, b)
	return nil
}

// changeBitmap clears, removes or merges bitmaps.
func (c *crew) changeBitmap() error {
	if len(c.dirty) == 0 {
		return nil
	}
	c.settle()
	i := c.rng.IntN(len(c.dirty))
	b, other := c.dirty[i], c.dirty[c.rng.IntN(len(c.dirty))]
	switch c.rng.IntN(3) {
	case 0:
		err := c.img.ClearBitmap(c.ctx, b.name)
		b.since = c.clock.Add(1)
		clear(b.must.dirty)
		return err
	case 1:
		c.dirty = slices.Delete(c.dirty, i, i+1)
		return c.img.RemoveBitmap(c.ctx, b.name)
	}
	b.must.merge(other.must)
	return c.img.MergeBitmap(c.ctx, b.name, other.name)
}

// sizeBitmaps gives the bitmaps the size of the disk.
func (c *crew) sizeBitmaps(size int64) {
	for _, b := range c.dirty {
		b.must.resize(size)
	}
}

// checkBitmaps expects that what the hands have done is in the bitmaps.
func (c *crew) checkBitmaps() error {
	c.settle()
	for _, b := range c.dirty {
		extents, err := dirtyExtents(c.img, b.name)
		if err != nil {
			return err
		}
		got := newDirtyModel(b.must.size, b.must.granularity)
		for _, e := range extents {
			got.note(e.Offset, e.Length)
		}
		for i, dirty := range b.must.dirty {
			if dirty && !got.dirty[i] {
				return fmt.Errorf("bitmap %q: %d bytes at %d were changed, and are not dirty", b.name, b.must.granularity, int64(i)*b.must.granularity)
			}
		}
	}
	return nil
}

// legal expects that a sector that the owners fight for holds what one of them wrote, as a whole.
func (tr *traffic) legal(p []byte, off int64) error {
	value := binary.BigEndian.Uint64(p)
	if id := value >> 32; id > uint64(len(tr.owners)) || value != 0 && id == 0 {
		return fmt.Errorf("the shared sector at %d holds %#x, which nobody wrote", off, value)
	}
	if i := firstDifference(p, sectorsOf(value, sector)); i >= 0 {
		return fmt.Errorf("the shared sector at %d is a mixture, from byte %d on", off, i)
	}
	return nil
}
