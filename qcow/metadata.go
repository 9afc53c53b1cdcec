package qcow

import (
	"sync"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// metadataMap knows which host clusters hold the header and the tables. No guest data is ever written there, whatever an
// L2 entry says: a guest that could write its image's metadata could reach any file that the metadata names.
type metadataMap struct {
	geometry format.Geometry

	mu  sync.RWMutex
	set clusterSet
}

func (m *metadataMap) add(x run) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.set.add(x.first, x.n)
}

func (m *metadataMap) remove(x run) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.set.remove(x.first, x.n)
}

// addTable adds a table that an image being opened refers to, unless it overlaps one that was added before.
func (m *metadataMap) addTable(name string, x run) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if c, found := m.set.find(x.first, x.n); found {
		return format.Corruptf(name, m.geometry.OffsetOf(c), "overlaps other metadata")
	}
	m.set.add(x.first, x.n)
	return nil
}

// mustBeFree checks that clusters which the refcounts call free hold no metadata: in a corrupt image they may.
func (m *metadataMap) mustBeFree(x run) error {
	if c, found := m.find(x); found {
		return format.Corruptf("refcount block", m.geometry.OffsetOf(c), "the refcount of a cluster with metadata is 0")
	}
	return nil
}

// mustBeData checks that guest data may be written to n bytes at off.
func (m *metadataMap) mustBeData(off format.HostOffset, n uint64) error {
	first, last := m.geometry.ClusterOf(off), m.geometry.ClusterOf(off+format.HostOffset(n-1))
	if c, found := m.find(run{first, uint64(last-first) + 1}); found {
		return format.Corruptf("L2 table", m.geometry.OffsetOf(c), "a data cluster overlaps metadata")
	}
	return nil
}

func (m *metadataMap) find(x run) (format.Cluster, bool) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.set.find(x.first, x.n)
}
