package format

import (
	"encoding/binary"
	"slices"
)

const bitmapsExtension = 24 // bytes of a bitmaps extension

// BitmapsExtension points to the directory of the persistent bitmaps (specification, "Bitmaps extension").
type BitmapsExtension struct {
	Count           uint32 // at least 1
	DirectorySize   uint64 // bytes
	DirectoryOffset HostOffset
}

// DecodeBitmapsExtension decodes the data of an ExtBitmaps extension. It checks everything but whether the
// directory starts at a cluster, and lies inside the file.
func DecodeBitmapsExtension(b []byte) (*BitmapsExtension, error) {
	if len(b) != bitmapsExtension {
		return nil, Corruptf("header extension", 0, "bitmaps extension of %d bytes, not %d", len(b), bitmapsExtension)
	}
	e := BitmapsExtension{
		Count:           binary.BigEndian.Uint32(b),
		DirectorySize:   binary.BigEndian.Uint64(b[8:]),
		DirectoryOffset: HostOffset(binary.BigEndian.Uint64(b[16:])),
	}
	reserved := binary.BigEndian.Uint32(b[4:])
	if e.Count == 0 || e.Count > MaxBitmaps || reserved != 0 || e.DirectorySize == 0 || e.DirectorySize > MaxBitmapDirectoryBytes ||
		e.DirectoryOffset == 0 || e.DirectoryOffset >= MaxHostOffset {
		return nil, Corruptf("header extension", 0, "bitmaps extension with %d bitmaps, directory of %d bytes at %#x, reserved %#x",
			e.Count, e.DirectorySize, uint64(e.DirectoryOffset), reserved)
	}
	return &e, nil
}

// Encode returns the data of an ExtBitmaps extension.
func (e BitmapsExtension) Encode() []byte {
	b := make([]byte, bitmapsExtension)
	binary.BigEndian.PutUint32(b, e.Count)
	binary.BigEndian.PutUint64(b[8:], e.DirectorySize)
	binary.BigEndian.PutUint64(b[16:], uint64(e.DirectoryOffset))
	return b
}

// Flags of a bitmap.
const (
	BitmapInUse           = 1 << 0 // it was not saved after its last use: its bits mean nothing
	BitmapAuto            = 1 << 1 // writers must update it
	BitmapExtraCompatible = 1 << 2 // it may be used although its extra data is not understood

	bitmapReserved = ^uint32(BitmapInUse | BitmapAuto | BitmapExtraCompatible)
)

// An entry of the bitmap directory: fixed fields, extra data and name, padded to a multiple of 8 bytes.
const (
	bitmapFixed = 24
	bitmapAlign = 8
	bitmapDirty = 1 // the only type: dirty tracking
)

// Bitmap is an entry of the bitmap directory (specification, "Bitmap directory"). A bit stands for 1<<GranularityBits bytes of the
// virtual disk.
type Bitmap struct {
	TableOffset     HostOffset // of the bitmap table
	TableEntries    uint32
	Flags           uint32
	GranularityBits uint8
	Name            string // unique in the image
	Extra           []byte // extra data, kept as it is
}

// DecodeBitmaps decodes a bitmap directory, which n entries fill. It checks every entry by itself, not what it points
// to: ErrUnsupported for a type of bitmap that is not known, else ErrCorrupt. The offset in the error counts
// from the start of the directory. The entries before the one that is wrong are returned with the error.
func DecodeBitmaps(b []byte, n uint32) ([]Bitmap, error) {
	switch {
	case n > MaxBitmaps:
		return nil, Corruptf("bitmap directory", 0, "%d bitmaps exceed %d", n, MaxBitmaps)
	case len(b) > MaxBitmapDirectoryBytes:
		return nil, Corruptf("bitmap directory", 0, "%d bytes exceed %d", len(b), MaxBitmapDirectoryBytes)
	}
	var list []Bitmap
	names := make(map[string]bool)
	at := uint64(0)
	for i := range n {
		m, size, err := decodeBitmap(b[at:], i, at)
		if err != nil {
			return list, err
		}
		if names[m.Name] {
			return list, Corruptf("bitmap directory", HostOffset(at), "entry %d: a second bitmap has the name %q", i, m.Name)
		}
		names[m.Name] = true
		list, at = append(list, m), at+size
	}
	if at != uint64(len(b)) {
		return list, Corruptf("bitmap directory", HostOffset(at), "%d entries do not fill %d bytes", n, len(b))
	}
	return list, nil
}

// decodeBitmap decodes entry i, which b begins with and which is at the offset `at` of the directory.
func decodeBitmap(b []byte, i uint32, at uint64) (m Bitmap, size uint64, err error) {
	corrupt := func(msg string, args ...any) (Bitmap, uint64, error) {
		return Bitmap{}, 0, Corruptf("bitmap directory", HostOffset(at), "entry %d: "+msg, append([]any{i}, args...)...)
	}
	if len(b) < bitmapFixed {
		return corrupt("cut off")
	}
	name, extra := uint64(binary.BigEndian.Uint16(b[18:])), uint64(binary.BigEndian.Uint32(b[20:]))
	size = (bitmapFixed + extra + name + bitmapAlign - 1) &^ (bitmapAlign - 1)
	if size > uint64(len(b)) {
		return corrupt("%d bytes are cut off", size)
	}
	m = Bitmap{
		TableOffset:     HostOffset(binary.BigEndian.Uint64(b[0:])),
		TableEntries:    binary.BigEndian.Uint32(b[8:]),
		Flags:           binary.BigEndian.Uint32(b[12:]),
		GranularityBits: b[17],
		Name:            string(b[bitmapFixed+extra:][:name]),
	}
	if extra > 0 {
		m.Extra = slices.Clone(b[bitmapFixed:][:extra])
	}
	switch {
	case b[16] != bitmapDirty:
		return Bitmap{}, 0, Unsupportedf("bitmap directory", HostOffset(at), "entry %d: bitmap of type %d", i, b[16])
	case m.Flags&bitmapReserved != 0:
		return corrupt("reserved flags %#x are set", m.Flags&bitmapReserved)
	case m.GranularityBits < MinBitmapGranularity || m.GranularityBits > MaxBitmapGranularity:
		return corrupt("granularity 2^%d is not in 2^%d..2^%d", m.GranularityBits, MinBitmapGranularity, MaxBitmapGranularity)
	case name == 0 || name > MaxBitmapName:
		return corrupt("name of %d bytes", name)
	case m.TableEntries == 0 || m.TableEntries > MaxBitmapTableEntries:
		return corrupt("table of %d entries", m.TableEntries)
	case m.TableOffset == 0 || m.TableOffset >= MaxHostOffset:
		return corrupt("table at %#x", uint64(m.TableOffset))
	}
	return m, size, nil
}

// EncodeBitmaps returns the bitmap directory. The caller keeps to the limits.
func EncodeBitmaps(list []Bitmap) []byte {
	var b []byte
	for _, m := range list {
		b = binary.BigEndian.AppendUint64(b, uint64(m.TableOffset))
		b = binary.BigEndian.AppendUint32(b, m.TableEntries)
		b = binary.BigEndian.AppendUint32(b, m.Flags)
		b = append(b, bitmapDirty, m.GranularityBits)
		b = binary.BigEndian.AppendUint16(b, uint16(len(m.Name)))
		b = binary.BigEndian.AppendUint32(b, uint32(len(m.Extra)))
		b = append(b, m.Extra...)
		b = append(b, m.Name...)
		b = append(b, make([]byte, -len(b)&(bitmapAlign-1))...)
	}
	return b
}

// BitmapTableEntry points to a cluster of a bitmap's bits (specification, "Bitmap table"). Without one the bits
// are all the same: ones or zeroes.
type BitmapTableEntry uint64

const bitmapTableReserved = 0xff000000000001fe

// Offset returns where the cluster is; 0 means that there is none.
func (e BitmapTableEntry) Offset() HostOffset { return HostOffset(e & offsetMask) }

// AllOnes reports whether, without a cluster, all bits are ones.
func (e BitmapTableEntry) AllOnes() bool { return e.Offset() == 0 && e&1 != 0 }

// Reserved returns the reserved bits that are set; a valid entry has none. Bit 0 is one of them in an entry that has a cluster.
func (e BitmapTableEntry) Reserved() uint64 {
	r := uint64(e) & bitmapTableReserved
	if e.Offset() != 0 {
		r |= uint64(e) & 1
	}
	return r
}
