package qcow

import (
	"io"
	"iter"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// ExtentKind says where the bytes of an extent come from.
type ExtentKind uint8

const (
	ExtentUnallocated ExtentKind = iota // no cluster: reads as zeroes
	ExtentZero                          // marked to read as zeroes
	ExtentData                          // stored in the image file
)

func (k ExtentKind) String() string {
	switch k {
	case ExtentUnallocated:
		return "unallocated"
	case ExtentZero:
		return "zero"
	case ExtentData:
		return "data"
	}
	return "unknown"
}

// Extent is a range of the virtual disk of one kind.
type Extent struct {
	Offset, Length int64 // bytes
	Kind           ExtentKind
	// Host is where the first byte is in the image file, for ExtentData and for an ExtentZero that keeps its clusters; else 0.
	Host format.HostOffset
}

// Extents describes n bytes of the virtual disk from off on, in order and without gaps. Neighbours of one kind are joined where they also
// are neighbours in the file. The time it takes depends on the tables in use, not on the size of the disk. It stops after
// the first error. Requests that run meanwhile may or may not be seen.
func (img *Image) Extents(off, n int64) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		epoch, err := img.begin(off, n, false)
		if err != nil {
			yield(Extent{}, err)
			return
		}
		img.epochs.leave(epoch)
		var pending Extent
		for end := off + n; off < end; {
			e, err := img.extentAt(off, end-off)
			if err != nil {
				if pending.Length == 0 || yield(pending, nil) {
					yield(Extent{}, err)
				}
				return
			}
			off += e.Length
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
		if pending.Length > 0 {
			yield(pending, nil)
		}
	}
}

// extentAt looks up one extent. It enters and leaves the image by itself, so that a slow receiver of extents holds nobody up.
func (img *Image) extentAt(off, n int64) (Extent, error) {
	epoch, err := img.begin(off, n, false)
	if err != nil {
		return Extent{}, err
	}
	defer img.epochs.leave(epoch)
	m, err := img.lookup(format.GuestOffset(off), uint64(n))
	if err != nil {
		return Extent{}, err
	}
	e := Extent{Offset: off, Length: int64(m.length), Host: m.host}
	switch m.kind {
	case format.Data:
		e.Kind = ExtentData
	case format.ZeroedPlain, format.ZeroAllocated:
		e.Kind = ExtentZero
	case format.Unallocated, format.Compressed: // lookup refuses the latter
		e.Kind = ExtentUnallocated
	}
	return e, nil
}

func (e Extent) continuedBy(next Extent) bool {
	if e.Kind != next.Kind {
		return false
	}
	if e.Host == 0 || next.Host == 0 {
		return e.Host == next.Host
	}
	return e.Host+format.HostOffset(e.Length) == next.Host
}

// SeekMapped returns the first offset at or behind off whose byte is stored in the image file; io.EOF where there is none.
func (img *Image) SeekMapped(off int64) (int64, error) {
	for e, err := range img.Extents(off, max(img.Size()-off, 0)) {
		if err != nil || e.Kind == ExtentData {
			return e.Offset, err
		}
	}
	return 0, io.EOF
}

// SeekUnmapped returns the first offset at or behind off whose byte is not stored in the image file; the size of the disk where
// there is none.
func (img *Image) SeekUnmapped(off int64) (int64, error) {
	for e, err := range img.Extents(off, max(img.Size()-off, 0)) {
		if err != nil || e.Kind != ExtentData {
			return e.Offset, err
		}
	}
	return img.Size(), nil
}
