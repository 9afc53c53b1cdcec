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

func someSnapshots() []format.Snapshot {
	return []format.Snapshot{
		{L1Offset: 0x50000, L1Entries: 3, ID: "1", Name: "first", Seconds: 1700000000, Nanoseconds: 5, VMClock: 1e12, DiskSize: 1 << 30, ICount: ^uint64(0)},
		{L1Offset: 0x60000, L1Entries: 4, ID: "22", Name: "", VMStateSize: 1 << 33, DiskSize: 1 << 31, ICount: 77, Extra: []byte("from the future")},
		{L1Offset: 0x70000, ID: "", Name: strings.Repeat("n", 65535), DiskSize: 512, ICount: 0},
	}
}

func TestSnapshotTable(t *testing.T) {
	list := someSnapshots()
	b := format.EncodeSnapshots(list)
	got, used, err := format.DecodeSnapshots(append(bytes.Clone(b), 1, 2, 3), uint32(len(list)))
	if err != nil || used != uint64(len(b)) || !reflect.DeepEqual(got, list) {
		t.Errorf("%d of %d bytes, error %v, got %+v", used, len(b), err, got)
	}
	if got, used, err := format.DecodeSnapshots(nil, 0); err != nil || used != 0 || got != nil {
		t.Errorf("no snapshots: %v, %d, %v", got, used, err)
	}
	if b := format.EncodeSnapshots(nil); len(b) != 0 {
		t.Errorf("no snapshots: % x", b)
	}
}

// TestSnapshotLayout fixes where the fields are, which the round trip can't.
func TestSnapshotLayout(t *testing.T) {
	s := someSnapshots()[1]
	b := format.EncodeSnapshots([]format.Snapshot{{Name: "1234567"}, s})
	b = b[40+24+7+1:] // the second entry starts at the next multiple of 8
	for _, f := range []struct {
		off  int
		want any
	}{
		{0, uint64(s.L1Offset)},
		{8, s.L1Entries},
		{12, uint16(len(s.ID))},
		{14, uint16(len(s.Name))},
		{16, s.Seconds},
		{20, s.Nanoseconds},
		{24, s.VMClock},
		{32, uint32(1<<32 - 1)}, // as much as fits
		{36, uint32(24 + len(s.Extra))},
		{40, s.VMStateSize},
		{48, s.DiskSize},
		{56, s.ICount},
	} {
		var got any
		switch f.want.(type) {
		case uint16:
			got = binary.BigEndian.Uint16(b[f.off:])
		case uint32:
			got = binary.BigEndian.Uint32(b[f.off:])
		case uint64:
			got = binary.BigEndian.Uint64(b[f.off:])
		}
		if got != f.want {
			t.Errorf("at %d: %v, want %v", f.off, got, f.want)
		}
	}
	if string(b[64:]) != string(s.Extra)+s.ID+s.Name {
		t.Errorf("%q", b[64:])
	}
}

// TestShortSnapshots decodes entries as earlier versions wrote them: with less extra data, or none.
func TestShortSnapshots(t *testing.T) {
	full := format.EncodeSnapshots([]format.Snapshot{{L1Offset: 0x50000, ID: "1", Name: "x", VMStateSize: 5 << 32, DiskSize: 1 << 30, ICount: 9}})
	binary.BigEndian.PutUint32(full[32:], 4096) // the VM state size of 32 bits
	for extra, want := range map[int]format.Snapshot{
		0:  {VMStateSize: 4096, ICount: ^uint64(0), Incomplete: true},
		7:  {VMStateSize: 4096, ICount: ^uint64(0), Incomplete: true},
		8:  {VMStateSize: 5 << 32, ICount: ^uint64(0), Incomplete: true},
		16: {VMStateSize: 5 << 32, DiskSize: 1 << 30, ICount: ^uint64(0)},
		23: {VMStateSize: 5 << 32, DiskSize: 1 << 30, ICount: ^uint64(0)},
		24: {VMStateSize: 5 << 32, DiskSize: 1 << 30, ICount: 9},
	} {
		b := append(append(bytes.Clone(full[:40+extra]), '1'), 'x')
		binary.BigEndian.PutUint32(b[36:], uint32(extra))
		want.L1Offset, want.ID, want.Name = 0x50000, "1", "x"
		got, used, err := format.DecodeSnapshots(b, 1)
		if err != nil || used != uint64(len(b)) || !reflect.DeepEqual(got, []format.Snapshot{want}) {
			t.Errorf("%d bytes of extra data: %+v, %d, %v", extra, got, used, err)
		}
	}
}

func TestDecodeSnapshotsRefuses(t *testing.T) {
	good := format.EncodeSnapshots(someSnapshots()[:2])
	for name, c := range map[string]struct {
		b    []byte
		n    uint32
		kept int
		at   format.HostOffset
	}{
		"too many":        {good, format.MaxSnapshots + 1, 0, 0},
		"more than fit":   {good, 3, 2, 160},
		"nothing":         {nil, 1, 0, 0},
		"cut in fields":   {good[:39], 1, 0, 0},
		"cut in name":     {good[:len(good)-1], 2, 1, 72},
		"extra too long":  {append(bytes.Clone(good[:36]), append([]byte{0, 0, 4, 1}, make([]byte, 2000)...)...), 1, 0, 0},
		"extra of 4 GiB":  {append(bytes.Clone(good[:36]), append([]byte{255, 255, 255, 255}, make([]byte, 2000)...)...), 1, 0, 0},
		"table too large": {make([]byte, format.MaxSnapshotTableBytes+1000), format.MaxSnapshots, format.MaxSnapshots, 0},
	} {
		list, _, err := format.DecodeSnapshots(c.b, c.n)
		if name == "table too large" { // of empty entries 65536 fit
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		var e *format.Error
		if !errors.Is(err, format.ErrCorrupt) || !errors.As(err, &e) || e.Offset != c.at || len(list) != c.kept {
			t.Errorf("%s: %d entries and %v, want %d and an error at %#x", name, len(list), err, c.kept, c.at)
		}
	}
	// Names fill the table before the number of entries does.
	long := make([]format.Snapshot, 1100)
	for i := range long {
		long[i].Name = strings.Repeat("n", 65000)
	}
	list, used, err := format.DecodeSnapshots(format.EncodeSnapshots(long), uint32(len(long)))
	if !errors.Is(err, format.ErrCorrupt) || used > format.MaxSnapshotTableBytes || len(list) == 0 {
		t.Errorf("%d entries of %d bytes, error %v", len(list), used, err)
	}
}

func FuzzDecodeSnapshots(f *testing.F) {
	f.Add(format.EncodeSnapshots(someSnapshots()[:2]), uint32(2))
	f.Add(make([]byte, 100), uint32(3))
	f.Fuzz(func(t *testing.T, b []byte, n uint32) {
		list, used, err := format.DecodeSnapshots(b, n)
		if used > uint64(len(b)) || len(list) > int(n) {
			t.Fatalf("%d entries in %d bytes", len(list), used)
		}
		if err != nil {
			if !errors.Is(err, format.ErrCorrupt) {
				t.Error(err)
			}
			return
		}
		again, _, err := format.DecodeSnapshots(format.EncodeSnapshots(list), n)
		if err != nil {
			return // the fields that were missing need room
		}
		for i, s := range list {
			s.Incomplete = false
			if !reflect.DeepEqual(again[i], s) {
				t.Errorf("was    %+v\nbecame %+v", s, again[i])
			}
		}
	})
}
