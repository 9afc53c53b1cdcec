package format

import (
	"bytes"
	"encoding/binary"
	"slices"
)

const (
	headerLength2   = 72  // of version 2
	headerLengthMin = 104 // of version 3
	headerLength    = 112 // as written here, with the compression type

	// SwitchOffset and SwitchLength are the header bytes that Header.EncodeSwitch encodes: the virtual size and the
	// place of every table but the backing name. They lie in the first 512-byte sector, so that one write
	// of them switches the image from one set of tables to another at once.
	SwitchOffset = 24
	SwitchLength = 48

	// Where the 8 bytes of each kind of feature bits are, in version 3.
	IncompatibleOffset = 72
	CompatibleOffset   = 80
	AutoclearOffset    = 88
)

// Header is the header of an image, with its extensions.
type Header struct {
	Geometry

	Version               uint32 // 2 or 3; Encode takes 0 for 3
	Size                  uint64 // virtual size in bytes
	BackingFile           string // empty: none
	CryptMethod           uint32 // 0 none, 1 AES, 2 LUKS
	L1Entries             uint32
	L1Offset              HostOffset
	RefcountTableOffset   HostOffset
	RefcountTableClusters uint32
	Snapshots             uint32
	SnapshotsOffset       HostOffset
	Incompatible          uint64 // feature bits are 0 in version 2
	Compatible            uint64
	Autoclear             uint64
	HeaderLength          uint32 // Encode writes more where its fields need more
	CompressionType       uint8  // 0 zlib, 1 zstd
	UnknownFields         []byte // fields behind those above; nil when all of them are 0

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
	version, length := binary.BigEndian.Uint32(b[4:]), headerLengthMin
	switch version {
	case 2:
		length = headerLength2
	case 3:
	default:
		return nil, Unsupportedf("header", 4, "version %d", version)
	}
	if len(b) < length {
		return nil, Corruptf("header", 0, "file ends after %d bytes, inside the header", len(b))
	}
	h := &Header{
		Geometry:              Geometry{ClusterBits: binary.BigEndian.Uint32(b[20:]), RefcountOrder: DefaultRefcountOrder},
		Version:               version,
		Size:                  binary.BigEndian.Uint64(b[24:]),
		CryptMethod:           binary.BigEndian.Uint32(b[32:]),
		L1Entries:             binary.BigEndian.Uint32(b[36:]),
		L1Offset:              HostOffset(binary.BigEndian.Uint64(b[40:])),
		RefcountTableOffset:   HostOffset(binary.BigEndian.Uint64(b[48:])),
		RefcountTableClusters: binary.BigEndian.Uint32(b[56:]),
		Snapshots:             binary.BigEndian.Uint32(b[60:]),
		SnapshotsOffset:       HostOffset(binary.BigEndian.Uint64(b[64:])),
		HeaderLength:          headerLength2,
	}
	if version == 3 {
		h.Incompatible = binary.BigEndian.Uint64(b[IncompatibleOffset:])
		h.Compatible = binary.BigEndian.Uint64(b[CompatibleOffset:])
		h.Autoclear = binary.BigEndian.Uint64(b[AutoclearOffset:])
		h.RefcountOrder = binary.BigEndian.Uint32(b[96:])
		h.HeaderLength = binary.BigEndian.Uint32(b[100:])
		h.ExtendedL2 = h.Incompatible&IncompatExtendedL2 != 0
		h.DataFile = h.Incompatible&IncompatDataFile != 0
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
	if h.HeaderLength > headerLength {
		if unknown := b[headerLength:h.HeaderLength]; len(bytes.Trim(unknown, "\x00")) > 0 {
			h.UnknownFields = slices.Clone(unknown)
		}
	}
	if (h.CompressionType != 0) != (h.Incompatible&IncompatCompression != 0) {
		return nil, Corruptf("header", 104, "compression type %d contradicts the incompatible feature bit", h.CompressionType)
	}

	name, nameLength := backingName(b)
	end := uint64(len(b))
	if name != 0 {
		if nameLength > MaxBackingName || name < uint64(h.HeaderLength) || name > end || nameLength > end-name {
			return nil, Corruptf("header", 8, "backing file name of %d bytes at %#x is not inside the first cluster", nameLength, name)
		}
		h.BackingFile = string(b[name:][:nameLength])
		end = name
	}
	var err error
	h.Extensions, err = decodeExtensions(b[:end], h.HeaderLength)
	return h, err
}

// backingName returns where a header says that the backing file name is, and its length in bytes.
func backingName(b []byte) (off, n uint64) {
	return binary.BigEndian.Uint64(b[8:]), uint64(binary.BigEndian.Uint32(b[16:]))
}

func (h *Header) validate() error {
	switch {
	case h.ClusterBits < MinClusterBits || h.ClusterBits > MaxClusterBits:
		return Corruptf("header", 20, "cluster_bits %d is not in %d..%d", h.ClusterBits, MinClusterBits, MaxClusterBits)
	case h.RefcountOrder > MaxRefcountOrder:
		return Corruptf("header", 96, "refcount_order %d exceeds %d", h.RefcountOrder, MaxRefcountOrder)
	case h.ExtendedL2 && h.ClusterBits < MinExtendedL2ClusterBits:
		return Corruptf("header", 20, "cluster_bits %d is below %d, which extended L2 entries need", h.ClusterBits, MinExtendedL2ClusterBits)
	case h.Version > 2 && (h.HeaderLength < headerLengthMin || h.HeaderLength%8 != 0):
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
