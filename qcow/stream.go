package qcow

import (
	"context"
	"math"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// defaultPiece is how many bytes are copied between two syncs.
const defaultPiece = 4 << 20

// StreamOptions say what Stream pulls into an image.
type StreamOptions struct {
	// Base is the depth of the file that becomes the image's backing file (see [Image.Chain]): what that file and those behind it hold stays
	// there. 0 pulls in everything, and the image has no backing file any more.
	Base int
	// BaseName is what the header calls that file then; empty means as it is called now, by an image that may lie in another folder.
	BaseName string
	// Piece is how many bytes are copied between two syncs, at least one cluster; 0 means 4 MiB. A request for a part of them that has no
	// cluster yet may have to wait so long.
	Piece int64
	// Throttle, unless nil, is told of every n bytes that were copied, and slows the stream down by not returning. Its error ends
	// the stream.
	Throttle func(ctx context.Context, n int64) error
	// Progress, unless nil, is told how many bytes of the virtual disk of how many are dealt with.
	Progress func(done, total int64)
}

// Stream copies what backing files hold, as far as the image shows it, into the image, and then drops them from its chain and closes
// them: all, or those before Base. What the disk reads as does not change. Requests go on meanwhile, and so do other operations on the
// image, between two pieces. A crash leaves an image with the old chain or the new one, valid with either.
//
// When ctx is done Stream returns its error; what was copied stays, and the next Stream goes on from there. It fails with ErrInvalid where
// there is no such base, and on an image with internal snapshots: these need the backing files as well.
func (img *Image) Stream(ctx context.Context, o StreamOptions) error {
	s, err := img.newStream(o)
	if err != nil || s.top == s.base {
		return err
	}
	for {
		copied, done, err := s.step(ctx)
		if err != nil || done {
			return err
		}
		if o.Progress != nil {
			o.Progress(s.reached, max(s.reached, img.Size()))
		}
		if o.Throttle != nil && copied > 0 {
			if err := o.Throttle(ctx, copied); err != nil {
				return err
			}
		}
	}
}

// stream is a Stream under way.
type stream struct {
	img   *Image
	o     StreamOptions
	top   *backing // the first file that is pulled in
	base  *backing // the first that is not; nil: there is none
	depth int      // of base; more than any where there is none

	pos     int64    // before it nothing is left to copy, unless the disk has been made smaller and larger again
	reached int64    // the largest pos
	queue   []Extent // what comes next, from pos on; perhaps no longer so, then nothing is to be copied there
	buffer  []byte
}

func (img *Image) newStream(o StreamOptions) (*stream, error) {
	epoch := img.epochs.enter()
	defer img.epochs.leave(epoch)
	s := &stream{img: img, o: o, top: img.under(), depth: math.MaxInt}
	if o.Piece <= 0 {
		o.Piece = defaultPiece
	}
	cluster := int64(img.geometry.ClusterSize())
	s.o.Piece = max(o.Piece/cluster, 1) * cluster
	s.buffer = make([]byte, s.o.Piece)
	if o.Base == 0 {
		return s, nil
	}
	s.depth, s.base = o.Base, s.top
	for d := 1; d < o.Base && s.base != nil; d++ {
		s.base = s.base.next()
	}
	if o.Base < 0 || s.base == nil {
		return nil, format.Invalidf("the chain of backing files has no file at depth %d", o.Base)
	}
	if s.o.BaseName == "" {
		s.o.BaseName = s.base.name
	}
	return s, mustBeBacking(s.o.BaseName, s.base.format)
}

// step copies a piece, or, where nothing is left, changes the chain.
func (s *stream) step(ctx context.Context) (copied int64, done bool, err error) {
	img := s.img
	end, err := img.maintain(ctx)
	if err != nil {
		return 0, false, err
	}
	defer end()
	switch {
	case img.under() != s.top:
		return 0, false, format.Invalidf("the chain of backing files was changed meanwhile")
	case len(img.snapshots) > 0:
		return 0, false, format.Invalidf("the image has internal snapshots, which need its backing file")
	}
	for {
		from := s.pos
		copied, err := s.piece(ctx)
		if s.reached = max(s.reached, s.pos); err != nil || copied > 0 {
			return copied, false, err
		}
		if from == 0 { // the whole disk was looked at, and nothing was missing
			return 0, true, s.finish()
		}
		s.pos, s.queue = 0, nil
	}
}

// piece copies what comes next, and returns how many bytes that was.
func (s *stream) piece(ctx context.Context) (copied int64, err error) {
	a := adoption{img: s.img}
	for copied < s.o.Piece {
		start, stop, nextErr := s.next(ctx, s.o.Piece-copied)
		if err = nextErr; err != nil || start == stop {
			break
		}
		b := s.buffer[:stop-start]
		if err = s.top.readAt(b, start); err != nil {
			break
		}
		if err = a.add(b, start); err != nil {
			break
		}
		copied += stop - start
	}
	return copied, a.finish(err)
}

// next moves pos behind the first range, in whole subclusters, that files before base hold and the image does not, at most so many bytes
// of it, and returns it; where there is none, the end of the disk twice.
func (s *stream) next(ctx context.Context, most int64) (start, stop int64, err error) {
	size, unit := s.img.Size(), int64(s.img.geometry.SubclusterSize())
	for s.pos < size && stop-start < most {
		if err := s.look(ctx, size); err != nil {
			return 0, 0, err
		}
		e := s.queue[0]
		wanted, err := s.wants(&e)
		if err != nil {
			return 0, 0, err
		}
		switch {
		case !wanted && start < stop:
			s.pos = stop
			return start, stop, nil
		case !wanted:
			s.pos = e.Offset + e.Length
			continue
		case start == stop:
			start = s.pos / unit * unit
		}
		stop = min((e.Offset+e.Length+unit-1)/unit*unit, size, start+most)
		s.pos = stop
	}
	if start == stop {
		s.pos = size
		return size, size, nil
	}
	return start, stop, nil
}

// look makes the queue begin at pos.
func (s *stream) look(ctx context.Context, size int64) error {
	for len(s.queue) > 0 && s.queue[0].Offset+s.queue[0].Length <= s.pos {
		s.queue = s.queue[1:]
	}
	if len(s.queue) > 0 && s.queue[0].Offset < size {
		return nil
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	var err error
	s.queue, err = s.img.collectInEpoch(make([]Extent, 0, extentBatch), s.pos, size-s.pos, 0)
	return err
}

// wants tells whether e comes from a file that is to be pulled in, and would read otherwise without that.
func (s *stream) wants(e *Extent) (bool, error) {
	switch {
	case e.Depth >= s.depth, e.Depth == 0 && e.Kind != ExtentUnallocated:
		return false, nil
	case e.stored():
		return true, nil
	case e.Kind == ExtentUnallocated && e.Depth == s.depth-1: // base ends before it
		return false, nil
	}
	n, zero, err := s.base.zeroRun(e.Offset, e.Length)
	return !zero || n < e.Length, err
}

// finish drops the files that nothing comes from any more.
func (s *stream) finish() error {
	img := s.img
	name, backingFormat := "", ""
	if s.base != nil {
		name, backingFormat = s.o.BaseName, s.base.format
	}
	if err := img.changeHeader(func(h *format.Header) { setBacking(h, name, backingFormat) }); err != nil {
		return err
	}
	old := img.replaceBacking(s.base)
	for b := old; s.base != nil && b != s.base; b = b.next() {
		if b.next() == s.base {
			b.img.backing.Store(nil)
			break
		}
	}
	if s.o.Progress != nil {
		s.o.Progress(img.Size(), img.Size())
	}
	return old.close()
}
