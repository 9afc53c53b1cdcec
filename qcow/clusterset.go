package qcow

import "github.com/qcow-csi/qcow-csi/qcow/format"

// clusterSet is a set of host clusters: a bitmap in pages, of which only those with members exist.
type clusterSet map[format.Cluster]*[pageWords]uint64

const (
	pageWords    = 64
	pageClusters = pageWords * 64
)

func (s clusterSet) add(first format.Cluster, n uint64) {
	for c := first; c < first+format.Cluster(n); c++ {
		page := s[c/pageClusters]
		if page == nil {
			page = new([pageWords]uint64)
			s[c/pageClusters] = page
		}
		page[c%pageClusters/64] |= 1 << (c % 64)
	}
}

func (s clusterSet) remove(first format.Cluster, n uint64) {
	for c := first; c < first+format.Cluster(n); c++ {
		if page := s[c/pageClusters]; page != nil {
			page[c%pageClusters/64] &^= 1 << (c % 64)
		}
	}
}

// find returns the first member among n clusters from first on.
func (s clusterSet) find(first format.Cluster, n uint64) (format.Cluster, bool) {
	for c, end := first, first+format.Cluster(n); c < end; {
		page := s[c/pageClusters]
		if page == nil {
			c = (c/pageClusters + 1) * pageClusters
			continue
		}
		if page[c%pageClusters/64]&(1<<(c%64)) != 0 {
			return c, true
		}
		c++
	}
	return 0, false
}
