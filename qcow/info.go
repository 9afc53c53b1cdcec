package qcow

import "github.com/qcow-csi/qcow-csi/qcow/format"

// Info describes an image.
type Info struct {
	Version         int   // 2 or 3
	VirtualSize     int64 // bytes
	FileSize        int64 // length of the file in bytes, rounded up to a cluster; with the reserve, which Close gives back
	ClusterSize     int   // bytes
	RefcountBits    int
	LazyRefcounts   bool
	ExtendedL2      bool
	CompressionType string // "zlib" or "zstd"
	Encryption      string // "", "aes" or "luks"
	BackingFile     string // as the header names it; "": none
	BackingFormat   string
	DataFile        string // as the header names it; "": none
	DataFileRaw     bool   // the data file is a raw image of the disk
	Snapshots       int
	Bitmaps         int  // dirty bitmaps that the header speaks of
	BitmapsIgnored  bool // their content was changed by a program without support for them: they are ignored
	Dirty           bool // marked: refcounts may be wrong
	Corrupt         bool // marked: must not be written
	// Allocated says that some guest cluster has a host cluster, or had one since the image was made: there is an L2 table, and only
	// Commit gives those back; or that this is so of a backing file, or that a raw one has data.
	Allocated bool
}

// Info returns what the header and the L1 table say of the image.
func (img *Image) Info() Info {
	img.headerMu.Lock()
	h, snapshots := img.header, len(img.snapshots)
	img.headerMu.Unlock()
	bitmaps, _ := h.Bitmaps() // what is not valid speaks of none
	if bitmaps == nil {
		bitmaps = &format.BitmapsExtension{}
	}
	return Info{
		Version:         int(h.Version),
		VirtualSize:     img.Size(),
		FileSize:        int64(img.alloc.end.Load() << h.ClusterBits),
		ClusterSize:     int(h.ClusterSize()),
		RefcountBits:    int(h.RefcountBits()),
		LazyRefcounts:   h.Compatible&format.CompatLazyRefcounts != 0,
		ExtendedL2:      h.ExtendedL2,
		CompressionType: img.compression.String(),
		Encryption:      map[uint32]string{cryptAES: "aes", cryptLUKS: "luks"}[h.CryptMethod],
		BackingFile:     h.BackingFile,
		BackingFormat:   h.BackingFormat(),
		DataFile:        h.DataFileName(),
		DataFileRaw:     h.Autoclear&format.AutoclearRawDataFile != 0,
		Snapshots:       snapshots,
		Bitmaps:         int(bitmaps.Count),
		BitmapsIgnored:  bitmaps.Count > 0 && h.Autoclear&format.AutoclearBitmaps == 0,
		Dirty:           h.Incompatible&format.IncompatDirty != 0,
		Corrupt:         h.Incompatible&format.IncompatCorrupt != 0,
		Allocated:       img.everAllocated() || img.under().everAllocated(),
	}
}

// Alignment returns the unit in bytes of what can be written: 512 for encrypted images, else 1. Reads may have any place and length.
func (img *Image) Alignment() int {
	if img.cipher != nil {
		return format.SectorSize
	}
	return 1
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
