package format

import (
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
	// AutoclearHeldLinks is this engine's own: L2 entries are held back in a journal outside of the file, for the next program that opens it.
	AutoclearHeldLinks = 1 << 63
)

const featureNameSize = 48 // an entry of the feature name table: type, bit, name padded with zeroes

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
