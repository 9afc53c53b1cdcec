package qcow

import (
	"fmt"

	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

const (
	defaultCacheBytes   = 8 << 20 // holds the L2 entries of 64 GiB in clusters of 64 KiB
	defaultReserveBytes = 16 << 20
)

// Options say how to open an image.
type Options struct {
	ReadOnly   bool
	CacheBytes int64 // of L2 tables and refcount blocks; 0 means 8 MiB
	// ReserveBytes bounds what is allocated ahead of use, and so what a crash leaks: at least one cluster; 0 means
	// 16 MiB. Allocating writes cost one sync for each so many bytes.
	ReserveBytes int64
}

// Open opens the image in f, whose format the caller knows to be qcow2: nothing is probed. On success Close closes f; on
// failure f stays open and unchanged.
//
// It fails with ErrUnsupported for every feature that is not implemented, and with ErrCorrupt when the header or
// a table it names is damaged, lies outside the file or overlaps another. An image marked dirty or corrupt can be opened
// read-only.
func Open(f storage.File, o Options) (*Image, error) {
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	header, err := readHeader(f, size)
	if err != nil {
		return nil, err
	}
	if err := supported(header, o.ReadOnly); err != nil {
		return nil, err
	}
	if o.CacheBytes <= 0 {
		o.CacheBytes = defaultCacheBytes
	}
	if o.ReserveBytes <= 0 {
		o.ReserveBytes = defaultReserveBytes
	}
	img := &Image{
		file:     f,
		readOnly: o.ReadOnly,
		geometry: header.Geometry,
		epochs:   newEpochs(),
		syncs:    newGroupSync(),
		metadata: metadataMap{geometry: header.Geometry, set: clusterSet{}},
		header:   *header,
		l1offset: header.L1Offset,
	}
	img.tables = newTableCache(img, o.CacheBytes)
	img.size.Store(int64(header.Size))
	img.alloc.img = img
	img.alloc.maxFill = max(uint64(o.ReserveBytes)>>header.ClusterBits, 1)
	img.alloc.nextFill = min(firstReserve, img.alloc.maxFill)
	img.alloc.end.Store(img.geometry.ClustersFor(uint64(size)))
	img.alloc.counts = refcounts{img: img, offset: header.RefcountTableOffset}
	if err := img.loadTables(uint64(size)); err != nil {
		return nil, err
	}
	if o.ReadOnly {
		return img, nil
	}
	if err := img.checkTail(); err != nil {
		return nil, err
	}
	if err := img.clearAutoclear(); err != nil {
		return nil, err
	}
	return img, nil
}

func readHeader(f storage.File, size int64) (*format.Header, error) {
	b := make([]byte, min(size, 1<<format.MaxClusterBits))
	if n, err := f.ReadAt(b, 0); n < len(b) {
		return nil, fmt.Errorf("read header: %w", err)
	}
	return format.DecodeHeader(b)
}

// supported refuses what this package would read or write wrongly.
func supported(h *format.Header, readOnly bool) error {
	const state = format.IncompatDirty | format.IncompatCorrupt
	if bits := h.Incompatible &^ state; bits != 0 {
		return format.Unsupportedf("header", 72, "incompatible features: %s", h.IncompatibleNames(bits))
	}
	switch {
	case h.BackingFile != "":
		return format.Unsupportedf("header", 8, "backing file %q", h.BackingFile)
	case h.CryptMethod != 0:
		return format.Unsupportedf("header", 32, "encryption method %d", h.CryptMethod)
	case h.Snapshots != 0:
		return format.Unsupportedf("header", 60, "%d internal snapshots", h.Snapshots)
	case h.Extension(format.ExtBitmaps) != nil:
		return format.Unsupportedf("header extension", 0, "persistent dirty bitmaps")
	case h.Incompatible&format.IncompatCorrupt != 0 && !readOnly:
		return format.Corruptf("header", 72, "the image is marked corrupt; it can be opened read-only, or repaired with qemu-img check -r all")
	case h.Incompatible&format.IncompatDirty != 0 && !readOnly:
		return format.Unsupportedf("header", 72, "the image is marked dirty: its refcounts must be rebuilt; it can be opened read-only, or repaired with qemu-img check -r all")
	}
	return nil
}

// loadTables reads the refcount table and the L1 table, and checks that both, and all tables that they point to, lie inside the file
// of size bytes, one beside the other.
func (img *Image) loadTables(size uint64) error {
	h := &img.header
	img.metadata.add(run{0, 1})
	var err error
	if img.alloc.counts.table, err = img.loadTable("refcount table", h.RefcountTableOffset, h.RefcountTableBytes(), size); err != nil {
		return err
	}
	if img.l1, err = img.loadTable("L1 table", h.L1Offset, h.L1Bytes(), size); err != nil {
		return err
	}
	for i := range uint64(len(img.alloc.counts.table)) / format.EntrySize {
		e := format.RefcountTableEntry(format.Entry(img.alloc.counts.table, i))
		at := h.RefcountTableOffset + format.HostOffset(i*format.EntrySize)
		if err := img.addPointed("refcount table", at, e.Offset(), e.Reserved(), size); err != nil {
			return err
		}
	}
	for i := range uint64(h.L1Entries) {
		e := format.L1Entry(format.Entry(img.l1, i))
		at := h.L1Offset + format.HostOffset(i*format.EntrySize)
		if err := img.addPointed("L1 table", at, e.Offset(), e.Reserved(), size); err != nil {
			return err
		}
	}
	if img.alloc.counts.block(0) == 0 {
		return format.Corruptf("refcount table", h.RefcountTableOffset, "no refcount block covers the header")
	}
	return nil
}

func (img *Image) loadTable(name string, off format.HostOffset, n, size uint64) ([]byte, error) {
	if uint64(off) > size || n > size-uint64(off) {
		return nil, format.Corruptf(name, off, "%d bytes reach past the end of the file at %d: it is truncated or damaged", n, size)
	}
	if n == 0 {
		return nil, nil
	}
	if err := img.metadata.addTable(name, run{img.geometry.ClusterOf(off), img.geometry.ClustersFor(n)}); err != nil {
		return nil, err
	}
	b := make([]byte, n)
	if err := readFull(img.file, b, off); err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	return b, nil
}

// addPointed checks the table that the entry at at points to, and remembers it as metadata.
func (img *Image) addPointed(name string, at, target format.HostOffset, reserved, size uint64) error {
	g := img.geometry
	switch {
	case reserved != 0:
		return format.Corruptf(name, at, "reserved bits %#x are set", reserved)
	case target == 0:
		return nil
	case !g.Aligned(target):
		return format.Corruptf(name, at, "points to %#x, which is not the start of a cluster", uint64(target))
	case uint64(target) > size || g.ClusterSize() > size-uint64(target):
		return format.Corruptf(name, at, "points to %#x, past the end of the file at %d: it is truncated or damaged", uint64(target), size)
	}
	return img.metadata.addTable(name, run{g.ClusterOf(target), 1})
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
	if img.header.Autoclear == 0 {
		return nil
	}
	if _, err := img.file.WriteAt(make([]byte, 8), format.AutoclearOffset); err != nil {
		return fmt.Errorf("clear autoclear features: %w", err)
	}
	if err := img.file.Sync(); err != nil {
		return fmt.Errorf("clear autoclear features: %w", err)
	}
	img.header.Autoclear = 0
	return nil
}
