// Package edit lets fuzzers damage images where it matters: most bytes of an image mean nothing, so a fuzzer chooses edits of
// the words that do.
package edit

import (
	"bytes"
	"encoding/binary"
	"slices"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// Base is a valid image and the offsets of the 8-byte words of its header and tables.
type Base struct {
	image []byte
	words []int
}

// headerBytes is how much of the header is edited, as words.
const headerBytes = 256

// NewBase returns the image with the words of its header, and those that the lists give, to be edited.
func NewBase(image []byte, words ...[]int) Base {
	b := Base{image: image}
	for off := 0; off < headerBytes; off += format.EntrySize {
		b.words = append(b.words, off)
	}
	b.words = append(b.words, slices.Concat(words...)...)
	slices.Sort(b.words)
	return b
}

// Apply applies edits of 12 bytes each, one byte of operation, three that choose a word and eight of value, to a copy of the image.
func (b Base) Apply(edits []byte) []byte {
	image := bytes.Clone(b.image)
	for ; len(edits) >= 12; edits = edits[12:] {
		op, value := edits[0], binary.BigEndian.Uint64(edits[4:])
		off := b.words[int(binary.BigEndian.Uint32(edits)&0xffffff)%len(b.words)]
		if off+8 > len(image) {
			continue
		}
		word := image[off : off+8]
		switch op % 4 {
		case 0:
			format.PutEntry(word, 0, value)
		case 1:
			format.PutEntry(word, 0, format.Entry(word, 0)^value)
		case 2:
			if from := b.words[value%uint64(len(b.words))]; from+8 <= len(image) {
				copy(word, image[from:from+8])
			}
		case 3:
			image = image[:value%uint64(len(image)+1)]
		}
	}
	return image
}
