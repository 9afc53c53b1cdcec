package qcow

import (
	"context"
	"errors"
	"fmt"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

const (
	maxCommitCopy = 1 << 20 // bytes that are copied at once
	maxCommitZero = 1 << 30 // bytes that are zeroed at once
)

// CommitOptions say how Commit leaves an image behind.
type CommitOptions struct {
	// Empty takes everything out of the image when it is in the backing file, durably: from then on the image reads what that reads. It needs
	// a CommitDepth of 1.
	Empty bool
	// Progress, unless nil, is told how many bytes of the virtual disk of how many are dealt with.
	Progress func(done, total int64)
}

// Commit writes what the disk reads as, where the image or a backing file before the one at [Options].CommitDepth says so, into that one, which
// grows where it is smaller than the disk. Behind the end of the disk it keeps what it has. All of that is durable when Commit returns nil.
// Requests that change the image wait meanwhile; reads go on, and see no change. Until everything is durable the image keeps all that it
// has, so a crash at any point loses nothing, nor does an error: Commit can be called again. When ctx is done it returns its error.
//
// Other images on the same backing file, and those between it and this image, read otherwise afterwards than before. Commit fails with
// ErrInvalid where one of the images that it takes from has internal snapshots, since these would too, and where no file was opened to
// be written into.
func (img *Image) Commit(ctx context.Context, o CommitOptions) error {
	end, err := img.maintain(ctx)
	if err != nil {
		return err
	}
	defer end()
	c, err := img.newCommit(&o)
	if err != nil {
		return err
	}
	thaw := img.freeze()
	defer thaw()
	if err := c.run(ctx, o.Progress); err != nil {
		return fmt.Errorf("commit to backing file %q: %w", c.target.name, err)
	}
	if !o.Empty || !img.everAllocated() {
		return nil
	}
	resume, err := img.stopSplices(ctx)
	if err != nil {
		return err
	}
	defer resume()
	return img.empty()
}

// commit is a Commit under way.
type commit struct {
	img    *Image
	target *backing
	depth  int // of target
	buffer []byte
}

func (img *Image) newCommit(o *CommitOptions) (*commit, error) {
	c := &commit{img: img, target: img.under(), depth: 1}
	for from := img; c.target != nil; c.depth++ {
		if len(from.snapshots) > 0 {
			return nil, format.Invalidf("an image with internal snapshots, which need its backing file as it is, can't be committed")
		}
		if c.target.writable {
			break
		}
		from, c.target = c.target.img, c.target.next()
	}
	switch {
	case c.target == nil:
		return nil, format.Invalidf("no backing file was opened to be written into")
	case o.Empty && c.depth > 1:
		return nil, format.Invalidf("the image is needed: it hides what is in the file behind it")
	}
	return c, nil
}

func (c *commit) run(ctx context.Context, progress func(done, total int64)) error {
	img := c.img
	size := img.Size()
	if err := c.target.grow(ctx, size); err != nil {
		return err
	}
	extents := make([]Extent, 0, extentBatch)
	for off := int64(0); off < size; {
		var err error
		if extents, err = img.collectInEpoch(extents[:0], off, size-off, 0); err != nil {
			return err
		}
		for _, e := range extents {
			if err := c.extent(ctx, &e); err != nil {
				return err
			}
			off = e.Offset + e.Length
			if progress != nil {
				progress(off, size)
			}
		}
	}
	return c.target.flush()
}

// extent writes what e describes into the target, unless it is there.
func (c *commit) extent(ctx context.Context, e *Extent) error {
	if e.Depth >= c.depth || e.Kind == ExtentUnallocated && e.Depth == c.depth-1 {
		return nil
	}
	for off, end := e.Offset, e.Offset+e.Length; off < end; {
		if err := errors.Join(ctx.Err(), c.img.usable()); err != nil {
			return err
		}
		n := min(end-off, maxCommitZero)
		var err error
		if e.stored() {
			n = min(n, maxCommitCopy)
			err = c.copy(off, n)
		} else {
			err = c.target.zero(off, n)
		}
		if err != nil {
			return err
		}
		off += n
	}
	return nil
}

func (c *commit) copy(off, n int64) error {
	if c.buffer == nil {
		c.buffer = make([]byte, maxCommitCopy)
	}
	b := c.buffer[:n]
	if _, err := c.img.ReadAt(b, off); err != nil {
		return err
	}
	if isZero(b) {
		return c.target.zero(off, n)
	}
	return c.target.write(b, off)
}

// empty takes everything out of the image at once.
func (img *Image) empty() error {
	err := img.underShadow(func(s *shadow) (func(*format.Header), func(), error) {
		if err := s.dropTables(img.l1, img.l1offset); err != nil {
			return nil, nil, err
		}
		return s.replaceL1(make([]byte, len(img.l1)), uint64(img.Size()), img.snapshots)
	})
	if err != nil || !img.external() {
		return err
	}
	return img.data.PunchHole(0, img.Size())
}
