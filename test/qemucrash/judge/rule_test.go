package judge

import (
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

func flatDisk(size int64) *disk { return &disk{size: size, blocks: map[int64][]byte{}} }

func TestDisk(t *testing.T) {
	d := flatDisk(4*block).fill(block-sector, 2*sector, 7)
	if len(d.blocks) != 2 || d.sector(block/sector - 1)[0] != 7 || d.sector(block / sector)[511] != 7 || d.sector(block/sector + 1)[0] != 0 {
		t.Error("filled elsewhere")
	}
	if !d.equal(flatDisk(4*block).fill(block, sector, 7).fill(block-sector, sector, 7)) || d.equal(flatDisk(4*block)) {
		t.Error("compared wrongly")
	}
	if d.equal(&disk{size: 5 * block, blocks: d.blocks}) {
		t.Error("disks of different sizes are equal")
	}
}

func TestRules(t *testing.T) {
	before := &view{disk: flatDisk(4*block).fill(0, 8*sector, 1), snapshots: map[string]*disk{
		"kept": flatDisk(block).fill(0, sector, 9), "deleted": flatDisk(block),
	}}
	after := &view{disk: flatDisk(2*block).fill(0, 4*sector, 2).fill(4*sector, 4*sector, 1), snapshots: map[string]*disk{
		"kept": before.snapshots["kept"], "made": flatDisk(2 * block),
	}}
	with := func(d *disk, edit func(map[string]*disk)) *view {
		s := map[string]*disk{"kept": before.snapshots["kept"]}
		if edit != nil {
			edit(s)
		}
		return &view{disk: d, snapshots: s}
	}
	mixed := before.disk.fill(0, sector, 2)
	for name, c := range map[string]struct {
		rule  Rule
		v     *view
		right bool
	}{
		"before":                 {Atomic, before, true},
		"after":                  {Atomic, after, true},
		"mixed":                  {Atomic, with(mixed, nil), false},
		"mixed, piecewise":       {Piecewise, with(mixed, nil), true},
		"cut off, piecewise":     {Piecewise, with(&disk{size: 2 * block, blocks: mixed.blocks}, nil), true},
		"foreign, piecewise":     {Piecewise, with(mixed.fill(sector, sector, 3), nil), false},
		"foreign sector beyond":  {Piecewise, with(mixed.fill(3*block, sector, 3), nil), false},
		"other size, piecewise":  {Piecewise, with(&disk{size: 3 * block, blocks: mixed.blocks}, nil), false},
		"being made":             {Atomic, with(before.disk, func(s map[string]*disk) { s["made"] = after.snapshots["made"] }), true},
		"being made, wrong":      {Atomic, with(before.disk, func(s map[string]*disk) { s["made"] = flatDisk(block) }), false},
		"being deleted":          {Atomic, with(before.disk, func(s map[string]*disk) { s["deleted"] = before.snapshots["deleted"] }), true},
		"being deleted, changed": {Atomic, with(before.disk, func(s map[string]*disk) { s["deleted"] = flatDisk(sector) }), false},
		"missing":                {Atomic, with(before.disk, func(s map[string]*disk) { delete(s, "kept") }), false},
		"changed":                {Atomic, with(before.disk, func(s map[string]*disk) { s["kept"] = flatDisk(block) }), false},
		"unknown":                {Atomic, with(before.disk, func(s map[string]*disk) { s["unknown"] = flatDisk(block) }), false},
	} {
		e := &expectation{rule: c.rule, before: before, after: after}
		if fault := e.fault(c.v, &storage.GroupCrashState{}); (fault == "") != c.right {
			t.Errorf("%s: %q", name, fault)
		}
	}
}

// What a guest may find of its requests: two writes and a discard of sector 0, a flush after the first.
func TestHistory(t *testing.T) {
	before := flatDisk(block).fill(0, 2*sector, 1)
	requests := []Request{
		{Kind: Write, Length: sector, Value: 2, Start: 0, End: 1},
		{Kind: Flush, Start: 1, End: 3},
		{Kind: Write, Length: sector, Value: 3, Start: 3, End: 5},
		{Kind: Discard, Length: sector, Start: 5, End: 6},
		{Kind: Flush, Start: 6, End: 8},
	}
	for _, c := range []struct {
		issued int
		values []byte // of sector 0
	}{
		{0, []byte{1}},
		{1, []byte{1, 2}},
		{2, []byte{1, 2}}, // the flush has not been answered
		{3, []byte{2}},
		{4, []byte{2, 3}},
		{5, []byte{2, 3}},
		{6, []byte{0, 2, 3}},
		{7, []byte{0, 2, 3}},
		{8, []byte{0, 3}},
	} {
		h := newHistory(before, requests)
		for value := range byte(6) {
			want := false
			for _, v := range c.values {
				want = want || v == value
			}
			s := &storage.GroupCrashState{Issued: c.issued}
			if got := h.fault(before.fill(0, sector, value), s) == ""; got != want {
				t.Errorf("issued %d, value %d: allowed=%v", c.issued, value, got)
			}
		}
	}
	h := newHistory(before, requests)
	torn := before.fill(0, sector, 2)
	torn.blocks[0][5] = 3
	for name, d := range map[string]*disk{
		"torn":              torn,
		"another sector":    before.fill(sector, sector, 2),
		"an untouched zero": before.fill(10*sector, sector, 2),
		"another size":      {size: 2 * block, blocks: before.blocks},
	} {
		if h.fault(d, &storage.GroupCrashState{Issued: 4}) == "" {
			t.Errorf("%s: allowed", name)
		}
	}
}
