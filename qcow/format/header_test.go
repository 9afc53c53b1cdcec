package format_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// validHeader is a header with everything that a header can have.
func validHeader() format.Header {
	return format.Header{
		Geometry:              format.Geometry{ClusterBits: 16, RefcountOrder: 4},
		Version:               3,
		Size:                  10 << 30,
		BackingFile:           "base.qcow2",
		CryptMethod:           2,
		L1Entries:             20,
		L1Offset:              0x30000,
		RefcountTableOffset:   0x10000,
		RefcountTableClusters: 1,
		Snapshots:             3,
		SnapshotsOffset:       0x90000,
		Incompatible:          format.IncompatDirty | format.IncompatCompression | 1<<40,
		Compatible:            format.CompatLazyRefcounts | 1<<30,
		Autoclear:             format.AutoclearBitmaps | 1<<20,
		HeaderLength:          112,
		CompressionType:       1,
		Extensions: []format.Extension{
			{Type: format.ExtBackingFormat, Data: []byte("qcow2")},
			{Type: 0x12345678, Data: []byte("nobody knows me")},
			{Type: 0x12345679, Data: nil},
			format.FeatureNames(),
		},
	}
}

func encode(t testing.TB, h *format.Header) []byte {
	t.Helper()
	b, err := h.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return append(b, make([]byte, int(h.ClusterSize())-len(b))...)
}

func TestHeaderRoundTrip(t *testing.T) {
	full := validHeader()
	plain := validHeader()
	plain.BackingFile, plain.Extensions, plain.CompressionType = "", nil, 0
	plain.Incompatible &^= format.IncompatCompression
	long := plain
	long.HeaderLength = 200
	future := full
	future.HeaderLength, future.UnknownFields = 144, append(make([]byte, 31), 1)
	old := validHeader()
	old.Version, old.HeaderLength, old.CompressionType, old.Incompatible, old.Compatible, old.Autoclear = 2, 72, 0, 0, 0, 0
	extended := full
	extended.ExtendedL2, extended.DataFile, extended.L1Entries = true, true, 40
	extended.Incompatible |= format.IncompatExtendedL2 | format.IncompatDataFile
	empty := plain
	empty.Size, empty.L1Entries, empty.L1Offset, empty.Snapshots, empty.SnapshotsOffset = 0, 0, 0, 0, 0
	for name, h := range map[string]format.Header{
		"full": full, "plain": plain, "long": long, "empty": empty,
		"future": future, "version 2": old, "extended": extended,
	} {
		t.Run(name, func(t *testing.T) {
			got, err := format.DecodeHeader(encode(t, &h))
			if err != nil {
				t.Fatal(err)
			}
			if !sameHeader(got, &h) {
				t.Errorf("got  %+v\nwant %+v", *got, h)
			}
		})
	}
}

// sameHeader compares headers, taking nil and empty extension data for the same.
func sameHeader(a, b *format.Header) bool {
	x, y := *a, *b
	x.Extensions, y.Extensions = nil, nil
	if !reflect.DeepEqual(x, y) || len(a.Extensions) != len(b.Extensions) {
		return false
	}
	for i, e := range a.Extensions {
		if e.Type != b.Extensions[i].Type || !bytes.Equal(e.Data, b.Extensions[i].Data) {
			return false
		}
	}
	return true
}

// TestHeaderLayout fixes where the fields are, which the round trip can't.
func TestHeaderLayout(t *testing.T) {
	h := validHeader()
	b := encode(t, &h)
	for _, f := range []struct {
		name string
		off  int
		want any
	}{
		{"magic", 0, uint32(0x514649fb)},
		{"version", 4, uint32(3)},
		{"backing_file_size", 16, uint32(len(h.BackingFile))},
		{"cluster_bits", 20, uint32(16)},
		{"size", 24, h.Size},
		{"crypt_method", 32, h.CryptMethod},
		{"l1_size", 36, h.L1Entries},
		{"l1_table_offset", 40, uint64(h.L1Offset)},
		{"refcount_table_offset", 48, uint64(h.RefcountTableOffset)},
		{"refcount_table_clusters", 56, h.RefcountTableClusters},
		{"nb_snapshots", 60, h.Snapshots},
		{"snapshots_offset", 64, uint64(h.SnapshotsOffset)},
		{"incompatible_features", 72, h.Incompatible},
		{"compatible_features", 80, h.Compatible},
		{"autoclear_features", 88, h.Autoclear},
		{"refcount_order", 96, uint32(4)},
		{"header_length", 100, uint32(112)},
	} {
		var got any = binary.BigEndian.Uint32(b[f.off:])
		if _, ok := f.want.(uint64); ok {
			got = binary.BigEndian.Uint64(b[f.off:])
		}
		if got != f.want {
			t.Errorf("%s at %d: %v, want %v", f.name, f.off, got, f.want)
		}
	}
	if b[104] != h.CompressionType {
		t.Errorf("compression_type: %d", b[104])
	}
	if name := b[binary.BigEndian.Uint64(b[8:]):]; !bytes.HasPrefix(name, []byte(h.BackingFile)) {
		t.Errorf("no backing file name at backing_file_offset: %q", name[:20])
	}
	if !bytes.Equal(h.EncodeSwitch(), b[format.SwitchOffset:][:format.SwitchLength]) {
		t.Error("EncodeSwitch and Encode differ")
	}
	if format.SwitchOffset/format.SectorSize != (format.SwitchOffset+format.SwitchLength-1)/format.SectorSize {
		t.Error("the switch spans two sectors")
	}
}

func TestDecodeHeaderRefuses(t *testing.T) {
	set32 := func(off int, v uint32) func([]byte) []byte {
		return func(b []byte) []byte { binary.BigEndian.PutUint32(b[off:], v); return b }
	}
	set64 := func(off int, v uint64) func([]byte) []byte {
		return func(b []byte) []byte { binary.BigEndian.PutUint64(b[off:], v); return b }
	}
	for name, c := range map[string]struct {
		damage func([]byte) []byte
		class  error
	}{
		"nothing":                         {func([]byte) []byte { return nil }, format.ErrCorrupt},
		"magic":                           {set32(0, 0x514649fc), format.ErrCorrupt},
		"version 2 ends in the header":    {func(b []byte) []byte { return set32(4, 2)(b)[:71] }, format.ErrCorrupt},
		"extended L2 of 8 KiB":            {func(b []byte) []byte { b[79] |= format.IncompatExtendedL2; return set32(20, 13)(b) }, format.ErrCorrupt},
		"version 1":                       {set32(4, 1), format.ErrUnsupported},
		"version 4":                       {set32(4, 4), format.ErrUnsupported},
		"ends in the header":              {func(b []byte) []byte { return b[:103] }, format.ErrCorrupt},
		"ends in the long header":         {func(b []byte) []byte { return b[:111] }, format.ErrCorrupt},
		"cluster_bits 8":                  {set32(20, 8), format.ErrCorrupt},
		"cluster_bits 22":                 {set32(20, 22), format.ErrCorrupt},
		"cluster_bits huge":               {set32(20, 0xffffffff), format.ErrCorrupt},
		"refcount_order 7":                {set32(96, 7), format.ErrCorrupt},
		"header_length 96":                {set32(100, 96), format.ErrCorrupt},
		"header_length odd":               {set32(100, 113), format.ErrCorrupt},
		"header_length exceeds cluster":   {set32(100, 65536+8), format.ErrCorrupt},
		"size exceeds L1":                 {set64(24, 20<<29+1), format.ErrCorrupt},
		"size exceeds everything":         {set64(24, 1<<63), format.ErrCorrupt},
		"L1 of 32 MiB and 8 bytes":        {set32(36, 4<<20+1), format.ErrCorrupt},
		"L1 misaligned":                   {set64(40, 0x30200), format.ErrCorrupt},
		"L1 nowhere":                      {set64(40, 0), format.ErrCorrupt},
		"L1 too far":                      {set64(40, 1<<56), format.ErrCorrupt},
		"refcount table misaligned":       {set64(48, 0x10200), format.ErrCorrupt},
		"refcount table nowhere":          {set64(48, 0), format.ErrCorrupt},
		"no refcount table":               {set32(56, 0), format.ErrCorrupt},
		"refcount table of 8 MiB and 1":   {set32(56, 129), format.ErrCorrupt},
		"too many snapshots":              {set32(60, 65537), format.ErrCorrupt},
		"snapshots misaligned":            {set64(64, 0x90200), format.ErrCorrupt},
		"snapshots nowhere":               {set64(64, 0), format.ErrCorrupt},
		"compression type without bit":    {set64(72, 0), format.ErrCorrupt},
		"compression bit without type":    {func(b []byte) []byte { b[104] = 0; return b }, format.ErrCorrupt},
		"backing name in the header":      {set64(8, 100), format.ErrCorrupt},
		"backing name past the cluster":   {set64(8, 65536-9), format.ErrCorrupt},
		"backing name far away":           {set64(8, 1<<63), format.ErrCorrupt},
		"backing name of 1024 bytes":      {set32(16, 1024), format.ErrCorrupt},
		"backing name of 4 GiB":           {set32(16, 0xffffffff), format.ErrCorrupt},
		"extension past the backing name": {set32(112+4, 1000), format.ErrCorrupt},
		"extension of 4 GiB":              {set32(112+4, 0xffffffff), format.ErrCorrupt},
	} {
		t.Run(name, func(t *testing.T) {
			h := validHeader()
			got, err := format.DecodeHeader(c.damage(encode(t, &h)))
			if !errors.Is(err, c.class) {
				t.Fatalf("header %+v, error %v, want %v", got, err, c.class)
			}
			var e *format.Error
			if !errors.As(err, &e) || e.Table == "" || e.Reason == "" {
				t.Errorf("error does not say where: %v", err)
			}
		})
	}
}

// TestVersion2Layout fixes where a version 2 header ends.
func TestVersion2Layout(t *testing.T) {
	h := validHeader()
	h.Version, h.CompressionType, h.Incompatible, h.Compatible, h.Autoclear = 2, 0, 0, 0, 0
	b := encode(t, &h)
	if binary.BigEndian.Uint32(b[4:]) != 2 || binary.BigEndian.Uint32(b[72:]) != format.ExtBackingFormat || string(b[80:85]) != "qcow2" {
		t.Errorf("% x", b[:88])
	}
	// What the feature bits of version 3 would be are extensions here, and the width of refcounts is fixed.
	got, err := format.DecodeHeader(b)
	if err != nil || got.Version != 2 || got.HeaderLength != 72 || got.RefcountBits() != 16 || got.Incompatible|got.Compatible|got.Autoclear != 0 {
		t.Errorf("%+v, %v", got, err)
	}
	for name, change := range map[string]func(h *format.Header){
		"incompatible":  func(h *format.Header) { h.Incompatible = format.IncompatDirty },
		"compatible":    func(h *format.Header) { h.Compatible = format.CompatLazyRefcounts },
		"autoclear":     func(h *format.Header) { h.Autoclear = format.AutoclearBitmaps },
		"refcount bits": func(h *format.Header) { h.RefcountOrder = 3 },
		"extended L2":   func(h *format.Header) { h.ExtendedL2 = true },
		"data file":     func(h *format.Header) { h.DataFile = true },
		"compression":   func(h *format.Header) { h.CompressionType = 1 },
		"version 1":     func(h *format.Header) { h.Version = 1 },
	} {
		h := h
		change(&h)
		if _, err := h.Encode(); !errors.Is(err, format.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestDecodeHeaderAcceptsLimits(t *testing.T) {
	h := validHeader()
	h.L1Entries, h.RefcountTableClusters, h.Snapshots = 4<<20, 128, 65536
	h.BackingFile = strings.Repeat("x", 1023)
	h.Size = h.MaxVirtualSize()
	h.L1Offset = format.MaxHostOffset - 1<<16
	if _, err := format.DecodeHeader(encode(t, &h)); err != nil {
		t.Error(err)
	}
}

func TestDecodeHeaderOfShortFile(t *testing.T) {
	h := validHeader()
	h.BackingFile, h.Extensions = "", nil
	b := encode(t, &h)[:h.HeaderLength] // and the file ends there
	if _, err := format.DecodeHeader(b); err != nil {
		t.Error(err)
	}
}

func TestEncodeRefusesWhatDoesNotFit(t *testing.T) {
	h := validHeader()
	h.ClusterBits = 9
	if _, err := h.Encode(); !errors.Is(err, format.ErrInvalid) { // the feature names alone fill most of 512 bytes
		t.Error(err)
	}
	h = validHeader()
	h.BackingFile = strings.Repeat("x", 1024)
	if _, err := h.Encode(); !errors.Is(err, format.ErrInvalid) {
		t.Error(err)
	}
	h = validHeader()
	h.HeaderLength = 1 << 31
	if _, err := h.Encode(); !errors.Is(err, format.ErrInvalid) {
		t.Error(err)
	}
}

func TestIncompatibleNames(t *testing.T) {
	h := validHeader()
	h.Extensions = []format.Extension{{Type: format.ExtFeatureNames, Data: bytes.Join([][]byte{
		append([]byte{0, 40}, append([]byte("teleport\xff"), make([]byte, 37)...)...),
		append([]byte{1, 41}, append([]byte("compatible"), make([]byte, 36)...)...), // not an incompatible one
		{0, 42}, // cut short
	}, nil)}}
	got := h.IncompatibleNames(1<<0 | 1<<40 | 1<<41 | 1<<42)
	if want := "dirty bit (bit 0), teleport? (bit 40), unknown (bit 41), unknown (bit 42)"; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	if got := h.IncompatibleNames(0); got != "" {
		t.Errorf("no bits: %q", got)
	}
}

func FuzzDecodeHeader(f *testing.F) {
	full := validHeader()
	f.Add(encode(f, &full)[:1024])
	plain := validHeader()
	plain.BackingFile, plain.Extensions = "", nil
	f.Add(encode(f, &plain)[:112])
	old := plain
	old.Version, old.CompressionType, old.Incompatible, old.Compatible, old.Autoclear = 2, 0, 0, 0, 0
	f.Add(encode(f, &old)[:72])
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := format.DecodeHeader(b)
		if err != nil {
			if !errors.Is(err, format.ErrCorrupt) && !errors.Is(err, format.ErrUnsupported) {
				t.Errorf("error without a class: %v", err)
			}
			return
		}
		if h.Size > h.MaxVirtualSize() || h.L1Bytes() > format.MaxL1Bytes || h.RefcountTableBytes() > format.MaxRefcountTableBytes {
			t.Errorf("beyond the limits: %+v", h)
		}
		if g := h.L1EntriesFor(h.Size); uint64(h.L1Entries) < g {
			t.Errorf("%d L1 entries, %d needed", h.L1Entries, g)
		}
		// What was understood survives, unless it no longer fits: the writer adds fields that the reader can do without.
		again, err := h.Encode()
		if err != nil {
			return
		}
		if h.Version > 2 {
			h.HeaderLength = max(h.HeaderLength, 112)
		}
		h2, err := format.DecodeHeader(again)
		if err != nil {
			t.Fatalf("%v after encoding %+v", err, h)
		}
		if essence(h) != essence(h2) || !slices.Equal(unknown(h), unknown(h2)) || len(h.Extensions) != len(h2.Extensions) {
			t.Errorf("was    %+v\nbecame %+v", h, h2)
		}
		for _, list := range []string{h.BackingFormat(), h.DataFileName(), h.IncompatibleNames(^uint64(0))} {
			if len(list) > len(b)+64*64 {
				t.Errorf("%d bytes of names", len(list))
			}
		}
		if off, n, err := h.Encryption(); err == nil && off+format.HostOffset(n) > format.MaxHostOffset {
			t.Errorf("encryption header of %d bytes at %#x", n, off)
		}
		if ext, err := h.Bitmaps(); err == nil && ext != nil && !bytes.Equal(ext.Encode(), h.Extension(format.ExtBitmaps).Data) {
			t.Errorf("bitmaps %+v", ext)
		}
	})
}
