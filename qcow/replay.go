package qcow

import (
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// Restored says what [Open] did with a journal that a killed process left behind.
type Restored struct {
	Clusters int // guest clusters whose content of then is back
	// Lost is how many guest clusters the process had acknowledged writes to, not flushed, which are gone: another program has written to
	// the image since, or what the journal says does not fit the image. They have the content that they had before those writes.
	Lost int
}

// Restored returns what was found in the journal when the image was opened.
func (img *Image) Restored() Restored { return img.restored }

// A restoration is what the journal says of one guest cluster.
type restoration struct {
	guest  format.GuestOffset
	at     format.HostOffset     // of its L2 entry
	values []format.MappingEntry // that the entry had, oldest first
	found  format.MappingEntry   // in the file
	torn   bool                  // it is a part of one and a part of another
	broken bool
}

func (r *restoration) last() format.MappingEntry { return r.values[len(r.values)-1] }

// takeJournal restores the links that a killed process has held back, and holds links back in the journal from then on.
//
// The bit in the header says that nobody has written to the image since who does not know of the journal. All the same nothing is taken from
// it that does not fit: each link is restored that leads from what is in the file to a data cluster which nothing else refers to, and every
// other one counts as lost. What is restored is durable before the journal is void; a kill in between leaves both.
func (img *Image) takeJournal(j Journal) error {
	b := j.Load()
	if len(b) < minJournal {
		return format.Invalidf("a journal of %d bytes, which has to have %d", len(b), minJournal)
	}
	links, older, next := decodeJournal(b)
	list := restorations(links)
	sound := 0
	if img.header.Autoclear&format.AutoclearHeldLinks != 0 {
		fitting, err := img.fitting(list)
		if err == nil {
			err = img.restore(fitting)
		}
		if err != nil {
			return fmt.Errorf("restore writes from the journal: %w", err)
		}
		sound = len(fitting)
	}
	img.restored = Restored{Clusters: sound, Lost: len(list) - sound}
	if held := newHeldLinks(img, j, len(b), older, next); img.version >= 3 { // before, the header has no place for the bit
		img.links = held
	}
	return nil
}

// restorations sorts links by guest cluster.
func restorations(links []heldLink) []*restoration {
	var list []*restoration
	known := map[format.GuestOffset]*restoration{}
	for i := range links {
		l := &links[i]
		r := known[l.guest]
		if r == nil {
			r = &restoration{guest: l.guest, at: l.at, values: []format.MappingEntry{l.old}}
			known[l.guest] = r
			list = append(list, r)
		}
		r.broken = r.broken || r.at != l.at || r.last() != l.old
		r.values = append(r.values, l.new)
	}
	return list
}

// fitting returns the restorations that fit the image.
func (img *Image) fitting(list []*restoration) ([]*restoration, error) {
	targets := map[format.Cluster]*restoration{}
	for _, r := range list {
		if r.broken {
			continue
		}
		fits, err := img.fits(r)
		if err != nil {
			return nil, err
		}
		r.broken = !fits
		if target := img.entryRun(r.last()); fits && target.n > 0 {
			if other := targets[target.first]; other != nil {
				r.broken, other.broken = true, true
			}
			targets[target.first] = r
		}
	}
	if err := img.breakReferred(targets); err != nil {
		return nil, err
	}
	var fitting []*restoration
	for _, r := range list {
		if !r.broken {
			fitting = append(fitting, r)
		}
	}
	return fitting, nil
}

// fits reports whether the entry in the file is one that it had, and the last one may take its place, as far as can be told without the other
// entries.
func (img *Image) fits(r *restoration) (bool, error) {
	g := img.geometry
	if g.InCluster(r.guest) != 0 || uint64(r.guest) >= uint64(img.Size()) {
		return false, nil
	}
	l1 := img.l1Entry(g.L1Index(r.guest))
	if l1.Offset() == 0 || r.at != img.entryOffset(l1.Offset(), g.L2Index(r.guest)) {
		return false, nil
	}
	if count, err := img.alloc.refcount(g.ClusterOf(l1.Offset())); err != nil || count != 1 {
		return false, err
	}
	s, err := img.tables.pin(r.at)
	if err != nil {
		return false, err
	}
	s.mu.RLock()
	r.found = g.MappingEntry(s.b[r.at-s.off:], 0)
	s.mu.RUnlock()
	s.unpin()
	last := r.last()
	if valid := img.checkEntry(last, r.at) == nil; !valid || !r.passed() || last.L2Entry != format.NewL2Entry(last.Offset(), true) {
		return false, nil
	}
	if img.external() {
		return last.Offset() == format.HostOffset(r.guest), nil
	}
	x := run{g.ClusterOf(last.Offset()), 1}
	if _, found := img.metadata.find(x); found {
		return false, nil
	}
	if old := img.entryRun(r.found); old.n > 0 && !r.torn {
		if _, found := img.metadata.find(old); found {
			return false, nil
		}
	}
	count, err := img.alloc.refcount(x.first)
	return count == 1, err
}

// passed reports whether what is in the file is a value that the entry had at some time, or what a write of the last one leaves that was cut off.
func (r *restoration) passed() bool {
	if slices.Contains(r.values, r.found) {
		return true
	}
	r.torn = true
	last := bytesOf(r.last())
	for _, v := range r.values {
		b := bytesOf(v)
		for n := range len(b) + 1 {
			if bytesOf(r.found) == [16]byte(append(append(make([]byte, 0, 16), last[:n]...), b[n:]...)) {
				return true
			}
		}
	}
	return false
}

// breakReferred gives up restorations to clusters that something refers to, but for their own entries that are as they shall be already.
func (img *Image) breakReferred(targets map[format.Cluster]*restoration) error {
	g := img.geometry
	if len(targets) == 0 {
		return nil
	}
	walk := &shadow{img: img}
	visit := func(_ uint64, e format.L1Entry, table []byte) error {
		for i := range g.L2Entries() {
			entry, err := img.entryAt(table, i, e.Offset(), i)
			if err != nil {
				return err
			}
			x := img.entryRun(entry)
			for c := x.first; c < x.end(); c++ {
				r := targets[c]
				if r != nil && (r.at != img.entryOffset(e.Offset(), i) || entry.Offset() != r.last().Offset() || entry.L2Entry.Kind() == format.Compressed) {
					r.broken = true
				}
			}
		}
		return nil
	}
	if err := walk.eachTable(img.l1, img.l1offset, visit); err != nil {
		return err
	}
	for i := range img.snapshots {
		l1, err := img.readSnapshotL1(&img.snapshots[i])
		if err == nil {
			err = walk.eachTable(l1, img.snapshots[i].L1Offset, visit)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// restore writes entries after all that they refer to, and makes them durable.
func (img *Image) restore(list []*restoration) error {
	if len(list) == 0 {
		return nil
	}
	if err := img.syncAll(); err != nil {
		return err
	}
	g := img.geometry
	for _, r := range list {
		table := r.at - format.HostOffset(g.L2Index(r.guest)*g.L2EntrySize())
		err := img.setEntries(table, r.guest, 1, func(uint64, format.MappingEntry) format.MappingEntry { return r.last() })
		if err != nil {
			return err
		}
		if r.torn {
			continue // what was there before is a leak
		}
		if r.found.Offset() != r.last().Offset() || r.found.L2Entry.Kind() == format.Compressed {
			img.quarantine.add(img.entryRun(r.found))
		}
	}
	return img.sync()
}

func bytesOf(e format.MappingEntry) (b [16]byte) {
	binary.BigEndian.PutUint64(b[:], uint64(e.L2Entry))
	binary.BigEndian.PutUint64(b[8:], uint64(e.Subclusters))
	return b
}
