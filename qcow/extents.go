package qcow

import (
	"io"
	"iter"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// ExtentKind says where the bytes of an extent come from.
type ExtentKind uint8

const (
	ExtentUnallocated ExtentKind = iota // no cluster in the whole chain: reads as zeroes
	ExtentZero                          // marked to read as zeroes, or a hole of a raw backing file
	ExtentData                          // stored
	ExtentCompressed                    // stored compressed
)

func (k ExtentKind) String() string {
	switch k {
	case ExtentUnallocated:
		return "unallocated"
	case ExtentZero:
		return "zero"
	case ExtentData:
		return "data"
	case ExtentCompressed:
		return "compressed"
	}
	return "unknown"
}

// Extent is a range of the virtual disk of one kind.
type Extent struct {
	Offset, Length int64 // bytes
	Kind           ExtentKind
	// Depth is which file of the chain says so: 0 the image itself, 1 its backing file, and so on. For ExtentUnallocated it is the last file
	// that could have said something: the one behind it ends before, or there is none.
	Depth int
	// Host is where the first byte is in that file, or in its data file, for ExtentData and for an ExtentZero that keeps its clusters.
	Host format.HostOffset
}

// extentBatch is how many extents are looked up at once.
const extentBatch = 256

// Extents describes n bytes of the virtual disk from off on, in order and without gaps. Neighbours of one kind are joined where they also
// are neighbours in the file. The time it takes depends on the tables in use, not on the size of the disk. It stops after
// the first error. Requests that run meanwhile may or may not be seen; a slow receiver of extents holds none of them up.
func (img *Image) Extents(off, n int64) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		batch, err := img.collectInEpoch(make([]Extent, 0, min(max(n/format.SectorSize, 1), extentBatch)), off, n, 0)
		var pending Extent
		for {
			for _, e := range batch {
				off, n = off+e.Length, n-e.Length
				switch {
				case pending.Length == 0:
					pending = e
				case pending.continuedBy(e):
					pending.Length += e.Length
				case !yield(pending, nil):
					return
				default:
					pending = e
				}
			}
			if err != nil || n == 0 {
				break
			}
			batch, err = img.collectInEpoch(batch[:0], off, n, 0)
		}
		if (pending.Length == 0 || yield(pending, nil)) && err != nil {
			yield(Extent{}, err)
		}
	}
}

// collectInEpoch is collect for whoever is not inside an epoch.
func (img *Image) collectInEpoch(list []Extent, off, n int64, depth int) ([]Extent, error) {
	epoch, err := img.begin(off, n, false)
	if err != nil {
		return list, err
	}
	defer img.epochs.leave(epoch)
	return img.collect(list, off, n, depth)
}

// collect appends to list what describes the first of n bytes at off, until there is no place left in it. The image is at this depth
// of its chain.
func (img *Image) collect(list []Extent, off, n int64, depth int) ([]Extent, error) {
	for end := off + n; off < end && len(list) < cap(list); {
		m, err := img.lookup(format.GuestOffset(off), uint64(end-off))
		if err != nil {
			return list, err
		}
		e := Extent{Offset: off, Length: int64(m.length), Depth: depth}
		switch m.kind {
		case format.Data:
			e.Kind, e.Host = ExtentData, m.host
		case format.ZeroAllocated:
			e.Kind, e.Host = ExtentZero, m.host
		case format.ZeroedPlain:
			e.Kind = ExtentZero
		case format.Compressed:
			e.Kind = ExtentCompressed
		case format.Unallocated, format.UnallocatedHost:
			b := img.under()
			if b == nil {
				break
			}
			if list, err = b.collect(list, off, e.Length, depth+1); err != nil {
				return list, err
			}
			last := &list[len(list)-1]
			off = last.Offset + last.Length
			continue
		}
		list = appendExtent(list, e)
		off += e.Length
	}
	return list, nil
}

// appendExtent adds e to the list, to its last extent where it continues that.
func appendExtent(list []Extent, e Extent) []Extent {
	if last := len(list) - 1; last >= 0 && list[last].continuedBy(e) {
		list[last].Length += e.Length
		return list
	}
	return append(list, e)
}

// continuedBy reports whether next, which begins where e ends, is more of the same.
func (e Extent) continuedBy(next Extent) bool {
	if e.Kind != next.Kind || e.Depth != next.Depth {
		return false
	}
	if e.Kind != ExtentData && (e.Host == 0 || next.Host == 0) {
		return e.Host == next.Host
	}
	return e.Host+format.HostOffset(e.Length) == next.Host
}

func (e Extent) stored() bool { return e.Kind == ExtentData || e.Kind == ExtentCompressed }

// SeekMapped returns the first offset at or behind off whose byte is stored in a file of the chain; io.EOF where there is none.
func (img *Image) SeekMapped(off int64) (int64, error) {
	for e, err := range img.Extents(off, max(img.Size()-off, 0)) {
		if err != nil || e.stored() {
			return e.Offset, err
		}
	}
	return 0, io.EOF
}

// SeekUnmapped returns the first offset at or behind off whose byte is not stored in a file of the chain; the size of the disk where
// there is none.
func (img *Image) SeekUnmapped(off int64) (int64, error) {
	for e, err := range img.Extents(off, max(img.Size()-off, 0)) {
		if err != nil || !e.stored() {
			return e.Offset, err
		}
	}
	return img.Size(), nil
}
