package format

import (
	"bytes"
	"cmp"
	"slices"
)

// HeaderWrite is one write to the first cluster of an image.
type HeaderWrite struct {
	Offset HostOffset
	Data   []byte
}

// Rewrite returns the writes that turn the first cluster of an image, whose content is old, into one that holds h.
// They are to be made in order, with a sync after each; there may be none. At every moment, and whatever 512-byte sectors
// of a write a crash keeps, the cluster decodes to the old header or to h, except that extensions that are
// not essential (the feature name table and unknown ones) may be missing in between. Essential are the fixed fields, the
// backing file name and its format, the bitmaps, the encryption header and the data file name.
//
// In the end the cluster holds h, without the feature name table if there is no room for it. Rewrite fails with ErrInvalid
// where the cluster has no room to switch in this way, or where h could not be decoded again; with ErrCorrupt or
// ErrUnsupported where old is not a header.
func (h *Header) Rewrite(old []byte) ([]HeaderWrite, error) {
	was, err := DecodeHeader(old)
	if err != nil {
		return nil, err
	}
	if was.ClusterBits != h.ClusterBits {
		return nil, Invalidf("the clusters of an image of %d bytes cannot become %d bytes", was.ClusterSize(), h.ClusterSize())
	}
	fixed, err := h.encodeFixed()
	if err != nil {
		return nil, err
	}

	if _, err := DecodeHeader(arrange(fixed, essentials(h.Extensions), h.BackingFile, 0).bytes); err != nil {
		return nil, Invalidf("the new header would be refused: %v", err)
	}

	// What is written in one sector happens at once or not at all, so all that has to be planned is the tail behind the first
	// sector: nothing there may change that the first sector still refers to. Where the new tail needs such a place,
	// the first sector first lets go of it: lean is the old header without what is not essential, thin is
	// the new one so, with its name in its final place.
	from := was.layoutOf(old)
	lean := arrange(from.bytes[:was.HeaderLength], essentials(was.Extensions), was.BackingFile, from.name)
	sorted := essentialFirst(h.Extensions)
	for i, exts := range [][]Extension{h.Extensions, sorted, withoutFeatureNames(sorted), h.Extensions} {
		var best []HeaderWrite
		for _, at := range h.namePlaces(was, from, arrange(fixed, exts, "", 0).extEnd) {
			final := arrange(fixed, exts, h.BackingFile, at)
			thin := arrange(fixed, essentials(exts), h.BackingFile, final.name)
			for _, steps := range [][]layout{{final}, {lean, final}, {thin, final}, {lean, thin, final}} {
				writes, ok := plan(h.ClusterSize(), from, steps)
				if ok && (best == nil || len(writes) < len(best)) {
					best = writes
				}
			}
		}
		// The order in which h has them is the one in the file, kept unless more than the backing name changes.
		if best != nil && (i > 0 || len(best) <= 2) {
			return best, nil
		}
	}
	return nil, Invalidf("the first cluster of %d bytes has no room to change the header safely", h.ClusterSize())
}

// namePlaces returns the offsets, at or behind start, where the backing file name may go.
func (h *Header) namePlaces(was *Header, from layout, start uint64) []uint64 {
	if h.BackingFile == "" {
		return []uint64{0}
	}
	places := []uint64{start, max(start, from.nameEnd), max(start, from.extEnd), max(start, from.extEnd, from.nameEnd)}
	if h.BackingFile == was.BackingFile && from.name >= start {
		places = append([]uint64{from.name}, places...)
	}
	return places
}

// layoutOf returns the layout of the cluster that h was decoded from, whose bytes are at least a sector.
func (h *Header) layoutOf(cluster []byte) layout {
	end := uint64(min(len(cluster), int(h.ClusterSize())))
	l := layout{extEnd: uint64(h.HeaderLength) + extensionHeader}
	if h.BackingFile != "" {
		off, n := backingName(cluster)
		l.name, l.nameEnd = off, off+n
		end = off
	}
	for _, e := range h.Extensions {
		l.extEnd += e.encodedSize()
	}
	l.extEnd = min(l.extEnd, end) // where the area is full, there is no end marker
	l.bytes = make([]byte, max(l.extEnd, l.nameEnd, SectorSize))
	copy(l.bytes, cluster)
	return l
}

// plan returns the writes that lead the cluster from one layout through the steps. It reports false when a step does not
// fit into size bytes, or would change bytes behind the first sector that the step before it uses.
func plan(size uint64, from layout, steps []layout) ([]HeaderWrite, bool) {
	writes := []HeaderWrite{}
	cluster := from.bytes
	for _, to := range steps {
		if uint64(len(to.bytes)) > size {
			return nil, false
		}
		next := make([]byte, max(len(cluster), len(to.bytes)))
		copy(next, cluster)
		clear(next[:SectorSize])
		copy(next[:SectorSize], to.bytes)
		first, last := len(next), 0 // of the bytes to write behind the first sector
		for i := SectorSize; i < len(to.bytes); i++ {
			switch {
			case !to.uses(uint64(i)):
			case !from.uses(uint64(i)): // whatever is there now
				next[i] = to.bytes[i]
				first, last = min(first, i), i
			case next[i] != to.bytes[i]:
				return nil, false
			}
		}
		if first <= last {
			writes = append(writes, HeaderWrite{HostOffset(first), next[first : last+1]})
		}
		if !bytes.Equal(next[:SectorSize], cluster[:SectorSize]) {
			writes = append(writes, HeaderWrite{0, next[:SectorSize]})
		}
		cluster, from = next, to
	}
	return writes, true
}

// Same reports whether two headers say the same, but for extensions that are not essential (see [Header.Rewrite]).
func (h *Header) Same(o *Header) bool { return h.sameBut(o, 0) }

// SameButSwitch reports whether [Header.EncodeSwitch] covers all in which two headers differ, but for extensions that are not
// essential.
func (h *Header) SameButSwitch(o *Header) bool { return h.sameBut(o, SwitchLength) }

// sameBut compares what two headers say, without the first n bytes at SwitchOffset.
func (h *Header) sameBut(o *Header, n int) bool {
	a, errA := h.essence()
	b, errB := o.essence()
	if errA != nil || errB != nil {
		return false
	}
	clear(a[SwitchOffset:][:n])
	clear(b[SwitchOffset:][:n])
	return bytes.Equal(a, b)
}

// essence returns the header without extensions that are not essential, and the others in the order of their types.
func (h *Header) essence() ([]byte, error) {
	fixed, err := h.encodeFixed()
	if err != nil {
		return nil, err
	}
	exts := essentials(h.Extensions)
	slices.SortStableFunc(exts, func(a, b Extension) int { return cmp.Compare(a.Type, b.Type) })
	return arrange(fixed, exts, h.BackingFile, 0).bytes, nil
}
