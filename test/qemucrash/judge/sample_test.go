package judge

import (
	"slices"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

func TestDraw(t *testing.T) {
	moments := [][]int{{0}, {1, 2, 3, 4, 5, 6, 7, 8, 9, 10}, {11, 12}, nil, {13, 14, 15, 16}}
	of := func(drawn []int, m int) (n int) {
		for _, d := range drawn {
			if slices.Contains(moments[m], d) {
				n++
			}
		}
		return n
	}
	drawn := draw(moments, 11, 1)
	if len(drawn) != 11 || !slices.IsSorted(drawn) || len(slices.Compact(slices.Clone(drawn))) != 11 {
		t.Fatalf("drawn: %v", drawn)
	}
	if of(drawn, 0) != 1 || of(drawn, 1) != 4 || of(drawn, 2) != 2 || of(drawn, 4) != 4 {
		t.Errorf("not evenly drawn: %v", drawn)
	}
	if !slices.Equal(drawn, draw(moments, 11, 1)) {
		t.Error("one seed gave different draws")
	}
	different := false
	for seed := range uint64(20) {
		different = different || !slices.Equal(drawn, draw(moments, 11, seed))
	}
	if !different {
		t.Error("all seeds gave the same draw")
	}
	if all := draw(moments, 1000, 1); len(all) != 17 {
		t.Errorf("all: %v", all)
	}
}

// States that have the same contents are put together, and their contents are those of the file.
func TestSample(t *testing.T) {
	trial := &Trial{
		Images: []Image{{Initial: []byte("ab")}},
		Ops: []storage.Op{
			{Kind: storage.OpWrite, Offset: 0, Data: []byte("x")},
			{Kind: storage.OpSync},
			{Kind: storage.OpWrite, Offset: 1, Data: []byte("b")}, // changes nothing
			{Kind: storage.OpWrite, Offset: 1, Data: []byte("y")},
		},
	}
	p := newPopulation(trial, 1)
	samples, total := p.sample(100, 1)
	got := map[string]int{}
	for s, contents := range p.contents(samples) {
		got[string(contents[0])] = len(s.states)
	}
	// ab: nothing written. xb: kill after x, the power loss with x, kill after b, neither or the first of b and y.
	if total != 9 || len(got) != 3 || got["ab"] != 1 || got["xb"] != 5 || got["xy"] != 3 {
		t.Errorf("%d states: %v", total, got)
	}
}
