package judge

import (
	"bytes"
	"fmt"
	"maps"
	"slices"

	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// expectation says what may be found in an image after a crash.
type expectation struct {
	rule          Rule
	before, after *view
	history       *history // in place of the rule
}

// fault returns what is wrong with a view of a state; "" if nothing is.
func (e *expectation) fault(v *view, s *storage.GroupCrashState) string {
	if fault := e.snapshotFault(v); fault != "" {
		return fault
	}
	before, after := e.before.disk, e.after.disk
	switch {
	case e.history != nil:
		return e.history.fault(v.disk, s)
	case v.disk.equal(before) || v.disk.equal(after):
		return ""
	case e.rule == Piecewise:
		return pieceFault(v.disk, before, after)
	}
	return "the disk is neither as before nor as after"
}

func (e *expectation) snapshotFault(v *view) string {
	before, after := e.before.snapshots, e.after.snapshots
	for _, name := range slices.Sorted(maps.Keys(v.snapshots)) {
		got := v.snapshots[name]
		if was := before[name]; was != nil && got.equal(was) {
			continue
		}
		if will := after[name]; will != nil && got.equal(will) {
			continue
		}
		return fmt.Sprintf("snapshot %s has another content", name)
	}
	for _, name := range slices.Sorted(maps.Keys(before)) {
		if after[name] != nil && v.snapshots[name] == nil {
			return fmt.Sprintf("snapshot %s is missing", name)
		}
	}
	return ""
}

// pieceFault compares sector by sector.
func pieceFault(d, before, after *disk) string {
	if d.size != before.size && d.size != after.size {
		return fmt.Sprintf("the disk has %d bytes", d.size)
	}
	for _, n := range numbers(d, before, after) {
		for s := n * block / sector; s < min((n+1)*block, d.size)/sector; s++ {
			if got := d.sector(s); !bytes.Equal(got, before.sector(s)) && !bytes.Equal(got, after.sector(s)) {
				return fmt.Sprintf("sector %d is neither as before nor as after", s)
			}
		}
	}
	return ""
}

// history is what a guest asked for.
type history struct {
	before  *disk
	sectors map[int64][]Request // what changed a sector, by number, in order
	flushes []Request
}

func newHistory(before *disk, requests []Request) *history {
	h := &history{before: before, sectors: map[int64][]Request{}}
	for _, r := range requests {
		if r.Kind == Flush {
			h.flushes = append(h.flushes, r)
			continue
		}
		for s := r.Offset / sector; s < (r.Offset+r.Length)/sector; s++ {
			h.sectors[s] = append(h.sectors[s], r)
		}
	}
	return h
}

// fault says which sector has a value that the guest may not find.
func (h *history) fault(d *disk, s *storage.GroupCrashState) string {
	if d.size != h.before.size {
		return fmt.Sprintf("the disk has %d bytes", d.size)
	}
	flushed := 0 // what had been answered before Ops[flushed] must be there
	for _, f := range h.flushes {
		if f.End <= s.Issued {
			flushed = f.Start
		}
	}
	checked := map[int64]bool{}
	for _, n := range numbers(d, h.before) {
		for s := n * block / sector; s < min((n+1)*block, d.size)/sector; s++ {
			checked[s] = true
		}
	}
	for s := range h.sectors {
		checked[s] = true
	}
	for _, n := range slices.Sorted(maps.Keys(checked)) {
		if !h.allows(n, d.sector(n), flushed, s.Issued) {
			return fmt.Sprintf("sector %d has neither the last flushed value nor a later one", n)
		}
	}
	return ""
}

// allows tells whether a sector may have this content.
func (h *history) allows(n int64, content []byte, flushed, issued int) bool {
	ok := bytes.Equal(content, h.before.sector(n))
	for _, r := range h.sectors[n] {
		if r.Start >= issued {
			break
		}
		has := bytes.Count(content, []byte{r.Value}) == sector
		if r.Kind == Write && r.End <= flushed {
			ok = has
		} else {
			ok = ok || has
		}
	}
	return ok
}
