package qcow

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// heldLinks are the links that are held back: the L2 entries say already, in memory, where the data is that was written, and the journal does, so that
// the write outlives the process; but the image file does not, because the data is not durable yet (rule 3). Settling them makes the data durable,
// writes the entries, makes these durable, voids the journal's records, and only then puts the clusters that the guest had before into
// quarantine. The cached slices with such entries stay pinned so long. A failure poisons the image, and the journal keeps its records
// for the next [Open].
//
// There is an entry in two banks when it has changed again since settling began: what is written then is what the older bank says.
type heldLinks struct {
	img        *Image
	journal    Journal
	settling   *groupSync
	background sync.WaitGroup // settles that no request waits for; begun inside epochs only
	n          atomic.Int64   // links in the journal
	armed      atomic.Bool    // the header says that there may be some

	mu       sync.Mutex
	banks    [journalBanks]bank
	active   int    // the bank that links go to
	next     uint64 // generation
	capacity int    // links in a bank
	entries  map[format.HostOffset]int
	slices   map[format.HostOffset]*heldSlice
	record   [journalRecord]byte
	filling  bool // more than half of the active bank is used, and a settle under way in the background
}

// bank is a half of the journal.
type bank struct {
	at         int // offset in the journal
	generation uint64
	links      []heldLink
	replaced   []run // by these links
}

// heldSlice is a slice of a table with entries that are held back.
type heldSlice struct {
	slice *tableSlice
	n     int
}

// minJournal is how long a journal has to be, in bytes: 16 links in each bank.
const minJournal = journalBanks * 17 * journalRecord

// newHeldLinks voids what is in the journal, the older bank first: what a kill leaves then leads to what the image has. Generations begin with
// next.
func newHeldLinks(img *Image, j Journal, size, older int, next uint64) *heldLinks {
	l := &heldLinks{
		img: img, journal: j, settling: newGroupSync(), next: max(next, 1+rand.Uint64N(1<<62)), capacity: bankBytes(size)/journalRecord - 1, active: older,
		entries: map[format.HostOffset]int{}, slices: map[format.HostOffset]*heldSlice{},
	}
	for _, i := range [...]int{older, 1 - older} {
		l.banks[i].at = i * bankBytes(size)
		l.void(&l.banks[i])
	}
	return l
}

// void makes the records of a bank void. It has the greatest generation then, and becomes active after the other one.
func (l *heldLinks) void(b *bank) {
	b.generation = l.next
	l.next++
	l.journal.Store(b.at, binary.LittleEndian.AppendUint64(nil, b.generation))
	b.links, b.replaced = b.links[:0], nil
}

// leave ends the use of the journal, when no request is under way any more. Links that could not be settled stay in it.
func (l *heldLinks) leave() {
	l.background.Wait()
	for _, held := range l.slices {
		held.slice.unpin()
	}
}

// any reports whether something is held back.
func (l *heldLinks) any() bool { return l != nil && l.n.Load() > 0 }

// holds reports whether one of n L2 entries at at is held back. The caller has claimed their clusters.
func (l *heldLinks) holds(at format.HostOffset, n uint64) bool {
	if !l.any() {
		return false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for range n {
		if l.entries[at] > 0 {
			return true
		}
		at += format.HostOffset(l.img.geometry.L2EntrySize())
	}
	return false
}

// hold is link for data that need not be durable. It is false when the link can't be held back, and nothing has happened.
func (w *remap) hold() (bool, error) {
	l := w.img.links
	if l == nil || !l.arm() {
		return false, nil
	}
	if err := w.img.poisoned(); err != nil {
		return false, err
	}
	at := w.img.entryOffset(w.table, w.img.geometry.L2Index(w.off))
	s, err := w.img.tables.pin(at)
	if err != nil {
		return false, err
	}
	defer s.unpin()
	for !l.add(s, at, w) {
		if w.clusters() > uint64(l.capacity)/2 {
			return false, nil
		}
		if err := w.img.settleLinks(); err != nil {
			return false, err
		}
	}
	w.placed = false
	return true, nil
}

// add puts the links of w, whose first entry is at at in s, into the journal, and then where lookups find them. It is false when they have no
// room.
func (l *heldLinks) add(s *tableSlice, at format.HostOffset, w *remap) bool {
	g, n := l.img.geometry, w.clusters()
	s.mu.Lock()
	defer s.mu.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	b := &l.banks[l.active]
	if len(b.links)+int(n) > l.capacity {
		return false
	}
	held := l.slices[s.off]
	if held == nil {
		held = &heldSlice{slice: s}
		l.slices[s.off] = held
		s.pins.Add(1)
	}
	held.n += int(n)
	l.n.Add(int64(n))
	guest := w.off &^ format.GuestOffset(g.ClusterSize()-1)
	for i := range n {
		entry := s.b[at-s.off:]
		link := heldLink{guest: guest + format.GuestOffset(i<<g.ClusterBits), at: at, old: g.MappingEntry(entry, 0)}
		link.new = w.entry(i, link.old)
		l.append(b, &link)
		g.PutMappingEntry(entry, 0, link.new)
		at += format.HostOffset(g.L2EntrySize())
	}
	if !w.stays {
		b.replaced = appendRun(b.replaced, l.img.hostRun(&w.m, n))
	}
	if len(b.links) > l.capacity/2 && !l.filling {
		l.filling = true
		l.background.Go(func() {
			_ = l.img.settleLinks() // a failure poisons the image
			l.mu.Lock()
			defer l.mu.Unlock()
			l.filling = false
		})
	}
	return true
}

func (l *heldLinks) append(b *bank, link *heldLink) {
	seal := link.encode(&l.record, b.generation)
	at := b.at + journalRecord*(1+len(b.links))
	l.journal.Store(at+8, l.record[8:])
	binary.LittleEndian.PutUint64(l.record[:], seal)
	l.journal.Store(at, l.record[:8])
	b.links = append(b.links, *link)
	l.entries[link.at]++
}

// arm makes the header say that there may be links in a journal. It need not be durable: after a power loss the journal is void. A
// program that does not know the bit clears it before it changes the image, which voids the journal too.
func (l *heldLinks) arm() bool { return l.armed.Load() || l.mark(true) == nil }

// mark sets or clears the bit in the header.
func (l *heldLinks) mark(on bool) error {
	img := l.img
	img.headerMu.Lock()
	defer img.headerMu.Unlock()
	if l.armed.Load() == on {
		return nil
	}
	bits := img.header.Autoclear &^ format.AutoclearHeldLinks
	if on {
		bits |= format.AutoclearHeldLinks
	}
	field := func(bits uint64) []byte { return binary.BigEndian.AppendUint64(nil, bits) }
	if err := img.overwrite(format.AutoclearOffset, field(img.header.Autoclear), field(bits)); err != nil {
		return fmt.Errorf("change autoclear features: %w", err)
	}
	img.header.Autoclear = bits
	l.armed.Store(on)
	return nil
}

// settleLinks returns when every link that was held back when it was called is durable.
func (img *Image) settleLinks() error {
	if !img.links.any() {
		return nil
	}
	return img.syncAll()
}

// syncAll makes everything durable that was acknowledged before it was called. Callers at the same time share the syncs.
func (img *Image) syncAll() error {
	if l := img.links; l.any() {
		if err := l.settling.do(l.settle); err != nil {
			return err
		}
		return img.poisoned() // a settle that this call shared may have failed
	}
	if img.external() {
		if err := img.syncData(); err != nil {
			return err
		}
	}
	return img.sync()
}

// settle empties the active bank. It makes everything else durable that was written before, whether or not there is a link.
func (l *heldLinks) settle() error {
	img := l.img
	if err := img.poisoned(); err != nil {
		return err
	}
	b := l.seal()
	if err := img.syncData(); err != nil {
		return err
	}
	if b == nil && !img.external() {
		return nil
	}
	if b != nil {
		if err := l.write(b.links); err != nil {
			return err
		}
	}
	if err := img.sync(); err != nil {
		return err
	}
	if b != nil {
		l.finish(b)
	}
	return nil
}

// seal returns the bank with links, to which no more are added from now on, and makes the other one active; nil where there are none.
func (l *heldLinks) seal() *bank {
	l.mu.Lock()
	defer l.mu.Unlock()
	b := &l.banks[l.active]
	if len(b.links) == 0 {
		return nil
	}
	l.active = 1 - l.active
	return b
}

// write writes the entries of links, whose data is durable, to the image file: neighbours with one write, and of each the last.
func (l *heldLinks) write(links []heldLink) error {
	img, g := l.img, l.img.geometry
	links = slices.Clone(links)
	slices.SortStableFunc(links, func(a, b heldLink) int { return cmp.Compare(a.at, b.at) })
	size := format.HostOffset(g.L2EntrySize())
	for len(links) > 0 {
		start, n, i := links[0].at, uint64(0), 0
		b := make([]byte, 0, maxSlice)
		for ; i < len(links) && links[i].at <= start+format.HostOffset(n)*size; i++ {
			if links[i].at == start+format.HostOffset(n)*size {
				b = append(b, make([]byte, size)...)
				n++
			}
			g.PutMappingEntry(b, n-1, links[i].new)
		}
		_, err := img.file.WriteAt(b, int64(start))
		img.tablesDurable.changed.Add(1)
		if err != nil {
			return img.poison(fmt.Errorf("write held-back links at %#x: %w", uint64(start), err))
		}
		links = links[i:]
	}
	return nil
}

// finish voids a bank whose links are durable in the image file.
func (l *heldLinks) finish(b *bank) {
	n, replaced := int64(len(b.links)), b.replaced
	l.mu.Lock()
	for i := range b.links {
		at := b.links[i].at
		if l.entries[at]--; l.entries[at] == 0 {
			delete(l.entries, at)
		}
		start := l.img.tables.sliceStart(at)
		held := l.slices[start]
		if held.n--; held.n == 0 {
			delete(l.slices, start)
			held.slice.unpin()
		}
	}
	l.void(b)
	l.mu.Unlock()
	l.img.quarantine.addDurable(replaced)
	l.n.Add(-n)
}
