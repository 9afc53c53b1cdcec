package qcow

import "github.com/qcow-csi/qcow-csi/qcow/format"

// Info describes an image.
type Info struct {
	VirtualSize   int64 // bytes
	FileSize      int64 // length of the file in bytes, rounded up to a cluster; with the reserve, which Close gives back
	ClusterSize   int   // bytes
	RefcountBits  int
	LazyRefcounts bool
	Dirty         bool // marked: refcounts may be wrong
	Corrupt       bool // marked: must not be written
	// Allocated says that some guest cluster has a host cluster, or had one since the image was made: there is an L2 table,
	// and those are never given back.
	Allocated bool
}

// Info returns what the header and the L1 table say of the image.
func (img *Image) Info() Info {
	img.headerMu.Lock()
	h := img.header
	img.headerMu.Unlock()
	return Info{
		VirtualSize:   img.Size(),
		FileSize:      int64(img.alloc.end.Load() << h.ClusterBits),
		ClusterSize:   int(h.ClusterSize()),
		RefcountBits:  int(h.RefcountBits()),
		LazyRefcounts: h.Compatible&format.CompatLazyRefcounts != 0,
		Dirty:         h.Incompatible&format.IncompatDirty != 0,
		Corrupt:       h.Incompatible&format.IncompatCorrupt != 0,
		Allocated:     img.everAllocated(),
	}
}

func (img *Image) everAllocated() bool {
	img.l1mu.RLock()
	defer img.l1mu.RUnlock()
	for i := range uint64(len(img.l1)) / format.EntrySize {
		if format.L1Entry(format.Entry(img.l1, i)).Offset() != 0 {
			return true
		}
	}
	return false
}
