package qcow

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"slices"

	"github.com/qcow-csi/qcow-csi/qcow/codec"
	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/luks"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// CreateOptions are the properties of a new image. The zero value of each field but Size asks for the default.
type CreateOptions struct {
	Size          int64      // virtual size in bytes, a multiple of 512; 0 is allowed
	ClusterSize   int        // bytes, a power of two from 512 to 2 MiB; default 64 KiB
	RefcountBits  int        // 1, 2, 4, 8, 16, 32 or 64; default 16
	Version       int        // 2 or 3; default 3. With 2 there is nothing of what follows down to DataFile, but backing files
	LazyRefcounts bool       // writers may update refcounts late, and mark the image dirty meanwhile; this package never does
	ExtendedL2    bool       // L2 entries with subclusters; clusters have 16 KiB at least
	Compression   codec.Type // of clusters that are stored compressed

	// BackingFile is what the image calls the file that it is a change of. The name is stored as it is and nothing is opened.
	BackingFile   string
	BackingFormat string // "qcow2", "raw", ...: at most 15 bytes, and needed where there is a BackingFile: formats are not guessed

	// DataFile holds the guest's data in place of the image's own file. It must be empty, unless KeepDataFile is set, is made
	// Size bytes long and stays open.
	DataFile     storage.File
	DataFileName string // what the image calls it; needed where there is a DataFile
	// DataFileRaw says that the data file is at any time also a raw image of the disk, and so that every cluster has its place
	// there from the start: at least PreallocationMetadata. Not with a BackingFile.
	DataFileRaw bool
	// KeepDataFile makes what the data file holds, which is not longer than Size, the content of the disk. It takes DataFileRaw, or
	// PreallocationMetadata, and no Encryption.
	KeepDataFile bool

	Encryption *EncryptionOptions // nil: none

	// Preallocation of the whole disk. Together with a BackingFile it takes ExtendedL2.
	Preallocation Preallocation

	// Progress, unless nil, is called now and then with how many bytes of how many were written or reserved.
	Progress func(done, total int64)
}

// EncryptionOptions say how a new image is encrypted: by the LUKS method, with the passphrase in the first key slot. The zero
// CreateOptions are good, but take some seconds: what a passphrase costs to try is measured.
type EncryptionOptions struct {
	Passphrase []byte
	luks.CreateOptions
}

// maxBackingFormat is the length in bytes of the longest name of a format that QEMU reads from an image.
const maxBackingFormat = 15

// geometry checks the sizes and returns what follows from them.
func (o CreateOptions) geometry() (format.Geometry, error) {
	g := format.Geometry{
		ClusterBits: format.DefaultClusterBits, RefcountOrder: format.DefaultRefcountOrder,
		ExtendedL2: o.ExtendedL2, DataFile: o.DataFile != nil,
	}
	if c := o.ClusterSize; c != 0 {
		if c < 1<<format.MinClusterBits || c > 1<<format.MaxClusterBits || bits.OnesCount(uint(c)) != 1 {
			return g, format.Invalidf("cluster size %d is not a power of two from %d to %d", c, 1<<format.MinClusterBits, 1<<format.MaxClusterBits)
		}
		g.ClusterBits = uint32(bits.TrailingZeros(uint(c)))
	}
	if o.RefcountBits != 0 {
		var err error
		if g.RefcountOrder, err = refcountOrder(o.RefcountBits); err != nil {
			return g, err
		}
	}
	if g.ExtendedL2 && g.ClusterBits < format.MinExtendedL2ClusterBits {
		return g, format.Invalidf("clusters of %d bytes are too small for extended L2 entries, which need %d", g.ClusterSize(), 1<<format.MinExtendedL2ClusterBits)
	}
	if o.Size < 0 || o.Size%format.SectorSize != 0 || uint64(o.Size) > g.MaxVirtualSize() {
		return g, format.Invalidf("size %d is negative, not a multiple of %d, or exceeds the limit of %d for clusters of %d bytes", o.Size, format.SectorSize, g.MaxVirtualSize(), g.ClusterSize())
	}
	return g, nil
}

// refcountOrder returns log2 of a refcount width.
func refcountOrder(width int) (uint32, error) {
	if width < 1 || width > 1<<format.MaxRefcountOrder || bits.OnesCount(uint(width)) != 1 {
		return 0, format.Invalidf("refcount width %d is not a power of two from 1 to %d", width, 1<<format.MaxRefcountOrder)
	}
	return uint32(bits.TrailingZeros(uint(width))), nil
}

// check refuses combinations that no image can have, or that QEMU would not make.
func (o *CreateOptions) check(g format.Geometry) error {
	switch {
	case o.Version != 0 && o.Version != 2 && o.Version != 3:
		return format.Invalidf("there is no version %d of the format", o.Version)
	case o.Compression > codec.Zstd:
		return format.Invalidf("%v is not known", o.Compression)
	case o.Preallocation > PreallocationFull:
		return format.Invalidf("%v is not known", o.Preallocation)
	}
	if o.Version == 2 {
		if err := o.checkVersion2(g); err != nil {
			return err
		}
	}
	switch {
	case o.BackingFile == "" && o.BackingFormat != "":
		return format.Invalidf("a backing format without a backing file")
	case o.BackingFile != "" && o.BackingFormat == "":
		return format.Invalidf("the backing file %q without its format, which is not guessed", o.BackingFile)
	case len(o.BackingFile) > format.MaxBackingName:
		return format.Invalidf("the name of the backing file has %d bytes, more than %d", len(o.BackingFile), format.MaxBackingName)
	case len(o.BackingFormat) > maxBackingFormat:
		return format.Invalidf("the backing format %q has more than %d bytes", o.BackingFormat, maxBackingFormat)
	case o.BackingFile != "" && o.DataFileRaw:
		return format.Invalidf("a data file that is a raw image together with a backing file")
	case o.BackingFile != "" && o.Preallocation != PreallocationOff && !o.ExtendedL2:
		return format.Invalidf("preallocation would hide the backing file, unless the image has extended L2 entries")
	}
	return o.checkDataFile()
}

// checkVersion2 refuses what version 2 has no place for.
func (o *CreateOptions) checkVersion2(g format.Geometry) error {
	var missing string
	switch {
	case g.RefcountOrder != format.DefaultRefcountOrder:
		missing = "refcounts of other than 16 bits"
	case o.LazyRefcounts:
		missing = "lazy refcounts"
	case o.ExtendedL2:
		missing = "extended L2 entries"
	case o.Compression != codec.Deflate:
		missing = "compression types"
	case o.DataFile != nil:
		missing = "external data files"
	default:
		return nil
	}
	return format.Invalidf("version 2 of the format has no %s, version 3 has", missing)
}

func (o *CreateOptions) checkDataFile() error {
	switch {
	case o.DataFile == nil && (o.DataFileName != "" || o.DataFileRaw || o.KeepDataFile):
		return format.Invalidf("properties of a data file without a data file")
	case o.DataFile == nil:
		return nil
	case o.DataFileName == "":
		return format.Invalidf("a data file without a name")
	case uint64(o.Size) > uint64(format.MaxHostOffset)-2<<format.MaxClusterBits:
		return format.Invalidf("size %d exceeds what an image can refer to in a data file", o.Size)
	case !o.KeepDataFile:
		return nil
	case o.Encryption != nil:
		return format.Invalidf("what a data file holds can't be kept where it is to be encrypted")
	case o.preallocation() != PreallocationMetadata:
		return format.Invalidf("what a data file holds is kept with preallocation=metadata, and not with %v", o.Preallocation)
	}
	return nil
}

// preallocation returns what is to be preallocated, asked for or not.
func (o *CreateOptions) preallocation() Preallocation {
	if o.DataFileRaw {
		return max(o.Preallocation, PreallocationMetadata)
	}
	return o.Preallocation
}

// Create formats f, which must be empty, as an image of which every byte reads as zero, or as the backing file does. It is
// durable when Create returns nil; before that f has no header, so a torn image is never taken for one. It fails with ErrInvalid on
// options that no image can have.
func Create(f storage.File, o CreateOptions) error {
	return CreateContext(context.Background(), f, o)
}

// CreateContext is Create that can be ended: what it leaves then, as with any error, is a file without a header.
func CreateContext(ctx context.Context, f storage.File, o CreateOptions) error {
	g, err := o.geometry()
	if err != nil {
		return err
	}
	if err := o.check(g); err != nil {
		return err
	}
	if err := mustEnd("file", f, 0); err != nil {
		return err
	}
	if o.DataFile != nil {
		most := int64(0)
		if o.KeepDataFile {
			most = o.Size
		}
		if err := mustEnd("data file", o.DataFile, most); err != nil {
			return err
		}
	}
	c := creation{ctx: ctx, file: f, data: f, o: &o}
	if o.DataFile != nil {
		c.data = o.DataFile
	}
	if e := o.Encryption; e != nil {
		if c.luks, c.cipher, err = luks.Create(ctx, e.Passphrase, e.CreateOptions); err != nil {
			return fmt.Errorf("encryption header: %w", err)
		}
	}
	if c.layout, err = newLayout(g, &o, uint64(len(c.luks))); err != nil {
		return err
	}
	if err := c.run(); err != nil {
		return fmt.Errorf("create image: %w", err)
	}
	return nil
}

// mustEnd refuses a file that has more than most bytes.
func mustEnd(what string, f storage.File, most int64) error {
	size, err := f.Size()
	if err != nil {
		return fmt.Errorf("length of the %s: %w", what, err)
	}
	if size > most {
		return format.Invalidf("the %s has %d bytes, more than %d: they would be lost", what, size, most)
	}
	return nil
}

// creation is the making of an image.
type creation struct {
	layout
	ctx    context.Context
	file   storage.File
	data   storage.File // where guest data goes
	o      *CreateOptions
	luks   []byte // the encryption header; nil: none
	cipher sectorCipher
}

// run writes everything but the first sector, makes that durable, and then makes a file an image with the write of one sector.
func (c *creation) run() error {
	header, err := c.header()
	if err != nil {
		return err
	}
	if err := c.file.Truncate(int64(c.end << c.ClusterBits)); err != nil {
		return err
	}
	if c.o.DataFile != nil {
		if err := c.data.Truncate(c.o.Size); err != nil {
			return fmt.Errorf("data file: %w", err)
		}
	}
	if err := makeParts(c.ctx, c.parts(header), c.o.Progress); err != nil {
		return err
	}
	if c.o.DataFile != nil {
		if err := c.data.Sync(); err != nil {
			return fmt.Errorf("data file: %w", err)
		}
	}
	if err := c.file.Sync(); err != nil {
		return err
	}
	if err := c.ctx.Err(); err != nil {
		return err
	}
	first := header[:min(len(header), format.SectorSize)]
	if _, err := c.file.WriteAt(first, 0); err != nil {
		// What a failed write leaves of a sector must not be taken for a header.
		_, again := c.file.WriteAt(make([]byte, len(first)), 0)
		return errors.Join(err, again)
	}
	return c.file.Sync()
}

// header returns the encoded header, with the names of the features if these fit.
func (c *creation) header() ([]byte, error) {
	o := c.o
	h := format.Header{
		Geometry:              c.Geometry,
		Version:               uint32(o.Version),
		Size:                  uint64(o.Size),
		BackingFile:           o.BackingFile,
		L1Entries:             uint32(c.l1Entries),
		L1Offset:              c.OffsetOf(c.l1At),
		RefcountTableOffset:   c.OffsetOf(c.tableAt),
		RefcountTableClusters: uint32(c.tableClusters),
		CompressionType:       uint8(o.Compression),
	}
	if o.BackingFormat != "" {
		h.SetExtension(format.ExtBackingFormat, []byte(o.BackingFormat))
	}
	if o.DataFile != nil {
		h.SetExtension(format.ExtDataFile, []byte(o.DataFileName))
	}
	if o.DataFileRaw {
		h.Autoclear |= format.AutoclearRawDataFile
	}
	if o.LazyRefcounts {
		h.Compatible |= format.CompatLazyRefcounts
	}
	if o.Compression != codec.Deflate {
		h.Incompatible |= format.IncompatCompression
	}
	if c.luks != nil {
		h.CryptMethod = cryptLUKS
		pointer := binary.BigEndian.AppendUint64(nil, uint64(c.OffsetOf(c.luksAt)))
		h.SetExtension(format.ExtFullDisk, binary.BigEndian.AppendUint64(pointer, uint64(len(c.luks))))
	}
	if h.Version == 2 {
		return h.Encode()
	}
	named := h
	named.Extensions = append(slices.Clone(h.Extensions), format.FeatureNames())
	if b, err := named.Encode(); err == nil {
		return b, nil
	}
	return h.Encode()
}
