package format

import (
	"encoding/binary"
	"slices"
)

// Types of header extensions.
const (
	ExtEnd           = 0x00000000
	ExtBackingFormat = 0xe2792aca
	ExtFeatureNames  = 0x6803f857
	ExtBitmaps       = 0x23852875
	ExtFullDisk      = 0x0537be77 // full disk encryption header pointer
	ExtDataFile      = 0x44415441 // external data file name
)

const extensionHeader = 8 // type and length

// Extension is a header extension (specification, "Header extensions").
type Extension struct {
	Type uint32
	Data []byte
}

// encodedSize returns the bytes that the extension takes in the header.
func (e *Extension) encodedSize() uint64 { return extensionHeader + (uint64(len(e.Data))+7)&^7 }

// essential reports whether the image is read differently without the extension.
func (e *Extension) essential() bool {
	switch e.Type {
	case ExtBackingFormat, ExtBitmaps, ExtFullDisk, ExtDataFile:
		return true
	}
	return false
}

// essentials returns the essential extensions of the list.
func essentials(exts []Extension) []Extension {
	return slices.DeleteFunc(slices.Clone(exts), func(e Extension) bool { return !e.essential() })
}

// withoutFeatureNames returns the list without the feature name table.
func withoutFeatureNames(exts []Extension) []Extension {
	return slices.DeleteFunc(slices.Clone(exts), func(e Extension) bool { return e.Type == ExtFeatureNames })
}

// essentialFirst returns the list in the order in which it is written: the essential extensions first, so that they
// share a sector with the fixed fields, the feature name table, which nobody misses, last.
func essentialFirst(exts []Extension) []Extension {
	rank := func(e Extension) int {
		switch {
		case e.essential():
			return 0
		case e.Type == ExtFeatureNames:
			return 2
		}
		return 1
	}
	sorted := slices.Clone(exts)
	slices.SortStableFunc(sorted, func(a, b Extension) int { return rank(a) - rank(b) })
	return sorted
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

// Extension returns the first header extension of the type, or nil.
func (h *Header) Extension(t uint32) *Extension {
	for i := range h.Extensions {
		if h.Extensions[i].Type == t {
			return &h.Extensions[i]
		}
	}
	return nil
}

// SetExtension replaces the data of the header extensions of the type by one with this data, adds one where there is none,
// or removes them when data is nil. The extensions of earlier copies of h do not change.
func (h *Header) SetExtension(t uint32, data []byte) {
	exts := slices.DeleteFunc(slices.Clone(h.Extensions), func(e Extension) bool { return e.Type == t })
	if data == nil {
		h.Extensions = exts
		return
	}
	at := slices.IndexFunc(h.Extensions, func(e Extension) bool { return e.Type == t })
	if at < 0 {
		at = len(exts)
	}
	h.Extensions = slices.Insert(exts, at, Extension{Type: t, Data: slices.Clone(data)})
}

// BackingFormat returns the format of the backing file as the image names it ("raw", "qcow2"), or "" when it does not.
func (h *Header) BackingFormat() string { return h.extensionText(ExtBackingFormat) }

// DataFileName returns the name of the external data file, or "" when the image does not say.
func (h *Header) DataFileName() string { return h.extensionText(ExtDataFile) }

func (h *Header) extensionText(t uint32) string {
	if e := h.Extension(t); e != nil {
		return string(e.Data)
	}
	return ""
}

// Encryption returns where the LUKS header is, and its length in bytes; 0 and 0 when the image has none. It
// fails with ErrCorrupt when the extension that says so cannot be right (specification, "Full disk encryption header pointer").
func (h *Header) Encryption() (off HostOffset, n uint64, err error) {
	e := h.Extension(ExtFullDisk)
	if e == nil {
		return 0, 0, nil
	}
	if len(e.Data) != 16 {
		return 0, 0, Corruptf("header extension", 0, "encryption header pointer of %d bytes, not 16", len(e.Data))
	}
	off, n = HostOffset(binary.BigEndian.Uint64(e.Data)), binary.BigEndian.Uint64(e.Data[8:])
	if !h.validTable(off) || n > uint64(MaxHostOffset-off) {
		return 0, 0, Corruptf("header extension", 0, "encryption header of %d bytes at %#x", n, uint64(off))
	}
	return off, n, nil
}

// Bitmaps returns the extension that points to the persistent bitmaps, or nil when the image has none. Whether
// they agree with the data is what AutoclearBitmaps says.
func (h *Header) Bitmaps() (*BitmapsExtension, error) {
	e := h.Extension(ExtBitmaps)
	if e == nil {
		return nil, nil //nolint:nilnil // no bitmaps is no error
	}
	return DecodeBitmapsExtension(e.Data)
}
