package format_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"reflect"
	"strings"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

func someBitmaps() []format.Bitmap {
	return []format.Bitmap{
		{TableOffset: 0x50000, TableEntries: 1, Flags: format.BitmapAuto, GranularityBits: 16, Name: "backup"},
		{TableOffset: 0x60000, TableEntries: 1 << 27, Flags: format.BitmapInUse | format.BitmapExtraCompatible, GranularityBits: 9, Name: "x", Extra: []byte("more")},
		{TableOffset: 0x70000, TableEntries: 2, GranularityBits: 31, Name: strings.Repeat("n", format.MaxBitmapName)},
	}
}

func TestBitmapDirectory(t *testing.T) {
	list := someBitmaps()
	b := format.EncodeBitmaps(list)
	got, err := format.DecodeBitmaps(b, uint32(len(list)))
	if err != nil || !reflect.DeepEqual(got, list) {
		t.Errorf("error %v, got %+v", err, got)
	}
	if len(b) != 32+32+24+1024 {
		t.Errorf("%d bytes", len(b))
	}
	e := b[32:]
	if binary.BigEndian.Uint64(e) != 0x60000 || binary.BigEndian.Uint32(e[8:]) != 1<<27 || binary.BigEndian.Uint32(e[12:]) != 5 || e[16] != 1 || e[17] != 9 ||
		binary.BigEndian.Uint16(e[18:]) != 1 || binary.BigEndian.Uint32(e[20:]) != 4 || string(e[24:32]) != "morex\x00\x00\x00" {
		t.Errorf("% x", e[:32])
	}
}

func TestDecodeBitmapsRefuses(t *testing.T) {
	good := format.EncodeBitmaps(someBitmaps()[:2])
	set := func(off int, v ...byte) []byte {
		b := bytes.Clone(good)
		copy(b[off:], v)
		return b
	}
	for name, c := range map[string]struct {
		b     []byte
		n     uint32
		class error
		at    format.HostOffset
	}{
		"too many":            {good, format.MaxBitmaps + 1, format.ErrCorrupt, 0},
		"directory too large": {make([]byte, format.MaxBitmapDirectoryBytes+1), 1, format.ErrCorrupt, 0},
		"too few":             {good, 1, format.ErrCorrupt, 32},
		"more than fit":       {good, 3, format.ErrCorrupt, 64},
		"cut in fields":       {good[:20], 1, format.ErrCorrupt, 0},
		"cut in name":         {good[:56], 2, format.ErrCorrupt, 32},
		"no table":            {set(0, 0, 0, 0, 0, 0, 0, 0, 0), 2, format.ErrCorrupt, 0},
		"table far away":      {set(32, 1), 2, format.ErrCorrupt, 32},
		"empty table":         {set(8, 0, 0, 0, 0), 2, format.ErrCorrupt, 0},
		"table too large":     {set(8, 8, 0, 0, 1), 2, format.ErrCorrupt, 0},
		"reserved flag":       {set(15, 8), 2, format.ErrCorrupt, 0},
		"other type":          {set(16, 2), 2, format.ErrUnsupported, 0},
		"too fine":            {set(17, 8), 2, format.ErrCorrupt, 0},
		"too coarse":          {set(17, 32), 2, format.ErrCorrupt, 0},
		"no name":             {set(18, 0, 0), 2, format.ErrCorrupt, 0},
		"name too long":       {append(set(18, 4, 0), make([]byte, 2000)...), 1, format.ErrCorrupt, 0},
		"extra of 4 GiB":      {set(20, 255, 255, 255, 255), 2, format.ErrCorrupt, 0},
		"same name":           {append(bytes.Clone(good), good[:32]...), 3, format.ErrCorrupt, 64},
	} {
		list, err := format.DecodeBitmaps(c.b, c.n)
		var e *format.Error
		if !errors.Is(err, c.class) || !errors.As(err, &e) || e.Offset != c.at || len(list) != min(2, int(c.at)/32) {
			t.Errorf("%s: %d entries and %v, want an error at %#x", name, len(list), err, c.at)
		}
	}
}

func TestBitmapsExtension(t *testing.T) {
	want := format.BitmapsExtension{Count: 3, DirectorySize: 4096, DirectoryOffset: 0x50000}
	good := want.Encode()
	if got, err := format.DecodeBitmapsExtension(good); err != nil || *got != want {
		t.Errorf("%+v, %v", got, err)
	}
	for name, b := range map[string][]byte{
		"short":                 good[:23],
		"long":                  append(bytes.Clone(good), 0),
		"none":                  format.BitmapsExtension{DirectorySize: 4096, DirectoryOffset: 0x50000}.Encode(),
		"too many":              format.BitmapsExtension{Count: format.MaxBitmaps + 1, DirectorySize: 4096, DirectoryOffset: 0x50000}.Encode(),
		"no directory":          format.BitmapsExtension{Count: 1, DirectorySize: 4096}.Encode(),
		"empty directory":       format.BitmapsExtension{Count: 1, DirectoryOffset: 0x50000}.Encode(),
		"directory too large":   format.BitmapsExtension{Count: 1, DirectorySize: format.MaxBitmapDirectoryBytes + 1, DirectoryOffset: 0x50000}.Encode(),
		"directory too far":     format.BitmapsExtension{Count: 1, DirectorySize: 32, DirectoryOffset: format.MaxHostOffset}.Encode(),
		"reserved bytes in use": append(append(bytes.Clone(good[:7]), 1), good[8:]...),
	} {
		if got, err := format.DecodeBitmapsExtension(b); !errors.Is(err, format.ErrCorrupt) {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
}

func TestBitmapTableEntries(t *testing.T) {
	for _, c := range []struct {
		entry    format.BitmapTableEntry
		off      format.HostOffset
		ones     bool
		reserved uint64
	}{
		{0, 0, false, 0},
		{1, 0, true, 0},
		{0x50000, 0x50000, false, 0},
		{0x50001, 0x50000, false, 1},
		{1<<63 | 0x50000 | 0x1fe, 0x50000, false, 1<<63 | 0x1fe},
	} {
		if c.entry.Offset() != c.off || c.entry.AllOnes() != c.ones || c.entry.Reserved() != c.reserved {
			t.Errorf("%#x: at %#x, all ones %t, reserved %#x", uint64(c.entry), c.entry.Offset(), c.entry.AllOnes(), c.entry.Reserved())
		}
	}
}

func FuzzDecodeBitmaps(f *testing.F) {
	f.Add(format.EncodeBitmaps(someBitmaps()[:2]), uint32(2))
	f.Add(make([]byte, 100), uint32(3))
	f.Fuzz(func(t *testing.T, b []byte, n uint32) {
		list, err := format.DecodeBitmaps(b, n)
		if err != nil {
			if !errors.Is(err, format.ErrCorrupt) && !errors.Is(err, format.ErrUnsupported) {
				t.Error(err)
			}
			return
		}
		again, err := format.DecodeBitmaps(format.EncodeBitmaps(list), n)
		if err != nil || !reflect.DeepEqual(again, list) {
			t.Errorf("was    %+v\nbecame %+v, %v", list, again, err)
		}
	})
}
