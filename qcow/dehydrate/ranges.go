package dehydrate

import (
	"cmp"
	"slices"
)

// bytesAt is a place of the file.
type bytesAt struct{ off, n uint64 }

// ranges are places of the file, in any order and overlapping, unless merged.
type ranges []bytesAt

func (r *ranges) add(off, n uint64) {
	if n > 0 {
		*r = append(*r, bytesAt{off, n})
	}
}

// sorted returns the places in the order of their offsets.
func (r ranges) sorted() ranges {
	slices.SortFunc(r, func(a, b bytesAt) int { return cmp.Compare(a.off, b.off) })
	return r
}

// merged returns the bytes that are in any of the places, in ascending order, each once.
func (r ranges) merged() ranges {
	var m ranges
	for _, x := range r.sorted() {
		if last := len(m) - 1; last >= 0 && x.off <= m[last].off+m[last].n {
			m[last].n = max(m[last].n, x.off+x.n-m[last].off)
			continue
		}
		m = append(m, x)
	}
	return m
}
