package qcow

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync/atomic"

	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// maxChainDepth bounds how many files a chain of backing files has.
const maxChainDepth = 64

// The formats that a backing file can have.
const (
	formatQcow2 = "qcow2"
	formatRaw   = "raw"
)

// backing is what an image reads where it has nothing itself: another image, or a raw file. Behind its end it reads as zeroes; so does a
// nil one, everywhere. It never changes while it is read, except that Commit stores in it what the image above hides.
type backing struct {
	name     string       // as in the header of the image above
	format   string       // formatQcow2 or formatRaw
	writable bool         // Commit may write into it
	img      *Image       // nil for a raw file
	raw      storage.File // nil for an image
	rawSize  atomic.Int64 // bytes
}

// under returns the backing file, nil where there is none. A request asks for it inside its epoch, and after it has looked up that
// the image has nothing: then it finds the one that the lookup spoke of, or one that reads the same there.
func (img *Image) under() *backing { return img.backing.Load() }

// openBacking opens the backing file that h names.
func openBacking(h *format.Header, o Options) (*backing, error) {
	if o.depth+1 >= maxChainDepth {
		return nil, format.Corruptf("header", 8, "the chain of backing files is longer than %d: does it end where it began?", maxChainDepth)
	}
	o.depth++
	o.ReadOnly = o.depth != o.CommitDepth
	opened, err := o.Gate.open(Reference{Role: BackingFile, Name: h.BackingFile, Format: h.BackingFormat(), ReadOnly: o.ReadOnly})
	if err != nil {
		return nil, fmt.Errorf("backing file %q: %w", h.BackingFile, err)
	}
	b := &backing{name: h.BackingFile, format: opened.Format, writable: !o.ReadOnly}
	if err := b.open(&opened, o); err != nil {
		return nil, errors.Join(fmt.Errorf("backing file %q: %w", h.BackingFile, err), opened.File.Close())
	}
	return b, nil
}

// open makes use of a file that a gate has let through, with the options of the image above but for its depth.
func (b *backing) open(opened *Opened, o Options) (err error) {
	switch opened.Format {
	case formatRaw:
		size, err := opened.File.Size()
		b.raw = opened.File
		b.rawSize.Store(size)
		return err
	case formatQcow2:
		o.Gate, o.Snapshot, o.DetectZeroes = opened.Gate, "", false
		b.img, err = OpenContext(o.ctx, opened.File, o)
		return err
	case "":
		return format.Unsupportedf("header", 8, "the image does not say what format its backing file has, and formats are not guessed")
	}
	return format.Unsupportedf("header", 8, "backing file format %q", opened.Format)
}

func (b *backing) close() error {
	switch {
	case b == nil:
		return nil
	case b.img != nil:
		return b.img.Close()
	}
	return b.raw.Close()
}

// next returns the backing file of b.
func (b *backing) next() *backing {
	if b.img == nil {
		return nil
	}
	return b.img.under()
}

// size returns up to where b has bytes.
func (b *backing) size() int64 {
	switch {
	case b == nil:
		return 0
	case b.img != nil:
		return b.img.Size()
	}
	return b.rawSize.Load()
}

// readAt fills p with the bytes at off.
func (b *backing) readAt(p []byte, off int64) error {
	n := min(int64(len(p)), max(b.size()-off, 0))
	clear(p[n:])
	if n == 0 {
		return nil
	}
	var err error
	if b.img == nil {
		err = readPadded(b.raw, p[:n], format.HostOffset(off))
	} else {
		_, err = b.img.ReadAt(p[:n], off)
	}
	if err != nil {
		return fmt.Errorf("backing file %q: %w", b.name, err)
	}
	return nil
}

// worthSeeking is how many bytes of a raw backing file are worth asking the file system whether they are a hole.
const worthSeeking = 64 << 10

// readExtent is Image.ReadExtent for the bytes at off, which may lie behind the end of b.
func (b *backing) readExtent(p []byte, off int64) (n int, zero bool, err error) {
	inside := min(int64(len(p)), max(b.size()-off, 0))
	switch {
	case inside == 0:
		return len(p), true, nil
	case b.img != nil:
		n, zero, err = b.img.ReadExtent(p[:inside], off)
	default:
		n, zero, err = b.readRawExtent(p[:inside], off)
	}
	if err != nil {
		return 0, false, fmt.Errorf("backing file %q: %w", b.name, err)
	}
	return n, zero, nil
}

func (b *backing) readRawExtent(p []byte, off int64) (n int, zero bool, err error) {
	if len(p) >= worthSeeking {
		list, err := b.collectRaw(make([]Extent, 0, 1), off, int64(len(p)), 0)
		if err != nil {
			return 0, false, err
		}
		if p = p[:list[0].Length]; !list[0].stored() {
			return len(p), true, nil
		}
	}
	return len(p), false, readPadded(b.raw, p, format.HostOffset(off))
}

// splice is Image.Splice for the bytes at off, which may lie behind the end of b.
func (b *backing) splice(pipe int, off int64, n int) (moved int, err error) {
	inside := int(min(int64(n), max(b.size()-off, 0)))
	switch {
	case inside == 0:
		return 0, nil
	case b.img != nil:
		moved, err = b.img.Splice(pipe, off, inside)
	default:
		moved, err = b.raw.Splice(pipe, off, inside)
	}
	if err != nil {
		err = fmt.Errorf("backing file %q: %w", b.name, err)
	}
	return moved, err
}

// zeroRun returns how many bytes at off, at least 1 and at most n, are alike in that they read as zeroes, or may not, as far as the tables tell:
// it does not look at data.
func (b *backing) zeroRun(off, n int64) (length int64, zero bool, err error) {
	var list [8]Extent
	for length < n {
		extents, err := b.collect(list[:0], off+length, n-length, 0)
		if err != nil {
			return 0, false, err
		}
		for _, e := range extents {
			if length > 0 && zero == e.stored() {
				return length, zero, nil
			}
			zero = !e.stored()
			length += e.Length
		}
	}
	return length, zero, nil
}

// collect appends to list, which has a place left, what describes the first of n bytes at off, until the list is full. The image that asks is at
// depth-1 in its chain.
func (b *backing) collect(list []Extent, off, n int64, depth int) ([]Extent, error) {
	inside := min(n, max(b.size()-off, 0))
	var err error
	switch {
	case inside == 0:
	case b.img != nil:
		list, err = b.img.collectInEpoch(list, off, inside, depth)
	default:
		list, err = b.collectRaw(list, off, inside, depth)
	}
	if err != nil {
		return list, fmt.Errorf("backing file %q: %w", b.name, err)
	}
	if inside < n && len(list) < cap(list) {
		list = appendExtent(list, Extent{Offset: off + inside, Length: n - inside, Depth: depth - 1})
	}
	return list, nil
}

func (b *backing) collectRaw(list []Extent, off, n int64, depth int) ([]Extent, error) {
	for end := off + n; off < end && len(list) < cap(list); {
		start, stop, err := b.raw.NextData(off)
		if errors.Is(err, io.EOF) {
			start, stop, err = end, end, nil
		}
		if err != nil {
			return list, err
		}
		e := Extent{Offset: off, Length: min(end, start) - off, Kind: ExtentZero, Depth: depth}
		if start <= off {
			e = Extent{Offset: off, Length: min(end, stop) - off, Kind: ExtentData, Depth: depth, Host: format.HostOffset(off)}
		}
		list = appendExtent(list, e)
		off += e.Length
	}
	return list, nil
}

// write, zero, grow and flush are for the file that Commit writes into.

func (b *backing) write(p []byte, off int64) (err error) {
	if b.img == nil {
		_, err = b.raw.WriteAt(p, off)
	} else {
		_, err = b.img.WriteAt(p, off)
	}
	return err
}

func (b *backing) zero(off, n int64) error {
	if b.img == nil {
		return b.raw.PunchHole(off, n)
	}
	return b.img.WriteZeroes(off, n, true)
}

// grow makes b at least size bytes long.
func (b *backing) grow(ctx context.Context, size int64) error {
	switch {
	case size <= b.size():
		return nil
	case b.img != nil:
		return b.img.Resize(ctx, size)
	}
	if err := b.raw.Truncate(size); err != nil {
		return err
	}
	b.rawSize.Store(size)
	return nil
}

func (b *backing) flush() error {
	if b.img == nil {
		return b.raw.Sync()
	}
	return b.img.Flush()
}

// everAllocated is Info.Allocated of b; what can't be told counts as allocated.
func (b *backing) everAllocated() bool {
	switch {
	case b == nil:
		return false
	case b.img != nil:
		return b.img.Info().Allocated
	}
	_, _, err := b.raw.NextData(0)
	return !errors.Is(err, io.EOF)
}

// ChainFile is one file of the chain behind an image.
type ChainFile struct {
	Name   string // as the header of the image above it says
	Format string // "qcow2" or "raw"
	Size   int64  // virtual size in bytes
}

// Chain returns the chain of backing files, the image's own one first; nothing for an image without one, or opened without. The first
// has depth 1 in the sense of [Extent].
func (img *Image) Chain() []ChainFile {
	epoch := img.epochs.enter()
	defer img.epochs.leave(epoch)
	var chain []ChainFile
	for b := img.under(); b != nil; b = b.next() {
		chain = append(chain, ChainFile{Name: b.name, Format: b.format, Size: b.size()})
	}
	return chain
}

// mustBeBacking checks what a header is to say of a backing file. No name means none.
func mustBeBacking(name, backingFormat string) error {
	switch {
	case name == "" && backingFormat == "":
		return nil
	case backingFormat != formatQcow2 && backingFormat != formatRaw:
		return format.Invalidf("a backing file has the format %q or %q, not %q", formatQcow2, formatRaw, backingFormat)
	case len(name) > format.MaxBackingName:
		return format.Invalidf("the name of a backing file has %d bytes, more than %d", len(name), format.MaxBackingName)
	}
	return mustBePath(name)
}

// setBacking puts the name and the format of a backing file into a header.
func setBacking(h *format.Header, name, backingFormat string) {
	h.BackingFile = name
	h.SetExtension(format.ExtBackingFormat, nil)
	if name != "" {
		h.SetExtension(format.ExtBackingFormat, []byte(backingFormat))
	}
}

// replaceBacking makes b, nil for none, the backing file in memory. The old one is closed by whoever called, when it returns: nobody uses
// that any more.
func (img *Image) replaceBacking(b *backing) (old *backing) {
	old = img.backing.Swap(b)
	img.epochs.wait()
	return old
}
