package qcow

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// RebaseUnsafe makes the header of the image in f say that its backing file has this name and this format, "qcow2" or "raw"; an empty name and
// format mean that there is none. No other file is opened: whether the new backing file holds what the image needs is for the
// caller to know. It is durable when RebaseUnsafe returns nil; a crash leaves the old name or the new one. Nobody else may have the image
// open. It fails with ErrInvalid where the header has no room.
func RebaseUnsafe(f storage.File, name, backingFormat string) error {
	if err := mustBeBacking(name, backingFormat); err != nil {
		return err
	}
	size, err := f.Size()
	if err != nil {
		return err
	}
	h, err := readHeader(f, size)
	if err != nil {
		return err
	}
	if err := supported(h, true); err != nil {
		return err
	}
	if h.Incompatible&format.IncompatCorrupt != 0 {
		return format.Corruptf("header", format.IncompatibleOffset, "the image is marked corrupt")
	}
	if err := mayHaveBacking(h, name); err != nil {
		return err
	}
	cluster := make([]byte, h.ClusterSize())
	if err := readPadded(f, cluster, 0); err != nil {
		return fmt.Errorf("read header: %w", err)
	}
	setBacking(h, name, backingFormat)
	h.Autoclear &= format.AutoclearBitmaps | format.AutoclearRawDataFile // others may depend on what changes here
	writes, err := h.Rewrite(cluster)
	if err != nil {
		return err
	}
	for _, w := range writes {
		if _, err := f.WriteAt(w.Data, int64(w.Offset)); err != nil {
			return fmt.Errorf("write header: %w", err)
		}
		if err := f.Sync(); err != nil {
			return fmt.Errorf("write header: %w", err)
		}
	}
	return nil
}

// mayHaveBacking refuses a backing file for an image whose data file is to be read by itself.
func mayHaveBacking(h *format.Header, name string) error {
	if name != "" && h.DataFile && h.Autoclear&format.AutoclearRawDataFile != 0 {
		return format.Invalidf("an image whose external data file is valid as a raw image can't have a backing file")
	}
	return nil
}

// RebaseOptions say what Rebase puts behind an image.
type RebaseOptions struct {
	BackingFile   string // as the header is to name it; empty: none
	BackingFormat string // "qcow2" or "raw"; empty without BackingFile
	Gate          Gate   // opens the new chain
	Passphrase    []byte // opens the encrypted images of the new chain
	// Progress, unless nil, is told how many bytes of the virtual disk of how many are compared.
	Progress func(done, total int64)
}

// Rebase gives the image another backing file, or none. What the disk reads as does not change: where the old and the new chain differ, and the
// image has nothing itself, it gets a copy of what the old one has. Requests that change the image wait meanwhile; reads go on. A crash
// leaves an image with the old chain or the new one, valid with either. It reads both chains wherever the image has nothing; for a backing
// file that is in the chain already Stream does less.
//
// When ctx is done Rebase returns its error; the image is as before then, but for copies that it holds. It fails with ErrInvalid on an image
// with internal snapshots, which need the old chain.
func (img *Image) Rebase(ctx context.Context, o RebaseOptions) (err error) {
	if err := mustBeBacking(o.BackingFile, o.BackingFormat); err != nil {
		return err
	}
	end, err := img.maintain(ctx)
	if err != nil {
		return err
	}
	defer end()
	if len(img.snapshots) > 0 {
		return format.Invalidf("the image has internal snapshots, which need its backing file")
	}
	if err := mayHaveBacking(&img.header, o.BackingFile); err != nil {
		return err
	}
	after, err := img.openRebased(ctx, &o)
	if err != nil {
		return err
	}
	thaw := img.freeze() // in an image without a backing file, what is discarded would show the new one
	defer thaw()
	r := &rebase{img: img, before: img.under(), after: after}
	if err = r.run(ctx, o.Progress); err == nil {
		err = img.changeHeader(func(h *format.Header) { setBacking(h, o.BackingFile, o.BackingFormat) })
	}
	if err != nil {
		return errors.Join(err, after.close())
	}
	return img.replaceBacking(after).close()
}

// openRebased opens the new chain.
func (img *Image) openRebased(ctx context.Context, o *RebaseOptions) (*backing, error) {
	img.headerMu.Lock()
	h := img.header
	setBacking(&h, o.BackingFile, o.BackingFormat)
	_, _, err := img.planHeader(&h) // is there room? to be known before anything is copied
	img.headerMu.Unlock()
	if err != nil || o.BackingFile == "" {
		return nil, err
	}
	return openBacking(&h, Options{Gate: o.Gate, Passphrase: o.Passphrase, Budget: img.tables.share.budget, ctx: ctx})
}

// rebase is a Rebase under way.
type rebase struct {
	img           *Image
	before, after *backing
	old, new      []byte
}

func (r *rebase) run(ctx context.Context, progress func(done, total int64)) error {
	size := r.img.Size()
	for off := int64(0); off < size; {
		if err := errors.Join(ctx.Err(), r.img.usable()); err != nil {
			return err
		}
		n, err := r.step(off, size-off)
		if err != nil {
			return err
		}
		off += n
		if progress != nil {
			progress(off, size)
		}
	}
	return nil
}

// step deals with the first of n bytes at off, which is where a subcluster begins, and returns how many.
func (r *rebase) step(off, n int64) (int64, error) {
	img := r.img
	m, err := img.lookup(format.GuestOffset(off), uint64(n))
	if err != nil || !m.absent() {
		return int64(m.length), err
	}
	unit := int64(img.geometry.SubclusterSize())
	oldRun, oldZero, err := r.before.zeroRun(off, int64(m.length))
	if err != nil {
		return 0, err
	}
	newRun, newZero, err := r.after.zeroRun(off, int64(m.length))
	if err != nil {
		return 0, err
	}
	alike := min(oldRun, newRun)
	if alike < int64(m.length) {
		alike = alike / unit * unit
	}
	if oldZero && newZero && alike > 0 {
		return alike, nil
	}
	n = min(int64(m.length), defaultPiece)
	return n, r.compare(off, n)
}

// compare gives the image a copy of the subclusters, among n bytes at off, that differ.
func (r *rebase) compare(off, n int64) error {
	if int64(len(r.old)) < n {
		r.old, r.new = make([]byte, n), make([]byte, n)
	}
	before, after := r.old[:n], r.new[:n]
	if err := r.before.readAt(before, off); err != nil {
		return err
	}
	if err := r.after.readAt(after, off); err != nil {
		return err
	}
	unit := int64(r.img.geometry.SubclusterSize())
	differ := func(at int64) bool {
		return at < n && !bytes.Equal(before[at:min(at+unit, n)], after[at:min(at+unit, n)])
	}
	a := adoption{img: r.img}
	var err error
	for at := int64(0); at < n && err == nil; at += unit {
		start := at
		for differ(at) {
			at += unit
		}
		if start < at {
			err = a.add(before[start:min(at, n)], off+start)
		}
	}
	return a.finish(err)
}
