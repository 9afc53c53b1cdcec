package format

import (
	"encoding/binary"
	"slices"
)

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

// Encode returns the header with its extensions and the backing file name, to be written at offset 0 of a new image;
// [Header.Rewrite] is for one in use. Essential extensions come first, the feature name table last. Encode sets the feature
// bits that the Geometry implies. It fails with ErrInvalid when that does not fit into the first cluster, or when
// the version has no place for it.
func (h *Header) Encode() ([]byte, error) {
	fixed, err := h.encodeFixed()
	if err != nil {
		return nil, err
	}
	l := arrange(fixed, essentialFirst(h.Extensions), h.BackingFile, 0)
	if uint64(len(l.bytes)) > h.ClusterSize() {
		return nil, Invalidf("header with extensions is %d bytes, more than a cluster of %d", len(l.bytes), h.ClusterSize())
	}
	return l.bytes, nil
}

// encodeFixed returns the bytes before the extensions, without the place of the backing file name.
func (h *Header) encodeFixed() ([]byte, error) {
	version, length := h.Version, uint32(headerLength2)
	switch version {
	case 2:
		if h.featureBits() != [3]uint64{} || h.RefcountOrder != DefaultRefcountOrder || h.CompressionType != 0 {
			return nil, Invalidf("a version 2 header has no feature bits and refcounts of 16 bits only")
		}
	case 0, 3:
		version = 3
		length = max(h.HeaderLength, headerLength, headerLength+uint32(len(h.UnknownFields)+7)&^7)
	default:
		return nil, Invalidf("there is no version %d", version)
	}
	switch {
	case len(h.BackingFile) > MaxBackingName:
		return nil, Invalidf("the name of the backing file has %d bytes, more than %d", len(h.BackingFile), MaxBackingName)
	case uint64(length) > h.ClusterSize():
		return nil, Invalidf("header length %d exceeds a cluster of %d bytes", length, h.ClusterSize())
	}
	b := make([]byte, length)
	binary.BigEndian.PutUint32(b[0:], Magic)
	binary.BigEndian.PutUint32(b[4:], version)
	binary.BigEndian.PutUint32(b[20:], h.ClusterBits)
	copy(b[SwitchOffset:], h.EncodeSwitch())
	if version == 2 {
		return b, nil
	}
	for i, bits := range h.featureBits() {
		binary.BigEndian.PutUint64(b[IncompatibleOffset+8*i:], bits)
	}
	binary.BigEndian.PutUint32(b[96:], h.RefcountOrder)
	binary.BigEndian.PutUint32(b[100:], length)
	b[104] = h.CompressionType
	copy(b[headerLength:], h.UnknownFields)
	return b, nil
}

// featureBits returns the incompatible, compatible and autoclear features, those that the Geometry implies included.
func (h *Header) featureBits() [3]uint64 {
	incompatible := h.Incompatible
	if h.ExtendedL2 {
		incompatible |= IncompatExtendedL2
	}
	if h.DataFile {
		incompatible |= IncompatDataFile
	}
	return [3]uint64{incompatible, h.Compatible, h.Autoclear}
}

// layout is the content of a header cluster. What lies between the extensions and the name is not in use.
type layout struct {
	bytes   []byte // as far as they are in use; zero where they are not
	extEnd  uint64 // end of the extensions and the end marker
	name    uint64 // where the backing file name is
	nameEnd uint64 // equal to name: there is none
}

// uses reports whether byte i of the cluster is in use.
func (l *layout) uses(i uint64) bool { return i < l.extEnd || i >= l.name && i < l.nameEnd }

// arrange puts the extensions behind the fixed header and the backing file name at the offset `at`, or right behind the extensions
// when that is 0 or within them.
func arrange(fixed []byte, exts []Extension, name string, at uint64) layout {
	b := appendExtensions(slices.Clone(fixed), exts)
	l := layout{extEnd: uint64(len(b))}
	clear(b[8:20])
	if name != "" {
		if l.extEnd-extensionHeader <= at && at < l.extEnd { // the name itself ends the extensions: no marker is needed
			b, l.extEnd = b[:at], at
		}
		l.name = max(at, l.extEnd)
		l.nameEnd = l.name + uint64(len(name))
		binary.BigEndian.PutUint64(b[8:], l.name)
		binary.BigEndian.PutUint32(b[16:], uint32(len(name)))
		b = append(b, make([]byte, l.name-l.extEnd)...)
		b = append(b, name...)
	}
	l.bytes = b
	return l
}
