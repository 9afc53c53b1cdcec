package repair

import (
	"bytes"
	"context"
	"fmt"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// readRefcountTable decodes the refcount table into r.blocks.
func (r *repairer) readRefcountTable(ctx context.Context) error {
	start, n := r.h.RefcountTableOffset, r.h.RefcountTableBytes()
	if r.badRefcounts != "" {
		return nil
	}
	if uint64(start) >= r.size || n > r.size-uint64(start) {
		r.badRefcounts = fmt.Sprintf("the refcount table, %d bytes at %#x, is not in the file of %d bytes", n, uint64(start), r.size)
		n = r.size - min(uint64(start), r.size)
	}
	r.blocks = make([]format.HostOffset, 0, 64)
	return r.stream(ctx, RefcountTable, start, n&^(format.EntrySize-1), func(at format.HostOffset, b []byte) error {
		for i := range uint64(len(b)) / format.EntrySize {
			e := format.RefcountTableEntry(format.Entry(b, i))
			if e == 0 {
				continue
			}
			index := uint64(at-start)/format.EntrySize + i
			off := e.Offset()
			switch {
			case e.Reserved() != 0:
				r.badBlock("entry %d of the refcount table is %#x", index, uint64(e))
			case !r.h.Aligned(off):
				r.badBlock("refcount block %d at %#x is not at the start of a cluster", index, uint64(off))
				continue
			case uint64(off) >= r.size:
				r.badBlock("refcount block %d at %#x is outside the file of %d bytes", index, uint64(off), r.size)
			}
			for uint64(len(r.blocks)) <= index {
				r.blocks = append(r.blocks, 0)
			}
			r.blocks[index] = off
		}
		return nil
	})
}

func (r *repairer) badBlock(why string, args ...any) {
	if r.badRefcounts == "" {
		r.badRefcounts = fmt.Sprintf(why, args...)
	}
}

// claimRefcounts claims the refcount table and its blocks. They are used once more, to see what was wrong.
func (r *repairer) claimRefcounts(ctx context.Context) error {
	if r.blocks == nil {
		return nil
	}
	faults := r.faults
	g := region{off: r.h.RefcountTableOffset, bytes: r.h.RefcountTableBytes()}
	if err := r.claim(ctx, refcounts, &g); err != nil {
		return err
	}
	for i, off := range r.blocks {
		if off == 0 {
			continue
		}
		cl := uint64(r.h.ClusterOf(off))
		g := region{off: off, bytes: r.h.ClusterSize()}
		if err := r.claim(ctx, refcounts, &g); err != nil {
			return err
		}
		switch {
		case cl >= r.end: // nothing can be read there
			r.blocks[i] = 0
		case g.owned == 0:
			r.badBlock("refcount block %d at %#x lies where another structure lies", i, uint64(off))
			// A hostile table can name one block many times. Where it describes clusters of the file it is still
			// compared with them, which the length of the file bounds.
			if uint64(i)<<r.h.BlockBits() >= r.end {
				r.blocks[i] = 0
			}
		}
	}
	if r.faults > faults {
		r.badBlock("the refcount table at %#x lies where another structure lies", uint64(r.h.RefcountTableOffset))
	}
	r.faults = faults
	return ctx.Err()
}

// displaceRefcounts notes that a cluster of the refcount table or its blocks belongs to another structure.
func (r *repairer) displaceRefcounts(cl uint64, u use) {
	what := map[use]string{table: "a table", l2: "an L2 table", bitmap: "a bitmap", data: "guest data"}[u]
	r.badBlock("%s lies where the refcounts lie, at %#x", what, uint64(r.h.OffsetOf(format.Cluster(cl))))
}

// readStored reads the refcounts of the clusters from cl on, which must not span blocks, into p.
func (r *repairer) readStored(p []byte, cl uint64) error {
	block := cl >> r.h.BlockBits()
	if block >= uint64(len(r.blocks)) || r.blocks[block] == 0 {
		return nil
	}
	inBlock := (cl & (r.h.BlockEntries() - 1)) << r.h.RefcountOrder / 8
	return r.read(RefcountBlock, p, r.blocks[block]+format.HostOffset(inBlock))
}

// survey is how the refcounts compare with the references.
type survey struct {
	leaks   int // refcounts that exceed the references
	low     int // refcounts below the references
	missing int // those of them that are 0
}

// judge compares the refcounts with the references, and refuses what the mode does not repair.
func (r *repairer) judge(ctx context.Context) error {
	err := r.eachCluster(ctx, func(_, stored uint64, w word) error {
		switch n := w.count(); {
		case stored > n:
			r.survey.leaks++
		case stored == 0 && n > 0:
			r.survey.missing++
			r.survey.low++
		case stored < n:
			r.survey.low++
		}
		return nil
	})
	if err != nil || r.o.Mode == All {
		return err
	}
	switch {
	case r.badRefcounts != "":
		return format.Corruptf("refcount table", r.h.RefcountTableOffset, "%s: this takes a repair of all errors, not of leaks only", r.badRefcounts)
	case r.survey.missing > 0:
		return format.Corruptf("refcount table", r.h.RefcountTableOffset, "%d clusters in use have refcount 0: this takes a repair of all errors, not of leaks only", r.survey.missing)
	}
	return nil
}

// eachCluster calls f for every cluster with a refcount, a reference, or a neighbour that has one.
func (r *repairer) eachCluster(ctx context.Context, f func(cl, stored uint64, w word) error) error {
	if err := r.eachKnown(ctx, f); err != nil {
		return err
	}
	return r.eachUnknown(ctx, f)
}

// eachKnown calls f for every cluster of the pages.
func (r *repairer) eachKnown(ctx context.Context, f func(cl, stored uint64, w word) error) error {
	m := &r.clusters
	for _, num := range m.numbers() {
		p := m.pages[num]
		for i, w := range p.words {
			if err := f(num<<m.pageBits+uint64(i), format.Refcount(p.stored, m.RefcountOrder, uint64(i)), w); err != nil {
				return err
			}
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	}
	return nil
}

// eachUnknown calls f for the clusters outside the pages that have a refcount, and for some that have none.
func (r *repairer) eachUnknown(ctx context.Context, f func(cl, stored uint64, w word) error) error {
	m := &r.clusters
	perBlock := m.BlockEntries() >> m.pageBits
	for block, off := range r.blocks {
		if off == 0 {
			continue
		}
		err := r.stream(ctx, RefcountBlock, off, m.ClusterSize(), func(at format.HostOffset, b []byte) error {
			num := uint64(block)*perBlock + uint64(at-off)/m.storedBytes()
			for ; len(b) > 0; num, b = num+1, b[m.storedBytes():] {
				stored := b[:m.storedBytes()]
				if m.pages[num] != nil || allZero(stored) {
					continue
				}
				for i := range m.perPage() {
					if err := f(num<<m.pageBits+i, format.Refcount(stored, m.RefcountOrder, i), 0); err != nil {
						return err
					}
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// allZero reports whether b has no byte but zeroes.
func allZero(b []byte) bool {
	for len(b) > len(zeroes) {
		if !bytes.Equal(b[:len(zeroes)], zeroes[:]) {
			return false
		}
		b = b[len(zeroes):]
	}
	return bytes.Equal(b, zeroes[:len(b)])
}

var zeroes [4096]byte
