package format

import "encoding/binary"

// Types of header extensions.
const (
	ExtEnd           = 0x00000000
	ExtBackingFormat = 0xe2792aca
	ExtFeatureNames  = 0x6803f857
	ExtBitmaps       = 0x23852875
	ExtFullDisk      = 0x0537be77 // full disk encryption header pointer
	ExtDataFile      = 0x44415441 // external data file name
)

const (
	extensionHeader = 8  // type and length
	featureNameSize = 48 // type, bit, name padded with zeroes
)

// Extension is a header extension (specification, "Header extensions").
type Extension struct {
	Type uint32
	Data []byte
}

// decodeExtensions decodes the extensions between start and the end of b, which is where the backing file name or the
// first cluster ends.
func decodeExtensions(b []byte, start uint32) ([]Extension, error) {
	var exts []Extension
	for pos := uint64(start); ; {
		if uint64(len(b)) < pos+extensionHeader {
			return exts, nil // no end marker, but no room for an extension either
		}
		typ, n := binary.BigEndian.Uint32(b[pos:]), uint64(binary.BigEndian.Uint32(b[pos+4:]))
		if typ == ExtEnd {
			return exts, nil
		}
		pos += extensionHeader
		if n > uint64(len(b))-pos {
			return nil, Corruptf("header extension", HostOffset(pos-extensionHeader), "type %#x: %d bytes exceed the header area", typ, n)
		}
		exts = append(exts, Extension{Type: typ, Data: append([]byte(nil), b[pos:pos+n]...)})
		pos += (n + 7) &^ 7
	}
}

func appendExtensions(b []byte, exts []Extension) []byte {
	for _, e := range exts {
		b = binary.BigEndian.AppendUint32(b, e.Type)
		b = binary.BigEndian.AppendUint32(b, uint32(len(e.Data)))
		b = append(b, e.Data...)
		b = append(b, make([]byte, -len(e.Data)&7)...)
	}
	return append(b, make([]byte, extensionHeader)...) // ExtEnd, length 0
}

// FeatureNames returns the feature name table of the bits that this package knows, so that older readers
// can name what they do not support.
func FeatureNames() Extension {
	names := []struct {
		kind, bit byte
		name      string
	}{
		{0, 0, "dirty bit"},
		{0, 1, "corrupt bit"},
		{0, 2, "external data file"},
		{0, 3, "compression type"},
		{0, 4, "extended L2 entries"},
		{1, 0, "lazy refcounts"},
		{2, 0, "bitmaps"},
		{2, 1, "raw external data"},
	}
	b := make([]byte, 0, len(names)*featureNameSize)
	for _, n := range names {
		b = append(b, n.kind, n.bit)
		b = append(b, n.name...)
		b = append(b, make([]byte, featureNameSize-2-len(n.name))...)
	}
	return Extension{Type: ExtFeatureNames, Data: b}
}
