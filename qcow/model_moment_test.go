package qcow_test

import (
	"bytes"
	"math"
	"testing"
)

// TestMoments expects that the judge of concurrent scenarios tells a moment of the disk from what never was one.
func TestMoments(t *testing.T) {
	hands := make([]*hand, 2)
	for i := range hands {
		hands[i] = &hand{size: 4, pasts: []past{{base: make([]byte, 4), now: make([]byte, 4), since: window{0, math.MaxUint64}}}}
	}
	// One hand does a deed at 10, the other one at 20 and one that is under way at 30.
	deeds := []deed{{begun: 10, ended: 11, n: 1, seed: 1}, {begun: 20, ended: 21, n: 1, seed: 2}, {begun: 30, off: 1, n: 1, seed: 3}}
	hands[0].deeds, hands[1].deeds = deeds[:1], deeds[1:]
	part := func(deeds ...deed) []byte { return after(make([]byte, 4), deeds) }
	for _, c := range []struct {
		what string
		a, b []byte
		in   window
		want bool
	}{
		{"before all", part(), part(), window{5, 40}, true},
		{"after the first", part(deeds[0]), part(), window{5, 40}, true},
		{"after the second", part(deeds[0]), part(deeds[1]), window{5, 40}, true},
		{"with what is under way", part(deeds[0]), part(deeds[1:]...), window{5, 40}, true},
		{"the second without the first", part(), part(deeds[1]), window{5, 40}, false},
		{"what nobody wrote", part(deeds[0]), part(deeds[2]), window{5, 40}, false},
		{"too late", part(), part(), window{12, 40}, false},
		{"too early", part(deeds[0]), part(deeds[1]), window{5, 19}, false},
	} {
		a, _ := hands[0].match(c.a, c.in)
		b, _ := hands[1].match(c.b, c.in)
		if got := meet([][]window{a, b}); got != c.want {
			t.Errorf("%s: %v, %v", c.what, a, b)
		}
	}
	// A snapshot of zeroes is applied between 5 and 15: what the first hand did may have come before or after.
	hands[0].beginApply(part())
	hands[0].endApply(window{5, 15}, true)
	if states, applies := hands[0].possible(); len(states) != 2 || applies != 2 || bytes.Equal(states[0], states[1]) {
		t.Errorf("%d, after %d, may be: %v", len(states), applies, states)
	}
	if w, since := hands[0].match(part(), window{16, 40}); len(w) != 1 || len(since) != 1 || since[0] != (window{10, 15}) {
		t.Errorf("it is as in the snapshot at %v, applied at %v", w, since)
	}
	if states, _ := hands[0].possible(); len(states) != 1 {
		t.Errorf("it may be: %v", states)
	}
}
