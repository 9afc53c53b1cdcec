package format

import (
	"encoding/binary"
	"fmt"
	"strings"
)

// Incompatible feature bits: an image with one that is not known must not be opened.
const (
	IncompatDirty       = 1 << 0 // refcounts may be wrong; they are rebuilt before use
	IncompatCorrupt     = 1 << 1 // must not be written except to repair it
	IncompatDataFile    = 1 << 2 // guest data is in another file
	IncompatCompression = 1 << 3 // compression type is not zlib
	IncompatExtendedL2  = 1 << 4 // subclusters
)

// Compatible feature bits: an unknown one can be ignored.
const CompatLazyRefcounts = 1 << 0

// Autoclear feature bits: an unknown one is cleared by the first writer.
const (
	AutoclearBitmaps     = 1 << 0 // the bitmaps extension is consistent with the data
	AutoclearRawDataFile = 1 << 1 // the external data file is a raw image
)

const (
	headerLengthMin = 104 // of version 3
	headerLength    = 112 // as written here, with the compression type

	// SwitchOffset and SwitchLength are the header bytes that Header.EncodeSwitch encodes: the virtual size and the
	// place of every table but the backing name. They lie in the first 512-byte sector, so that one write
	// of them switches the image from one set of tables to another at once.
	SwitchOffset = 24
	SwitchLength = 48

	// AutoclearOffset is where the 8 bytes of the autoclear features are.
	AutoclearOffset = 88
)

// Header is the header of a version 3 image, with its extensions.
type Header struct {
	Geometry

	Size                  uint64 // virtual size in bytes
	BackingFile           string // empty: none
	CryptMethod           uint32 // 0 none, 1 AES, 2 LUKS
	L1Entries             uint32
	L1Offset              HostOffset
	RefcountTableOffset   HostOffset
	RefcountTableClusters uint32
	Snapshots             uint32
	SnapshotsOffset       HostOffset
	Incompatible          uint64
	Compatible            uint64
	Autoclear             uint64
	HeaderLength          uint32
	CompressionType       uint8 // 0 zlib, 1 zstd

	Extensions []Extension // in file order, unknown ones included
}

// DecodeHeader decodes the header in the first cluster of an image. It wants as many bytes of the file as there are up
// to MaxClusterBits, and accepts fewer when the image is shorter. The result obeys the specification and the
// limits of this package; whether its tables lie inside the file is for the caller to check, and whether its features
// are implemented: DecodeHeader refuses no feature bit.
func DecodeHeader(b []byte) (*Header, error) {
	if len(b) < 8 || binary.BigEndian.Uint32(b) != Magic {
		return nil, Corruptf("header", 0, "not a qcow2 image: wrong magic")
	}
	if v := binary.BigEndian.Uint32(b[4:]); v != 3 {
		return nil, Unsupportedf("header", 4, "version %d", v)
	}
	if len(b) < headerLengthMin {
		return nil, Corruptf("header", 0, "file ends after %d bytes, inside the header", len(b))
	}
	h := &Header{
		Geometry:              Geometry{ClusterBits: binary.BigEndian.Uint32(b[20:]), RefcountOrder: binary.BigEndian.Uint32(b[96:])},
		Size:                  binary.BigEndian.Uint64(b[24:]),
		CryptMethod:           binary.BigEndian.Uint32(b[32:]),
		L1Entries:             binary.BigEndian.Uint32(b[36:]),
		L1Offset:              HostOffset(binary.BigEndian.Uint64(b[40:])),
		RefcountTableOffset:   HostOffset(binary.BigEndian.Uint64(b[48:])),
		RefcountTableClusters: binary.BigEndian.Uint32(b[56:]),
		Snapshots:             binary.BigEndian.Uint32(b[60:]),
		SnapshotsOffset:       HostOffset(binary.BigEndian.Uint64(b[64:])),
		Incompatible:          binary.BigEndian.Uint64(b[72:]),
		Compatible:            binary.BigEndian.Uint64(b[80:]),
		Autoclear:             binary.BigEndian.Uint64(b[88:]),
		HeaderLength:          binary.BigEndian.Uint32(b[100:]),
	}
	if err := h.validate(); err != nil {
		return nil, err
	}
	if uint64(len(b)) > h.ClusterSize() {
		b = b[:h.ClusterSize()]
	}
	if uint64(h.HeaderLength) > uint64(len(b)) {
		return nil, Corruptf("header", 100, "header length %d exceeds its cluster or the file", h.HeaderLength)
	}
	if h.HeaderLength > headerLengthMin {
		h.CompressionType = b[104]
	}
	if (h.CompressionType != 0) != (h.Incompatible&IncompatCompression != 0) {
		return nil, Corruptf("header", 104, "compression type %d contradicts the incompatible feature bit", h.CompressionType)
	}

	backingOffset, backingLength := binary.BigEndian.Uint64(b[8:]), binary.BigEndian.Uint32(b[16:])
	end := uint64(len(b))
	if backingOffset != 0 {
		if backingLength > 1023 || backingOffset < uint64(h.HeaderLength) || backingOffset > end || uint64(backingLength) > end-backingOffset {
			return nil, Corruptf("header", 8, "backing file name of %d bytes at %#x is not inside the first cluster", backingLength, backingOffset)
		}
		h.BackingFile = string(b[backingOffset:][:backingLength])
		end = backingOffset
	}
	var err error
	h.Extensions, err = decodeExtensions(b[:end], h.HeaderLength)
	return h, err
}

func (h *Header) validate() error {
	switch {
	case h.ClusterBits < MinClusterBits || h.ClusterBits > MaxClusterBits:
		return Corruptf("header", 20, "cluster_bits %d is not in %d..%d", h.ClusterBits, MinClusterBits, MaxClusterBits)
	case h.RefcountOrder > MaxRefcountOrder:
		return Corruptf("header", 96, "refcount_order %d exceeds %d", h.RefcountOrder, MaxRefcountOrder)
	case h.HeaderLength < headerLengthMin || h.HeaderLength%8 != 0:
		return Corruptf("header", 100, "header length %d is below %d or not a multiple of 8", h.HeaderLength, headerLengthMin)
	case h.Size > h.MaxVirtualSize():
		return Corruptf("header", 24, "virtual size %d exceeds the limit of %d for clusters of %d bytes", h.Size, h.MaxVirtualSize(), h.ClusterSize())
	case uint64(h.L1Entries)*EntrySize > MaxL1Bytes:
		return Corruptf("header", 36, "L1 table of %d entries exceeds %d bytes", h.L1Entries, MaxL1Bytes)
	case uint64(h.L1Entries) < h.L1EntriesFor(h.Size):
		return Corruptf("header", 36, "L1 table of %d entries is too small for %d bytes", h.L1Entries, h.Size)
	case !h.validTable(h.L1Offset) && h.L1Entries > 0:
		return Corruptf("header", 40, "L1 table offset %#x is 0, not aligned to a cluster, or too large", uint64(h.L1Offset))
	case h.RefcountTableClusters == 0:
		return Corruptf("header", 56, "no refcount table")
	case uint64(h.RefcountTableClusters) > MaxRefcountTableBytes>>h.ClusterBits:
		return Corruptf("header", 56, "refcount table of %d clusters exceeds %d bytes", h.RefcountTableClusters, MaxRefcountTableBytes)
	case !h.validTable(h.RefcountTableOffset):
		return Corruptf("header", 48, "refcount table offset %#x is 0, not aligned to a cluster, or too large", uint64(h.RefcountTableOffset))
	case h.Snapshots > MaxSnapshots:
		return Corruptf("header", 60, "%d snapshots exceed %d", h.Snapshots, MaxSnapshots)
	case h.Snapshots > 0 && !h.validTable(h.SnapshotsOffset):
		return Corruptf("header", 64, "snapshot table offset %#x is 0, not aligned to a cluster, or too large", uint64(h.SnapshotsOffset))
	}
	return nil
}

func (h *Header) validTable(off HostOffset) bool {
	return off != 0 && off < MaxHostOffset && h.Aligned(off)
}

// RefcountTableBytes returns the size of the refcount table in bytes.
func (h *Header) RefcountTableBytes() uint64 { return uint64(h.RefcountTableClusters) << h.ClusterBits }

// L1Bytes returns the size of the active L1 table in bytes, without the rest of its last cluster.
func (h *Header) L1Bytes() uint64 { return uint64(h.L1Entries) * EntrySize }

// Extension returns the first header extension of the type, or nil.
func (h *Header) Extension(t uint32) *Extension {
	for i := range h.Extensions {
		if h.Extensions[i].Type == t {
			return &h.Extensions[i]
		}
	}
	return nil
}

// IncompatibleNames returns the names of the incompatible feature bits set in mask, from the image's own feature name
// table where it has one.
func (h *Header) IncompatibleNames(mask uint64) string {
	known := map[int]string{0: "dirty bit", 1: "corrupt bit", 2: "external data file", 3: "compression type", 4: "extended L2 entries"}
	if ext := h.Extension(ExtFeatureNames); ext != nil {
		for b := ext.Data; len(b) >= featureNameSize; b = b[featureNameSize:] {
			if b[0] == 0 && known[int(b[1])] == "" { // type 0: incompatible
				known[int(b[1])] = strings.ToValidUTF8(strings.TrimRight(string(b[2:featureNameSize]), "\x00"), "?")
			}
		}
	}
	var names []string
	for bit := range 64 {
		if mask>>bit&1 != 0 {
			name := known[bit]
			if name == "" {
				name = "unknown"
			}
			names = append(names, fmt.Sprintf("%s (bit %d)", name, bit))
		}
	}
	return strings.Join(names, ", ")
}

// EncodeSwitch returns the SwitchLength bytes that belong at SwitchOffset.
func (h *Header) EncodeSwitch() []byte {
	b := make([]byte, SwitchLength)
	binary.BigEndian.PutUint64(b[0:], h.Size)
	binary.BigEndian.PutUint32(b[8:], h.CryptMethod)
	binary.BigEndian.PutUint32(b[12:], h.L1Entries)
	binary.BigEndian.PutUint64(b[16:], uint64(h.L1Offset))
	binary.BigEndian.PutUint64(b[24:], uint64(h.RefcountTableOffset))
	binary.BigEndian.PutUint32(b[32:], h.RefcountTableClusters)
	binary.BigEndian.PutUint32(b[36:], h.Snapshots)
	binary.BigEndian.PutUint64(b[40:], uint64(h.SnapshotsOffset))
	return b
}

// Encode returns the header with its extensions and the backing file name, to be written at offset 0. It fails
// with ErrInvalid when that does not fit into the first cluster.
func (h *Header) Encode() ([]byte, error) {
	length := max(h.HeaderLength, headerLength)
	b := make([]byte, length)
	binary.BigEndian.PutUint32(b[0:], Magic)
	binary.BigEndian.PutUint32(b[4:], 3)
	binary.BigEndian.PutUint32(b[20:], h.ClusterBits)
	copy(b[SwitchOffset:], h.EncodeSwitch())
	binary.BigEndian.PutUint64(b[72:], h.Incompatible)
	binary.BigEndian.PutUint64(b[80:], h.Compatible)
	binary.BigEndian.PutUint64(b[88:], h.Autoclear)
	binary.BigEndian.PutUint32(b[96:], h.RefcountOrder)
	binary.BigEndian.PutUint32(b[100:], length)
	b[104] = h.CompressionType
	b = appendExtensions(b, h.Extensions)
	if h.BackingFile != "" {
		binary.BigEndian.PutUint64(b[8:], uint64(len(b)))
		binary.BigEndian.PutUint32(b[16:], uint32(len(h.BackingFile)))
		b = append(b, h.BackingFile...)
	}
	if uint64(len(b)) > h.ClusterSize() {
		return nil, Invalidf("header with extensions is %d bytes, more than a cluster of %d", len(b), h.ClusterSize())
	}
	return b, nil
}
