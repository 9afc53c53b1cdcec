package qcow

import (
	"errors"
	"fmt"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// defaultBitmapBytes bounds the memory for the bitmaps of an image: four of the largest that there can be, with every second bit set.
const defaultBitmapBytes = 2 << 30

// errBitmapMemory says that the bitmaps of an image need more memory than they may have.
var errBitmapMemory = errors.New("the bitmaps of the image need too much memory")

// keepBitmaps loads the bitmaps of an image that is opened for writing. Where there is not the memory to keep them valid it gives them up: then
// clearAutoclear says so.
func (img *Image) keepBitmaps(size uint64) error {
	img.bitmaps.loaded = true
	err := img.loadBitmaps(size)
	if errors.Is(err, errBitmapMemory) {
		img.bitmaps.memory.left.Store(img.bitmaps.limit)
		return nil
	}
	return err
}

// loadBitmaps reads the bitmaps, unless the image says that they are not valid, and remembers their clusters as metadata. The file has size
// bytes.
func (img *Image) loadBitmaps(size uint64) error {
	if img.header.Autoclear&format.AutoclearBitmaps == 0 {
		return nil
	}
	ext, err := img.header.Bitmaps()
	if ext == nil || err != nil {
		return err
	}
	k := &img.bitmaps
	directory, err := img.loadBitmapTable("bitmap directory", ext.DirectoryOffset, ext.DirectorySize, size)
	if err != nil {
		return err
	}
	entries, err := format.DecodeBitmaps(directory, ext.Count)
	if err != nil {
		return fmt.Errorf("at %#x: %w", uint64(ext.DirectoryOffset), err)
	}
	list := make([]*bitmap, len(entries))
	for i := range entries {
		if list[i], err = img.loadBitmap(&entries[i], ext.DirectoryOffset, size); err != nil {
			return err
		}
	}
	k.directory, k.directoryAt = directory, ext.DirectoryOffset
	k.list = list
	k.recording.Store(newRecording(list))
	return nil
}

// loadBitmapTable is loadTable for one that may lie at any place and needs memory of the bitmaps.
func (img *Image) loadBitmapTable(name string, off format.HostOffset, n, size uint64) ([]byte, error) {
	if !img.geometry.Aligned(off) {
		return nil, format.Corruptf(name, off, "it is not at the start of a cluster")
	}
	if !img.bitmaps.memory.take(int64(n)) {
		return nil, errBitmapMemory
	}
	return img.loadTable(name, off, n, size)
}

// loadBitmap reads what an entry of the directory, which is at directory, describes.
func (img *Image) loadBitmap(e *format.Bitmap, directory format.HostOffset, size uint64) (*bitmap, error) {
	g := img.geometry
	b := &bitmap{
		name:        e.Name,
		granularity: e.GranularityBits,
		enabled:     e.Flags&format.BitmapAuto != 0,
		flags:       e.Flags &^ (format.BitmapAuto | format.BitmapInUse),
		extra:       e.Extra,
		inUse:       e.Flags&format.BitmapInUse != 0,
	}
	length := b.length(img.header.Size)
	// One that was not saved may have the size that the disk had before.
	if entries := uint64(e.TableEntries); entries<<g.ClusterBits > format.MaxBitmapDataBytes ||
		!b.inUse && (length > maxBits || entries != g.ClustersFor((length+7)/8)) {
		return nil, format.Corruptf("bitmap directory", directory, "bitmap %q: a table of %d entries", b.name, entries)
	}
	table, err := img.loadBitmapTable("bitmap table", e.TableOffset, uint64(e.TableEntries)*format.EntrySize, size)
	if err != nil {
		return nil, fmt.Errorf("bitmap %q: %w", b.name, err)
	}
	b.stored = &storedBitmap{at: e.TableOffset, table: table}
	if err := img.loadBitmapEntries(b, size); err != nil {
		return nil, fmt.Errorf("bitmap %q: %w", b.name, err)
	}
	if b.inUse || len(b.extra) > 0 && b.flags&format.BitmapExtraCompatible == 0 {
		return b, nil
	}
	if !img.bitmaps.memory.take(bitSetBytes) {
		return nil, errBitmapMemory
	}
	b.bits = &bitSet{memory: &img.bitmaps.memory}
	if err := img.loadBits(b, length); err != nil {
		return nil, fmt.Errorf("bitmap %q: %w", b.name, err)
	}
	return b, nil
}

// loadBitmapEntries checks the clusters with a bitmap's bits, and remembers them as metadata.
func (img *Image) loadBitmapEntries(b *bitmap, size uint64) error {
	for i := range uint64(len(b.stored.table)) / format.EntrySize {
		e := format.BitmapTableEntry(format.Entry(b.stored.table, i))
		at := b.stored.at + format.HostOffset(i*format.EntrySize)
		if err := img.addPointed("bitmap table", at, e.Offset(), e.Reserved(), size); err != nil {
			return err
		}
	}
	return nil
}

// loadBits reads the bits, length of them.
func (img *Image) loadBits(b *bitmap, length uint64) error {
	g := img.geometry
	cluster := make([]byte, g.ClusterSize())
	perCluster := g.ClusterSize() * 8
	for i := range uint64(len(b.stored.table)) / format.EntrySize {
		e := format.BitmapTableEntry(format.Entry(b.stored.table, i))
		first := i * perCluster
		switch end := min(first+perCluster, length); {
		case e.AllOnes():
			b.bits.add(first, end)
		case e.Offset() == 0:
		default:
			if err := readFull(img.file, cluster, e.Offset()); err != nil {
				return fmt.Errorf("read bitmap data at %#x: %w", uint64(e.Offset()), err)
			}
			if !b.bits.decode(cluster, first, end) {
				return errBitmapMemory
			}
		}
	}
	b.bits.changed.Store(false)
	return nil
}
