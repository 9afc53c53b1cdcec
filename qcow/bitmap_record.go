package qcow

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// recording is the bitmaps that record what changes. A request notes what it is going to change when it has entered its epoch; so an
// operation on bitmaps, which freezes the image, finds in them all that has been changed, and whatever is changed later comes after it.
type recording struct {
	list  []*bitmap
	ready atomic.Bool // the image file says in_use of each

	mu sync.Mutex // held while it is made to
}

// newRecording returns what records for a list of bitmaps, nil if none does.
func newRecording(list []*bitmap) *recording {
	r := &recording{}
	marked := true
	for _, b := range list {
		if b.records() {
			r.list = append(r.list, b)
			marked = marked && (b.inUse || b.transient)
		}
	}
	if len(r.list) == 0 {
		return nil
	}
	r.ready.Store(marked)
	return r
}

// records reports whether changes are recorded in the bitmap, or ought to be.
func (b *bitmap) records() bool { return b.enabled && (b.bits != nil || len(b.extra) > 0) }

// record notes in bitmaps that a request, inside its epoch, is going to change n bytes at off.
func (img *Image) record(off, n int64) error {
	if r := img.bitmaps.recording.Load(); r != nil {
		return r.note(img, uint64(off), uint64(n))
	}
	return nil
}

// note records that a guest request changes n bytes at off. What it records in is in_use in the image file by then, durably.
func (r *recording) note(img *Image, off, n uint64) error {
	if !r.ready.Load() {
		if err := r.mark(img); err != nil {
			return err
		}
	}
	for _, b := range r.list {
		if n > 0 && b.bits != nil {
			b.note(off, n)
		}
	}
	return nil
}

// Where a bitmap's flags are in its entry of the directory. They never lie in two sectors, so that each entry on disk has the old flags or the
// new ones.
const bitmapFlagsAt = 12

// mark makes the image file say, durably, that the bitmaps which record are in_use. Where that can't be written it takes the
// autoclear bit away: nobody uses any of them then until they are saved.
func (r *recording) mark(img *Image) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ready.Load() {
		return nil
	}
	k := &img.bitmaps
	b := slices.Clone(k.directory)
	first, end, at := len(b), 0, 0
	for _, m := range k.list {
		if m.transient {
			continue
		}
		if m.records() {
			flags := b[at+bitmapFlagsAt:]
			binary.BigEndian.PutUint32(flags, binary.BigEndian.Uint32(flags)|format.BitmapInUse)
			first, end = min(first, at), at+bitmapFlagsAt+4
			m.inUse = true // from here on the image file may say so, whatever fails
		}
		at += m.entryBytes()
	}
	_, err := img.file.WriteAt(b[first:end], int64(k.directoryAt)+int64(first))
	if err == nil {
		err = img.sync()
	} else if disowned := img.disownBitmaps(); disowned == nil {
		err = nil
	} else {
		err = errors.Join(err, disowned)
	}
	if err != nil {
		return fmt.Errorf("mark bitmaps in use: %w", err)
	}
	k.directory = b
	r.ready.Store(true)
	return nil
}

// entryBytes returns how long the bitmap's entry of the directory is.
func (b *bitmap) entryBytes() int {
	return len(format.EncodeBitmaps([]format.Bitmap{{Name: b.name, Extra: b.extra}}))
}

// disownBitmaps clears the autoclear bit that says that the bitmaps are valid, durably.
func (img *Image) disownBitmaps() error {
	img.headerMu.Lock()
	defer img.headerMu.Unlock()
	field := func(bits uint64) []byte { return binary.BigEndian.AppendUint64(nil, bits) }
	autoclear := img.header.Autoclear &^ format.AutoclearBitmaps
	if err := img.overwrite(format.AutoclearOffset, field(img.header.Autoclear), field(autoclear)); err != nil {
		return fmt.Errorf("clear autoclear features: %w", err)
	}
	if err := img.sync(); err != nil {
		return err
	}
	img.header.Autoclear = autoclear
	return nil
}
