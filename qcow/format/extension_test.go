package format_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

func TestSetExtension(t *testing.T) {
	h := validHeader()
	h.Extensions = append(h.Extensions, format.Extension{Type: 0x12345678, Data: []byte("twice")})
	before := h
	types := func(h *format.Header) (list []uint32) {
		for _, e := range h.Extensions {
			list = append(list, e.Type)
		}
		return list
	}
	equal := func(got []uint32, want ...uint32) {
		t.Helper()
		if len(got) != len(want) {
			t.Errorf("extensions %#x, want %#x", got, want)
			return
		}
		for i := range got {
			if got[i] != want[i] {
				t.Errorf("extensions %#x, want %#x", got, want)
				return
			}
		}
	}
	data := []byte("new")
	h.SetExtension(0x12345678, data)
	data[0] = 'X'
	equal(types(&h), format.ExtBackingFormat, 0x12345678, 0x12345679, format.ExtFeatureNames)
	if got := h.Extension(0x12345678); string(got.Data) != "new" {
		t.Errorf("%q", got.Data)
	}
	h.SetExtension(format.ExtBackingFormat, nil)
	h.SetExtension(99, nil)
	h.SetExtension(100, []byte{})
	equal(types(&h), 0x12345678, 0x12345679, format.ExtFeatureNames, 100)
	if h.BackingFormat() != "" || h.Extension(99) != nil {
		t.Error("what was removed is there")
	}
	equal(types(&before), format.ExtBackingFormat, 0x12345678, 0x12345679, format.ExtFeatureNames, 0x12345678)
	if string(before.Extensions[1].Data) != "nobody knows me" {
		t.Error("an earlier copy of the header changed")
	}
}

func TestNamesInExtensions(t *testing.T) {
	h := validHeader()
	if h.BackingFormat() != "qcow2" || h.DataFileName() != "" {
		t.Errorf("%q, %q", h.BackingFormat(), h.DataFileName())
	}
	h.SetExtension(format.ExtDataFile, []byte("disk.raw"))
	if h.DataFileName() != "disk.raw" {
		t.Errorf("%q", h.DataFileName())
	}
}

func TestEncryptionHeaderPointer(t *testing.T) {
	pointer := func(off, n uint64) []byte {
		return binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(nil, off), n)
	}
	h := validHeader()
	if off, n, err := h.Encryption(); off != 0 || n != 0 || err != nil {
		t.Errorf("%d bytes at %#x, %v without an extension", n, off, err)
	}
	h.SetExtension(format.ExtFullDisk, pointer(0x50000, 1000))
	if off, n, err := h.Encryption(); off != 0x50000 || n != 1000 || err != nil {
		t.Errorf("%d bytes at %#x, %v", n, off, err)
	}
	for name, b := range map[string][]byte{
		"short":       make([]byte, 15),
		"long":        make([]byte, 17),
		"nowhere":     pointer(0, 1000),
		"misaligned":  pointer(0x50200, 1000),
		"far away":    pointer(1<<56, 1000),
		"endless":     pointer(0x50000, ^uint64(0)),
		"a bit large": pointer(0x50000, 1<<56-0x50000+1),
	} {
		h.SetExtension(format.ExtFullDisk, b)
		if off, n, err := h.Encryption(); !errors.Is(err, format.ErrCorrupt) || off != 0 || n != 0 {
			t.Errorf("%s: %d bytes at %#x, %v", name, n, off, err)
		}
	}
}

// TestOrderOfExtensions wants the essential ones first, the feature names last, and equals in their order.
func TestOrderOfExtensions(t *testing.T) {
	h := validHeader()
	h.Extensions = []format.Extension{
		format.FeatureNames(),
		{Type: 7, Data: []byte{1}},
		{Type: format.ExtBitmaps, Data: make([]byte, 24)},
		{Type: 6, Data: []byte{2}},
		{Type: format.ExtBackingFormat, Data: []byte("raw")},
	}
	got, err := format.DecodeHeader(encode(t, &h))
	if err != nil {
		t.Fatal(err)
	}
	var order []byte
	for _, e := range got.Extensions {
		order = append(order, byte(e.Type))
	}
	if want := []byte{format.ExtBitmaps & 0xff, format.ExtBackingFormat & 0xff, 7, 6, format.ExtFeatureNames & 0xff}; !bytes.Equal(order, want) {
		t.Errorf("% x, want % x", order, want)
	}
	if h.Extensions[0].Type != format.ExtFeatureNames {
		t.Error("Encode changed the header")
	}
}
