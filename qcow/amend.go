package qcow

import (
	"context"
	"fmt"

	"github.com/qcow-csi/qcow-csi/qcow/codec"
	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/luks"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// AmendOptions say what of an image is to change. The zero value of each field leaves it as it is.
type AmendOptions struct {
	// Version is 2 or 3. What version 2 can't say is turned into what it can, where the disk reads the same then: clusters that are
	// marked as zeroes are unlinked, or allocated where there is a backing file. What else it has no place for is ErrInvalid.
	Version       int
	RefcountBits  int   // 1, 2, 4, 8, 16, 32 or 64; in version 2 only 16
	LazyRefcounts *bool // only version 3 has them

	DataFileName string // of an image with an external data file: what the image calls it
	DataFileRaw  *bool  // whether the data file is always a raw image of the disk; it can cease to be one, but not become one

	// Passphrase is one that opens the image. It is needed with AddPassphrase, and where zeroes have to be written to an encrypted
	// image to make it version 2.
	Passphrase []byte
	// AddPassphrase is stored in the first key slot that is not in use.
	AddPassphrase []byte
	KeyOptions    luks.KeyOptions // of AddPassphrase
	// RemovePassphrase is taken from each key slot that it opens, after AddPassphrase was stored. The last slot in use stays: what
	// asks for that is ErrInvalid.
	RemovePassphrase []byte
	RemoveKeySlots   []int // by number; with the same care

	// Progress, unless nil, is called now and then with how many tables of how many the step under way has dealt with.
	Progress func(done, total int64)
}

// Amend changes properties of the image in f, which nobody else may have open. Other files are neither opened nor looked at. The disk,
// its snapshots and its bitmaps read the same after as before. It does one thing after the other: upgrade, keys, refcounts,
// downgrade. A crash leaves each of them done or not, and a valid image without leaks.
//
// What no image can have, or this one can't, is refused with ErrInvalid before anything is changed. An image that is
// marked dirty is repaired first. Errors of the key slots are those of [luks.AddKey] and [luks.RemoveKey], and ErrPassphrase. When ctx ends, or the
// file fails, what was done stays.
func Amend(ctx context.Context, f storage.File, o AmendOptions) error {
	a := amendment{ctx: ctx, file: f, o: o}
	for _, step := range []func(img *Image) error{
		a.check, a.upgrade, a.changeKeys, a.changeRefcounts, a.expandZeroes, a.downgrade, (*Image).settle,
	} {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := a.withImage(step); err != nil {
			return fmt.Errorf("amend image: %w", err)
		}
	}
	return nil
}

// amendment is what the steps of Amend share.
type amendment struct {
	ctx  context.Context
	file storage.File
	o    AmendOptions

	was     format.Header // when the amendment began
	version uint32        // that the image will have
	order   uint32        // log2 of the refcount width that it will have
	cipher  sectorCipher  // nil: not needed
	keys    keyChange
}

// withImage opens the image for one step, which finds in memory what the one before it has left on disk.
func (a *amendment) withImage(step func(img *Image) error) error {
	h, size, err := readSound(a.ctx, a.file, false)
	if err != nil {
		return err
	}
	img := newImage(a.file, h, size, Options{})
	defer img.tables.share.leave(img.tables)
	if err := img.loadTables(uint64(size)); err != nil {
		return err
	}
	if !h.DataFile { // there no guest data can be missing from this file
		if err := img.checkTail(); err != nil {
			return err
		}
	}
	return step(img)
}

// check refuses what can't be done, as far as it can be known before.
func (a *amendment) check(img *Image) error {
	a.was = img.header
	a.version, a.order = a.was.Version, a.was.RefcountOrder
	h, o := &a.was, &a.o
	switch o.Version {
	case 0:
	case 2, 3:
		a.version = uint32(o.Version)
	default:
		return format.Invalidf("there is no version %d of the format", o.Version)
	}
	if o.RefcountBits != 0 {
		var err error
		if a.order, err = refcountOrder(o.RefcountBits); err != nil {
			return err
		}
	}
	switch {
	case a.version == 2 && a.order != format.DefaultRefcountOrder:
		return format.Invalidf("version 2 has refcounts of 16 bits, not %d", 1<<a.order)
	case a.version == 2 && o.LazyRefcounts != nil && *o.LazyRefcounts:
		return format.Invalidf("version 2 has no lazy refcounts")
	case !h.DataFile && o.DataFileName != "":
		return format.Invalidf("a name for the data file of an image without one")
	case o.DataFileRaw != nil && *o.DataFileRaw && h.Autoclear&format.AutoclearRawDataFile == 0:
		return format.Invalidf("a data file is not made a raw image of the disk by saying so")
	case a.changesKeys() && h.CryptMethod != cryptLUKS:
		return format.Invalidf("the image has no key slots")
	}
	if a.order != h.RefcountOrder {
		if _, err := newWidth(a.ctx, img, a.order); err != nil {
			return err
		}
	}
	if a.downgrades() {
		if err := a.checkDowngrade(img); err != nil {
			return err
		}
	}
	return a.planKeys(img)
}

func (a *amendment) downgrades() bool { return a.version < a.was.Version }

// checkDowngrade refuses to make an image version 2 that has what this version has not.
func (a *amendment) checkDowngrade(img *Image) error {
	h := &img.header
	bitmaps, err := h.Bitmaps()
	switch {
	case err != nil:
		return err
	case h.DataFile:
		return format.Invalidf("version 2 has no external data files")
	case h.ExtendedL2:
		return format.Invalidf("version 2 has no extended L2 entries")
	case bitmaps != nil:
		return format.Invalidf("version 2 has no bitmaps")
	}
	for _, s := range img.snapshots {
		if s.VMStateSize > 1<<32-1 || s.DiskSize != h.Size {
			return format.Invalidf("version 2 has no place for the sizes of snapshot %q", s.Name)
		}
	}
	found, err := a.survey(img)
	switch {
	case err != nil:
		return err
	case found.compressed && img.compression != codec.Deflate:
		return format.Invalidf("version 2 has no clusters with %v compression", img.compression)
	case found.zeroes && h.BackingFile != "" && h.CryptMethod == cryptLUKS:
		if err := img.openCipher(a.ctx, a.o.Passphrase); err != nil {
			return err
		}
		a.cipher = img.cipher
	}
	return nil
}

// upgrade makes the image version 3 if it shall be, and sets what only version 3 has.
func (a *amendment) upgrade(img *Image) error {
	if a.version < 3 {
		return nil
	}
	if img.version < 3 {
		if err := img.completeSnapshots(); err != nil {
			return err
		}
	}
	return img.changeHeader(func(h *format.Header) {
		if h.Version < 3 {
			h.Version = 3
			h.SetExtension(format.ExtFeatureNames, format.FeatureNames().Data)
		}
		h.Autoclear &= format.AutoclearBitmaps | format.AutoclearRawDataFile // others may depend on what changes here
		if lazy := a.o.LazyRefcounts; lazy != nil {
			h.Compatible &^= format.CompatLazyRefcounts
			if *lazy {
				h.Compatible |= format.CompatLazyRefcounts
			}
		}
		if raw := a.o.DataFileRaw; raw != nil && !*raw {
			h.Autoclear &^= format.AutoclearRawDataFile
		}
		if a.o.DataFileName != "" {
			h.SetExtension(format.ExtDataFile, []byte(a.o.DataFileName))
		}
	})
}

// downgrade makes the image version 2 if it shall be. Nothing in it needs version 3 any more.
func (a *amendment) downgrade(img *Image) error {
	if !a.downgrades() {
		return nil
	}
	return img.changeHeader(func(h *format.Header) {
		h.Version = 2
		h.Incompatible, h.Compatible, h.Autoclear = 0, 0, 0
		h.CompressionType = uint8(codec.Deflate)
		h.HeaderLength, h.UnknownFields = 0, nil
		h.SetExtension(format.ExtFeatureNames, nil)
	})
}
