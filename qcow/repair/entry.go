package repair

import (
	"fmt"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// verdict is what is to be thought of an L2 entry.
type verdict struct {
	entry   format.MappingEntry // without its faults, COPIED aside
	problem string              // what is wrong with it; empty when nothing is
	lost    bool                // it cannot be followed; entry reads as zeroes where there was data
	hadData bool                // and there was
	flagged bool                // COPIED means something in it
	// misplaced says that it leads to another place of the data file than its guest cluster has.
	misplaced bool
	first     uint64 // the host clusters that it refers to; with lost, that it meant
	n         uint64 // none in a data file
}

// judgeEntry judges the entry of the guest cluster at guest, which is not empty.
func (r *repairer) judgeEntry(e format.MappingEntry, guest format.GuestOffset) verdict {
	switch {
	case r.h.DataFile:
		return r.judgeDataFile(e, guest)
	case e.Kind() == format.Compressed:
		return r.judgeCompressed(e)
	}
	v := verdict{entry: r.withoutReserved(e), problem: r.h.CheckEntry(e)}
	if r.h.Version == 2 && e.L2Entry&format.ZeroPlain != 0 && v.problem == "" {
		v.problem = "a version 2 image has no zero clusters"
	}
	host := r.h.HasHost(v.entry)
	bits := &v.entry.Subclusters
	v.hadData = host && v.entry.L2Entry&format.ZeroPlain == 0
	if r.h.ExtendedL2 {
		v.hadData = *bits&format.AllData != 0
		*bits &^= format.Subclusters(bits.Invalid()) // what is both reads as neither; zeroes it shall be
	}
	if !host {
		return r.withoutHost(v)
	}
	off := v.entry.Offset()
	v.flagged = true
	if !r.h.Aligned(off) {
		return r.loseEntry(v, fmt.Sprintf("%#x is not the start of a cluster", uint64(off)))
	}
	v.first, v.n = uint64(r.h.ClusterOf(off)), 1
	switch {
	case uint64(off) >= r.size:
		return r.loseEntry(v, fmt.Sprintf("%#x is outside the file of %d bytes", uint64(off), r.size))
	case r.isFixed(v.first):
		return r.loseEntry(v, fmt.Sprintf("%#x is where the encryption header is", uint64(off)))
	}
	return v
}

// withoutReserved clears the bits that have no meaning in the image, zero flags among them where there are none.
func (r *repairer) withoutReserved(e format.MappingEntry) format.MappingEntry {
	e.L2Entry &^= format.L2Entry(e.Reserved())
	if r.h.ExtendedL2 || r.h.Version == 2 {
		e.L2Entry &^= format.ZeroPlain
	}
	return e
}

// withoutHost judges an entry that has no host cluster. COPIED means nothing in it.
func (r *repairer) withoutHost(v verdict) verdict {
	if v.entry.Copied() {
		v.entry.L2Entry = v.entry.WithCopied(false)
		if v.problem == "" {
			v.problem = "COPIED without a host cluster"
		}
	}
	if bits := &v.entry.Subclusters; *bits&format.AllData != 0 {
		return r.loseEntry(v, v.problem)
	}
	v.hadData = false
	return v
}

func (r *repairer) judgeCompressed(e format.MappingEntry) verdict {
	v := verdict{entry: e, problem: r.h.CheckEntry(e), hadData: true}
	v.entry.Subclusters = 0
	if e.Copied() {
		v.entry.L2Entry = e.WithCopied(false)
		v.problem = "COPIED in a compressed cluster"
	}
	off, n := e.CompressedRange(r.h.Geometry)
	v.first = uint64(r.h.ClusterOf(off))
	v.n = uint64(r.h.ClusterOf(off+format.HostOffset(n-1))) - v.first + 1
	if uint64(off) >= r.size {
		return r.loseEntry(v, fmt.Sprintf("%d compressed bytes at %#x are outside the file of %d bytes", n, uint64(off), r.size))
	}
	if v.first+v.n > r.end { // the range may be longer than the data in it
		v.problem = fmt.Sprintf("%d compressed bytes at %#x exceed the file of %d bytes", n, uint64(off), r.size)
		v.n = r.end - v.first
		v.entry.L2Entry = format.NewCompressedEntry(r.h.Geometry, off, uint64(r.h.OffsetOf(format.Cluster(r.end))-off))
	}
	for cl := v.first; cl < v.first+v.n; cl++ {
		if r.isFixed(cl) {
			return r.loseEntry(v, fmt.Sprintf("%d compressed bytes at %#x are where a header is", n, uint64(off)))
		}
	}
	return v
}

// loseEntry gives the entry up: where it had data it reads as zeroes, in version 2, which has no such entries, as what is behind.
func (r *repairer) loseEntry(v verdict, problem string) verdict {
	v.lost, v.problem = true, problem
	switch bits := v.entry.Subclusters; {
	case v.entry.Kind() == format.Compressed && r.h.ExtendedL2:
		v.entry = format.MappingEntry{Subclusters: format.AllZero}
	case r.h.ExtendedL2:
		v.entry = format.MappingEntry{Subclusters: bits&format.AllData<<32 | bits&format.AllZero}
	case r.h.Version == 2:
		v.entry = format.MappingEntry{}
	default:
		v.entry = format.MappingEntry{L2Entry: format.ZeroPlain}
	}
	return v
}

// judgeDataFile judges an entry of an image with a data file. There a cluster has the offset that it has for the guest
// (specification, "Incompatible features", bit 2), so that nothing is ever lost.
func (r *repairer) judgeDataFile(e format.MappingEntry, guest format.GuestOffset) verdict {
	own := r.dataFileEntry(guest)
	if e.Kind() == format.Compressed {
		return verdict{entry: own, problem: r.h.CheckEntry(e), flagged: true, misplaced: true}
	}
	v := verdict{entry: r.withoutReserved(e), problem: r.h.CheckEntry(e)}
	bits := &v.entry.Subclusters
	if r.h.ExtendedL2 {
		*bits &^= format.Subclusters(bits.Invalid())
	}
	if !r.h.HasHost(v.entry) && *bits&format.AllData == 0 {
		if r.h.MayBeCopied(v.entry, guest) {
			return v
		}
		return r.withoutHost(v)
	}
	v.flagged = true
	if off := v.entry.Offset(); off != own.Offset() {
		v.misplaced = true
		v.problem = fmt.Sprintf("%#x in the data file, not %#x", uint64(off), uint64(guest))
	}
	copied := v.entry.Copied()
	v.entry.L2Entry = own.L2Entry | v.entry.L2Entry&format.ZeroPlain
	if !r.h.HasHost(v.entry) { // a zero cluster at offset 0 cannot be told from one without a place
		v.flagged, copied = false, false
	}
	v.entry.L2Entry = v.entry.WithCopied(copied)
	return v
}

// dataFileEntry returns the entry of a guest cluster in the data file.
func (r *repairer) dataFileEntry(guest format.GuestOffset) format.MappingEntry {
	e := format.MappingEntry{L2Entry: format.NewL2Entry(format.HostOffset(guest), true)}
	if r.h.ExtendedL2 {
		e.Subclusters = format.AllData
	}
	return e
}

// rawFile reports whether the data file is a raw image, so that a lost L2 table is known.
func (r *repairer) rawFile() bool {
	return r.h.DataFile && r.h.Autoclear&format.AutoclearRawDataFile != 0
}

// guestOffset returns the guest offset of entry i of an L2 table.
func (r *repairer) guestOffset(slot uint32, i uint64) format.GuestOffset {
	return format.GuestOffset((uint64(slot)<<r.h.L2Bits() + i) << r.h.ClusterBits)
}
