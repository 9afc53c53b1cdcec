package qcow

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/qcow-csi/qcow-csi/qcow/codec"
	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/repair"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

const (
	defaultCacheBytes   = 8 << 20 // holds the L2 entries of 64 GiB in clusters of 64 KiB
	defaultReserveBytes = 256 << 20
)

// Options say how to open an image.
type Options struct {
	ReadOnly   bool
	CacheBytes int64 // of L2 tables and refcount blocks, at most; 0 means 8 MiB
	// Budget bounds the caches of several images together; nil means one of 128 MiB for the whole process.
	Budget *CacheBudget
	// ReserveBytes bounds what is allocated ahead of use: at least one cluster; 0 means 256 MiB. So much at the most a kill or a crash leaks, in
	// clusters that take no space on disk. An image that needs few clusters has few in reserve, 16 at first.
	ReserveBytes int64
	// Gate opens the backing file and the data file that the image names, and what these name in turn. Without one an image
	// that names any is ErrUnsupported.
	Gate Gate
	// WithoutBacking leaves the backing file out: what is absent from the image reads as zeroes. It needs ReadOnly.
	WithoutBacking bool
	// CommitDepth is the depth of the backing file that [Image.Commit] writes into, which is opened for writing therefore: 1 for the image's
	// own, 2 for the one behind that; 0 for none.
	CommitDepth int
	// Passphrase opens an encrypted image, and the encrypted ones of its chain.
	Passphrase []byte
	// Snapshot is the ID or the name of an internal snapshot to read in place of the disk's present content. It needs ReadOnly.
	Snapshot string
	// DetectZeroes makes WriteAt treat data that is all zeroes as WriteZeroes with leave to unmap.
	DetectZeroes bool
	// Journal, unless nil, is where links to data that is not durable yet are held back ([OpenJournal] of package storage): then copy-on-write and
	// the like cost no sync. What a killed process has left in it Open restores; see [Image.Restored]. It belongs to the image file, and is
	// closed with the image when Open has succeeded, and removed where that was closed clean. Without one such writes are made durable before they are linked. An image that is only read,
	// and one of version 2, do not use it.
	Journal Journal
	// BitmapBytes bounds the memory for the bits of dirty bitmaps; 0 means 2 GiB. Where what the image has does not fit, it has no bitmaps
	// any more when it is opened for writing; what does not fit later becomes dirty as a whole, in ranges of 65536 bits.
	BitmapBytes int64

	depth        int             // in a chain of backing files
	fillByTakers bool            // see reserve.byTakers
	ctx          context.Context // of OpenContext, for the files of the chain
}

// Open opens the image in f, whose format the caller knows to be qcow2: nothing is probed. On success Close closes f; on
// failure f stays open.
//
// It fails with ErrUnsupported for features that are not known, and with ErrCorrupt when the header or
// a table it names is damaged, lies outside the file or overlaps another. An image marked corrupt can be opened
// read-only. One marked dirty is repaired when it is opened for writing, unless something would have to be given up, which is ErrCorrupt and for
// the caller to decide (package repair); otherwise a failed Open leaves the file as it is.
func Open(f storage.File, o Options) (*Image, error) {
	return OpenContext(context.Background(), f, o)
}

// OpenContext is Open that ends with the error of ctx when that is done first: repairing an image takes time, and so does
// deriving the key of an encrypted one, as much as its header asks for.
func OpenContext(ctx context.Context, f storage.File, o Options) (_ *Image, err error) {
	o.ctx = ctx
	if (o.WithoutBacking || o.Snapshot != "") && !o.ReadOnly {
		return nil, format.Invalidf("a snapshot, or an image without its backing file, is only read")
	}
	header, size, err := readSound(ctx, f, o.ReadOnly)
	if err != nil {
		return nil, err
	}
	img := newImage(f, header, size, o)
	defer func() {
		if err != nil {
			img.tables.share.leave(img.tables)
			err = errors.Join(err, img.closeOthers())
		}
	}()
	if err := img.loadTables(uint64(size)); err != nil {
		return nil, err
	}
	if err := img.openOthers(o); err != nil {
		return nil, err
	}
	if err := img.openCipher(ctx, o.Passphrase); err != nil {
		return nil, err
	}
	if o.Snapshot != "" {
		return img, img.lookBack(o.Snapshot)
	}
	if o.ReadOnly {
		return img, nil
	}
	if err := errors.Join(img.checkTail(), img.alloc.keepTail()); err != nil {
		return nil, err
	}
	if err := img.keepBitmaps(uint64(size)); err != nil {
		return nil, err
	}
	if img.journal != nil {
		if err := img.takeJournal(img.journal); err != nil {
			return nil, err
		}
	}
	return img, img.clearAutoclear()
}

func newImage(f storage.File, header *format.Header, size int64, o Options) *Image {
	if o.CacheBytes <= 0 {
		o.CacheBytes = defaultCacheBytes
	}
	if o.ReserveBytes <= 0 {
		o.ReserveBytes = defaultReserveBytes
	}
	img := &Image{
		file:         f,
		data:         f,
		readOnly:     o.ReadOnly,
		detectZeroes: o.DetectZeroes,
		geometry:     header.Geometry,
		version:      header.Version,
		cryptMethod:  header.CryptMethod,
		compression:  codec.Type(header.CompressionType),
		epochs:       newEpochs(),
		syncs:        newGroupSync(),
		dataSyncs:    newGroupSync(),
		metadata:     metadataMap{geometry: header.Geometry, set: clusterSet{}},
		header:       *header,
		l1offset:     header.L1Offset,
	}
	if o.depth == 0 {
		img.journal = o.Journal
	}
	if o.Budget == nil {
		o.Budget = processBudget
	}
	if o.BitmapBytes <= 0 {
		o.BitmapBytes = defaultBitmapBytes
	}
	img.bitmaps.limit = o.BitmapBytes
	img.bitmaps.memory.left.Store(o.BitmapBytes)
	img.tables = newTableCache(img, o.CacheBytes, o.Budget)
	img.size.Store(int64(header.Size))
	img.alloc.img = img
	img.alloc.reserve = newReserve(&img.alloc.mu, max(uint64(o.ReserveBytes)>>header.ClusterBits, 1))
	img.alloc.reserve.byTakers = o.fillByTakers
	img.alloc.end.Store(img.geometry.ClustersFor(uint64(size)))
	img.alloc.counts = refcounts{img: img, offset: header.RefcountTableOffset}
	return img
}

// readSound reads the header of an image that this package can use. One that is marked dirty, and is to be written, it repairs first.
func readSound(ctx context.Context, f storage.File, readOnly bool) (*format.Header, int64, error) {
	for repaired := false; ; repaired = true {
		size, err := f.Size()
		if err != nil {
			return nil, 0, err
		}
		h, err := readHeader(f, size)
		if err != nil {
			return nil, 0, err
		}
		if err := supported(h, readOnly); err != nil {
			return nil, 0, err
		}
		if readOnly || h.Incompatible&format.IncompatDirty == 0 {
			return h, size, nil
		}
		if repaired {
			return nil, 0, format.Corruptf("header", format.IncompatibleOffset, "the image is still marked dirty after its repair")
		}
		if _, err := repair.Run(ctx, f, repair.Options{Mode: repair.All, Lossless: true}); err != nil {
			return nil, 0, fmt.Errorf("repair an image that is marked dirty: %w", err)
		}
	}
}

// openOthers opens the files that the image names.
func (img *Image) openOthers(o Options) error {
	h := &img.header
	if h.Incompatible&format.IncompatDataFile != 0 {
		if err := img.openDataFile(o); err != nil {
			return err
		}
	}
	if h.BackingFile == "" || o.WithoutBacking {
		return nil
	}
	b, err := openBacking(h, o)
	if err == nil {
		img.backing.Store(b)
	}
	return err
}

func (img *Image) closeOthers() error {
	err := img.under().close()
	if img.external() {
		err = errors.Join(err, img.data.Close())
	}
	return err
}

// readHeader reads the header and the extensions.
func readHeader(f storage.File, size int64) (*format.Header, error) {
	b := make([]byte, min(size, 1<<format.MaxClusterBits))
	if n, err := f.ReadAt(b, 0); n < len(b) {
		return nil, fmt.Errorf("read header: %w", err)
	}
	return format.DecodeHeader(b)
}

// supported refuses what this package would read or write wrongly.
func supported(h *format.Header, readOnly bool) error {
	const known = format.IncompatDirty | format.IncompatCorrupt | format.IncompatDataFile | format.IncompatCompression | format.IncompatExtendedL2
	switch {
	case h.Incompatible&^known != 0:
		return format.Unsupportedf("header", format.IncompatibleOffset, "incompatible features: %s", h.IncompatibleNames(h.Incompatible&^known))
	case h.CryptMethod > cryptLUKS:
		return format.Unsupportedf("header", 32, "encryption method %d", h.CryptMethod)
	case h.CompressionType > uint8(codec.Zstd):
		return format.Unsupportedf("header", 104, "compression type %d", h.CompressionType)
	case h.CryptMethod == cryptAES && !readOnly:
		return format.Unsupportedf("header", 32, "the legacy encryption method is only read: convert the image to LUKS")
	case h.Incompatible&format.IncompatCorrupt != 0 && !readOnly:
		return format.Corruptf("header", format.IncompatibleOffset, "the image is marked corrupt; it can be opened read-only, or repaired")
	}
	return nil
}

// checkTail looks for refcounts of clusters behind the end of the file. A power loss may leave some, without a cluster that is in
// use; but so does a file that was cut off, and growing that one would turn the lost clusters into zeroes.
func (img *Image) checkTail() error {
	end := format.Cluster(img.alloc.end.Load())
	perBlock := format.Cluster(img.geometry.BlockEntries())
	last := format.Cluster(uint64(len(img.alloc.counts.table))/format.EntrySize) * perBlock
	for c := end; c < last; c += perBlock - c%perBlock {
		if img.alloc.counts.block(c) == 0 {
			continue
		}
		x := run{c, uint64(perBlock - c%perBlock)}
		free, err := img.alloc.freeLength(x)
		if err != nil {
			return err
		}
		if free != x.n {
			return img.checkEntries()
		}
	}
	return nil
}

// checkEntries reads every L2 table and fails with ErrCorrupt when an entry points behind the end of the file.
func (img *Image) checkEntries() error {
	size := img.size.Load()
	for off := int64(0); off < size; {
		m, err := img.lookup(format.GuestOffset(off), uint64(size-off))
		if err != nil {
			return err
		}
		off += int64(m.length)
	}
	return nil
}

// clearAutoclear clears the autoclear bits, as every writer must that does not keep the features behind them valid.
func (img *Image) clearAutoclear() error {
	kept := img.header.Autoclear & format.AutoclearRawDataFile
	if len(img.bitmaps.list) > 0 {
		kept |= format.AutoclearBitmaps
	}
	if img.header.Autoclear == kept {
		return nil
	}
	b := make([]byte, 8)
	binary.BigEndian.PutUint64(b, kept)
	if _, err := img.file.WriteAt(b, format.AutoclearOffset); err != nil {
		return fmt.Errorf("clear autoclear features: %w", err)
	}
	if err := img.file.Sync(); err != nil {
		return fmt.Errorf("clear autoclear features: %w", err)
	}
	img.header.Autoclear = kept
	return nil
}
