package qcow

import (
	"math/rand/v2"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

func TestClusterSet(t *testing.T) {
	const far = 1 << 30 // the set is sparse: what lies between costs nothing
	rng := rand.New(rand.NewPCG(1, 1))
	s, model := clusterSet{}, map[format.Cluster]bool{}
	for range 3000 {
		first := format.Cluster(rng.Uint64N(3 * pageClusters))
		if rng.IntN(3) == 0 {
			first += far
		}
		n := rng.Uint64N(100)
		if rng.IntN(8) == 0 {
			n = rng.Uint64N(2 * pageClusters)
		}
		switch rng.IntN(3) {
		case 0:
			n /= 16 // so that there are gaps
			s.add(first, n)
			for c := range format.Cluster(n) {
				model[first+c] = true
			}
		case 1:
			s.remove(first, n)
			for c := range format.Cluster(n) {
				delete(model, first+c)
			}
		default:
			var want format.Cluster
			found := false
			for c := format.Cluster(0); c < format.Cluster(n) && !found; c++ {
				want, found = first+c, model[first+c]
			}
			if !found {
				want = 0
			}
			if got, ok := s.find(first, n); got != want || ok != found {
				t.Fatalf("find %d+%d: %d, %v; want %d, %v", first, n, got, ok, want, found)
			}
		}
	}
	if c, found := s.find(4*pageClusters, far-4*pageClusters); found {
		t.Errorf("cluster %d is a member", c)
	}
	if len(s) > 8 {
		t.Errorf("%d pages for members in 7", len(s))
	}
}

// A search that begins inside a page without members goes on at the start of the next one.
func TestClusterSetFindAcrossPages(t *testing.T) {
	s := clusterSet{}
	s.add(2*pageClusters+1, 1)
	if c, found := s.find(pageClusters-5, 10*pageClusters); !found || c != 2*pageClusters+1 {
		t.Errorf("found %d, %v", c, found)
	}
	if c, found := s.find(pageClusters-5, pageClusters+6); found {
		t.Errorf("found %d behind the end of the search", c)
	}
}
