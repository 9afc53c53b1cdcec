package qcow_test

import (
	"bytes"
	"fmt"
	"math"
	"slices"
	"sync"
)

// A deed is a request that changes a part of the disk.
type deed struct {
	begun, ended uint64 // by the clock of the crew; it has not ended while that is 0
	off, n       int64  // in the part
	seed         uint64 // of what is written; 0: zeroes
	packed       bool   // it can be compressed
}

// do does the deed to a copy of the part.
func (d *deed) do(part []byte) {
	switch p := part[d.off:][:d.n]; {
	case d.seed == 0:
		clear(p)
	case d.packed:
		for i := range p {
			p[i] = byte(d.seed >> (i / 100 % 64))
		}
	default:
		scramble(p, d.seed)
	}
}

// A window is between two readings of the crew's clock.
type window struct{ from, to uint64 }

// within returns when, in w, deeds up to the one before index i had happened, and the others not.
func (w window) within(deeds []deed, i int) (window, bool) {
	if i > 0 {
		w.from = max(w.from, deeds[i-1].begun)
	}
	if i < len(deeds) && deeds[i].ended > 0 {
		w.to = min(w.to, deeds[i].ended)
	}
	return w, w.from < w.to
}

// meet tells whether some moment is in one window of every set.
func meet(sets [][]window) bool {
	common := []window{{0, math.MaxUint64}}
	for _, set := range sets {
		var both []window
		for _, a := range common {
			for _, b := range set {
				if w := (window{max(a.from, b.from), min(a.to, b.to)}); w.from < w.to {
					both = append(both, w)
				}
			}
		}
		common = both
	}
	return len(common) > 0
}

// A past is what may have happened to a part of the disk: it was base, and then came the deeds from one on.
type past struct {
	base  []byte
	from  int
	now   []byte // after all deeds that have ended
	since window // when that snapshot was applied that base comes from
}

// A hand is one goroutine of a crew. It has a part of the disk for itself, and fights with the others for another one.
type hand struct {
	*owner
	c    *crew
	size int64

	mu      sync.Mutex
	deeds   []deed // since the crew settled last; at most the last one has not ended
	pasts   []past // those that may be, at least one
	applied []byte // the part in the snapshot that is just being applied
	applies int    // twice for each
}

// request does a random request.
func (h *hand) request(serial uint64) error {
	what := h.rng.IntN(20)
	switch {
	case what < 4:
		return h.contest(serial)
	case what < 8:
		return h.look()
	case what < 9:
		return h.img.Flush()
	}
	unit, cluster := int64(h.img.Alignment()), h.c.cluster
	n := 1 + h.rng.Int64N(h.size)
	if h.rng.IntN(3) > 0 {
		n = min(n, 1+h.rng.Int64N(2*cluster))
	}
	n = max(n/unit*unit, unit)
	d := deed{off: h.rng.Int64N(h.size-n+1) / unit * unit, n: n}
	first, end := (h.start+d.off+cluster-1)/cluster*cluster, (h.start+d.off+n)/cluster*cluster
	switch {
	case what < 11:
		return h.act(d, func() error { return h.img.WriteZeroes(h.start+d.off, n, what == 9) })
	case what < 13 && h.c.version > 2:
		off := h.start + d.off
		d.off, d.n = first-h.start, max(end-first, 0)
		if d.n == 0 {
			d.off = 0
		}
		return h.act(d, func() error { return h.img.Discard(off, n) })
	case what < 14 && first < end && !h.c.kind.luks && !h.c.kind.external:
		d = deed{off: first - h.start, n: end - first, seed: h.rng.Uint64() | 1, packed: true}
		p := make([]byte, h.size)
		d.do(p)
		return h.act(d, func() error { return h.img.WriteCompressed(p[d.off:][:d.n], first) })
	}
	d.seed = h.rng.Uint64() | 1
	p := make([]byte, h.size)
	d.do(p)
	return h.act(d, func() (err error) {
		if what == 19 {
			_, err = h.img.WriteSync(p[d.off:][:d.n], h.start+d.off)
		} else {
			_, err = h.img.WriteAt(p[d.off:][:d.n], h.start+d.off)
		}
		return err
	})
}

// act does a deed.
func (h *hand) act(d deed, do func() error) error {
	h.mu.Lock()
	d.begun = h.c.clock.Add(1)
	h.deeds = append(h.deeds, d)
	h.mu.Unlock()
	if err := do(); err != nil {
		return fmt.Errorf("%+v at %d: %w", d, h.start, err)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	last := &h.deeds[len(h.deeds)-1]
	last.ended = h.c.clock.Add(1)
	for i := range h.pasts {
		if p := &h.pasts[i]; p.from < len(h.deeds) {
			last.do(p.now)
		}
	}
	return nil
}

// possible returns what the part may be now, when no deed is under way.
func (h *hand) possible() (states [][]byte, applies int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for i := range h.pasts {
		states = append(states, h.pasts[i].now)
	}
	if h.applied != nil {
		for i := range len(h.deeds) + 1 {
			states = append(states, after(h.applied, h.deeds[i:]))
		}
	}
	return states, h.applies
}

func after(base []byte, deeds []deed) []byte {
	state := bytes.Clone(base)
	for i := range deeds {
		deeds[i].do(state)
	}
	return state
}

// look reads some of the part, which no deed is changing. While a snapshot is applied bytes of both contents may be seen.
func (h *hand) look() error {
	n := 1 + h.rng.Int64N(h.size)
	at := h.rng.Int64N(h.size - n + 1)
	got := make([]byte, n)
	before, applies := h.possible()
	if _, err := h.img.ReadAt(got, h.start+at); err != nil {
		return err
	}
	states, now := h.possible()
	if now == applies && now%2 == 0 {
		if !slices.ContainsFunc(states, func(s []byte) bool { return bytes.Equal(s[at:][:n], got) }) {
			return fmt.Errorf("hand %d: %d bytes at %d are none of %d possible contents; byte %d differs", h.id, n, h.start+at, len(states), firstDifference(got, states[0][at:][:n]))
		}
		return nil
	}
	if now > applies+2 {
		return nil // another snapshot was there in between
	}
	states = append(states, before...)
	for i, v := range got {
		if !slices.ContainsFunc(states, func(s []byte) bool { return s[at+int64(i)] == v }) {
			return fmt.Errorf("hand %d: byte %d is %#x, which it is in neither content", h.id, h.start+at+int64(i), v)
		}
	}
	return nil
}

// settle forgets the deeds that have ended, after it told what they changed.
func (h *hand) settle(tell func(d *deed)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	n := len(h.deeds)
	if n > 0 && h.deeds[n-1].ended == 0 {
		n--
	}
	for i := range h.deeds[:n] {
		tell(&h.deeds[i])
	}
	for i := range h.pasts {
		p := &h.pasts[i]
		p.base, p.from = bytes.Clone(p.now), max(p.from-n, 0)
	}
	h.deeds = slices.Clone(h.deeds[n:])
}

// match finds out when, in a window since the crew has settled, the part may have been content, and forgets pasts in which it never was.
func (h *hand) match(content []byte, in window) (when, since []window) {
	h.mu.Lock()
	defer h.mu.Unlock()
	var left []past
	for _, p := range h.pasts {
		state, found := bytes.Clone(p.base), false
		for i := p.from; ; i++ {
			if w, ok := in.within(h.deeds, i); ok && bytes.Equal(state, content) {
				when, found = append(when, w), true
			}
			if i == len(h.deeds) {
				break
			}
			h.deeds[i].do(state)
		}
		if found {
			left, since = append(left, p), append(since, p.since)
		}
	}
	if len(left) > 0 {
		h.pasts = left
	}
	return when, since
}

// beginApply notes that the part may become content from now on.
func (h *hand) beginApply(content []byte) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.applied = content
	h.applies++
}

// endApply notes that the part became content in a window since the crew has settled, or, where done is false, that it did not.
func (h *hand) endApply(in window, done bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	content := h.applied
	h.applied = nil
	h.applies++
	if !done {
		return
	}
	ended := len(h.deeds)
	if ended > 0 && h.deeds[ended-1].ended == 0 {
		ended--
	}
	h.pasts = nil
	for i := range len(h.deeds) + 1 {
		if w, ok := in.within(h.deeds, i); ok {
			h.pasts = append(h.pasts, past{base: content, from: i, now: after(content, h.deeds[min(i, ended):ended]), since: w})
		}
	}
}
