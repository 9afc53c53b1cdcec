package qcow

import (
	"encoding/binary"
	"math"
	"math/bits"
	"sync/atomic"
)

// A bitSet has at most 2^32 bits, in pages of 2^16, of which 256 make a chunk.
const (
	bitPageShift  = 16
	bitChunkShift = 24
	bitPageWords  = 1 << bitPageShift / 64
	bitPageBytes  = 1 << bitPageShift / 8
	bitChunkPages = 1 << (bitChunkShift - bitPageShift)
	bitChunkBytes = bitChunkPages * 8
	bitSetChunks  = 1 << (32 - bitChunkShift)
	bitSetBytes   = bitSetChunks * 8

	maxBits = 1 << 32
)

type (
	bitPage  [bitPageWords]atomic.Uint64
	bitChunk [bitChunkPages]atomic.Pointer[bitPage]
)

// fullPage and fullChunk have every bit set. They stand wherever all of a page or of a chunk is, and are never written to: there is no
// bit in them to set.
var (
	fullPage  = newFullPage()
	fullChunk = newFullChunk()
)

func newFullPage() *bitPage {
	p := new(bitPage)
	for i := range p {
		p[i].Store(math.MaxUint64)
	}
	return p
}

func newFullChunk() *bitChunk {
	c := new(bitChunk)
	for i := range c {
		c[i].Store(fullPage)
	}
	return c
}

// bitMemory bounds what the bits of an image take.
type bitMemory struct{ left atomic.Int64 } // bytes

func (m *bitMemory) take(n int64) bool {
	if m.left.Add(-n) >= 0 {
		return true
	}
	m.left.Add(n)
	return false
}

// bitSet is the bits of a dirty bitmap, sparse: a page or a chunk without a bit is absent. Bits are set without any lock, by many at a time,
// and never cleared. Where the memory for a page is not to be had all of its bits are set: a bitmap may say too much, but not too little.
type bitSet struct {
	memory  *bitMemory
	changed atomic.Bool // some bit is set that the image file does not have
	chunks  [bitSetChunks]atomic.Pointer[bitChunk]
}

// bytes returns how much memory the set takes.
func (s *bitSet) bytes() (n int64) {
	n = bitSetBytes
	for i := range s.chunks {
		c := s.chunks[i].Load()
		if c == nil || c == fullChunk {
			continue
		}
		n += bitChunkBytes
		for k := range c {
			if p := c[k].Load(); p != nil && p != fullPage {
				n += bitPageBytes
			}
		}
	}
	return n
}

// page returns the page of bit i, nil when it has none.
func (s *bitSet) page(i uint64) *bitPage {
	c := s.chunks[i>>bitChunkShift].Load()
	if c == nil {
		return nil
	}
	return c[i>>bitPageShift%bitChunkPages].Load()
}

// slot returns where the page of bit i is kept.
func (s *bitSet) slot(i uint64) *atomic.Pointer[bitPage] {
	at := &s.chunks[i>>bitChunkShift]
	c := at.Load()
	if c == nil {
		fresh := fullChunk
		taken := s.memory.take(bitChunkBytes)
		if taken {
			fresh = new(bitChunk)
		}
		if at.CompareAndSwap(nil, fresh) {
			c = fresh
		} else {
			if taken {
				s.memory.left.Add(bitChunkBytes)
			}
			c = at.Load()
		}
	}
	return &c[i>>bitPageShift%bitChunkPages]
}

// ownPage returns the page of bit i, and makes one where there is none.
func (s *bitSet) ownPage(i uint64) *bitPage {
	slot := s.slot(i)
	if p := slot.Load(); p != nil {
		return p
	}
	fresh := fullPage
	taken := s.memory.take(bitPageBytes)
	if taken {
		fresh = new(bitPage)
	}
	if !slot.CompareAndSwap(nil, fresh) {
		if taken {
			s.memory.left.Add(bitPageBytes)
		}
		return slot.Load()
	}
	if !taken {
		s.changed.Store(true)
	}
	return fresh
}

// add sets the bits from first to end-1.
func (s *bitSet) add(first, end uint64) {
	for first < end {
		stop := min(end, (first>>bitPageShift+1)<<bitPageShift)
		if stop-first == 1<<bitPageShift {
			s.fill(first)
		} else if s.ownPage(first).add(first%(1<<bitPageShift), stop-first) && !s.changed.Load() {
			s.changed.Store(true)
		}
		first = stop
	}
}

// fill sets all bits of the page of bit i.
func (s *bitSet) fill(i uint64) {
	slot := s.slot(i)
	if slot.Load() == fullPage {
		return
	}
	if old := slot.Swap(fullPage); old != nil && old != fullPage {
		s.memory.left.Add(bitPageBytes)
	}
	s.changed.Store(true)
}

// add sets n bits from first on, and tells whether any of them was not set.
func (p *bitPage) add(first, n uint64) (changed bool) {
	for end := first + n; first < end; {
		stop := min(end, (first|63)+1)
		mask := uint64(math.MaxUint64) >> (64 - (stop - first)) << (first % 64)
		if w := &p[first/64]; w.Load()&mask != mask {
			w.Or(mask)
			changed = true
		}
		first = stop
	}
	return changed
}

// find returns the first bit from i on and before end that is set, or, with set false, that is not; end when there is none.
func (s *bitSet) find(i, end uint64, set bool) uint64 {
	for i < end {
		p := s.page(i)
		switch {
		case p == nil && !set, p == fullPage && set:
			return i
		case p == nil && s.chunks[i>>bitChunkShift].Load() == nil:
			i = (i>>bitChunkShift + 1) << bitChunkShift
			continue
		case p == nil, p == fullPage:
			i = (i>>bitPageShift + 1) << bitPageShift
			continue
		}
		for stop := min(end, (i>>bitPageShift+1)<<bitPageShift); i < stop; i = (i | 63) + 1 {
			w := p[i%(1<<bitPageShift)/64].Load()
			if !set {
				w = ^w
			}
			if w >>= i % 64; w != 0 {
				return min(end, i+uint64(bits.TrailingZeros64(w)))
			}
		}
	}
	return end
}

// count returns how many of the bits before end are set.
func (s *bitSet) count(end uint64) (n uint64) {
	for i := uint64(0); i < end; {
		p, stop := s.page(i), min(end, i+1<<bitPageShift)
		switch {
		case p == nil && s.chunks[i>>bitChunkShift].Load() == nil:
			i = (i>>bitChunkShift + 1) << bitChunkShift
			continue
		case p == fullPage:
			n += stop - i
		case p != nil:
			for k := i; k < stop; k += 64 {
				n += uint64(bits.OnesCount64(p.word(k, stop)))
			}
		}
		i = stop
	}
	return n
}

// word returns the word that begins with bit i, without the bits from end on.
func (p *bitPage) word(i, end uint64) uint64 {
	w := p[i%(1<<bitPageShift)/64].Load()
	if end-i < 64 {
		w &= 1<<(end-i) - 1
	}
	return w
}

// union returns a set with the bits of s, as far as they are before end, and those of t, which stay as they are. It has pages in
// common with s, so that of the two only one may be used further.
func (s *bitSet) union(end uint64, t *bitSet) *bitSet {
	u := &bitSet{memory: s.memory}
	u.changed.Store(true)
	for i := range s.chunks {
		a, b := s.chunks[i].Load(), t.chunks[i].Load()
		first := uint64(i) << bitChunkShift
		if first >= end {
			a = nil
		}
		whole := first+1<<bitChunkShift <= end
		switch {
		case a == nil && b == nil:
		case a == fullChunk && whole, b == fullChunk:
			u.chunks[i].Store(fullChunk)
		case b == nil && whole:
			u.chunks[i].Store(a)
		default:
			u.chunks[i].Store(s.unionChunk(first, end, a, b))
		}
	}
	return u
}

func (s *bitSet) unionChunk(first, end uint64, a, b *bitChunk) *bitChunk {
	if !s.memory.take(bitChunkBytes) {
		return fullChunk
	}
	u := new(bitChunk)
	for k := range u {
		var p, q *bitPage
		at := first + uint64(k)<<bitPageShift
		if a != nil && at < end {
			p = a[k].Load()
		}
		if b != nil {
			q = b[k].Load()
		}
		whole := at+1<<bitPageShift <= end
		switch {
		case p == nil && q == nil:
		case p == fullPage && whole, q == fullPage:
			u[k].Store(fullPage)
		case q == nil && whole:
			u[k].Store(p)
		case !s.memory.take(bitPageBytes):
			u[k].Store(fullPage)
		default:
			u[k].Store(unionPage(at, end, p, q))
		}
	}
	return u
}

// unionPage returns a page with the bits of p, as far as they are before end, and those of q. It begins with the bit first.
func unionPage(first, end uint64, p, q *bitPage) *bitPage {
	u := new(bitPage)
	for w := range u {
		var word uint64
		if at := first + uint64(w)*64; p != nil && at < end {
			word = p.word(at, end)
		}
		if q != nil {
			word |= q[w].Load()
		}
		u[w].Store(word)
	}
	return u
}

// encode writes the bits from first on to b as they are in the image file (specification, "Bitmap data"), those from end on as zeroes.
func (s *bitSet) encode(b []byte, first, end uint64) {
	for i := 0; i < len(b); i += 8 {
		var word uint64
		if at := first + uint64(i)*8; at < end {
			if p := s.page(at); p != nil {
				word = p.word(at, end)
			}
		}
		binary.LittleEndian.PutUint64(b[i:], word)
	}
}

// decode sets the bits that b, as it is in the image file, has from first on and before end. It tells whether there was the memory for them.
func (s *bitSet) decode(b []byte, first, end uint64) bool {
	for i := 0; i < len(b); i += 8 {
		at := first + uint64(i)*8
		word := binary.LittleEndian.Uint64(b[i:])
		if word == 0 || at >= end {
			continue
		}
		if end-at < 64 {
			word &= 1<<(end-at) - 1
		}
		p := s.ownPage(at)
		if p == fullPage {
			return false
		}
		p[at%(1<<bitPageShift)/64].Or(word)
	}
	return true
}
