package check

import (
	"bytes"
	"context"
	"fmt"
	"slices"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

const (
	maxPageBits = 10 // log2 of the clusters of a page

	// A reference word is the owner of a cluster in the upper four bits and the number of references below.
	ownerShift    = 28
	maxReferences = 1<<ownerShift - 1 // the count stays here once it has come here
)

// page holds what is known of 1<<pageBits consecutive host clusters. A page never spans two refcount blocks.
type page struct {
	stored []byte   // their refcounts, as the refcount block has them
	refs   []uint32 // reference words
}

func (p *page) size() int64 { return int64(cap(p.stored)) + 4*int64(cap(p.refs)) }

// references are the pages of all host clusters that something refers to, by page number.
type references struct {
	pageBits uint32
	pages    map[uint64]*page
	last     *page // the page that was used last, and its number
	lastNum  uint64
	free     []*page // from earlier checks
	memory   int64   // bytes in pages
}

func (r *references) reset(g format.Geometry) {
	r.pageBits = min(maxPageBits, g.BlockBits())
	for _, p := range r.pages {
		r.free = append(r.free, p)
	}
	if r.pages == nil {
		r.pages = make(map[uint64]*page)
	}
	clear(r.pages)
	r.last, r.memory = nil, 0
}

// numbers returns the page numbers in ascending order.
func (r *references) numbers() []uint64 {
	nums := make([]uint64, 0, len(r.pages))
	for n := range r.pages {
		nums = append(nums, n)
	}
	slices.Sort(nums)
	return nums
}

// take returns an empty page for refcounts of the given order.
func (r *references) take(order uint32) *page {
	p := &page{}
	if n := len(r.free); n > 0 {
		p, r.free = r.free[n-1], r.free[:n-1]
	}
	entries := 1 << r.pageBits
	p.refs = slices.Grow(p.refs[:0], entries)[:entries]
	clear(p.refs)
	stored := entries << order / 8
	p.stored = slices.Grow(p.stored[:0], stored)[:stored]
	return p
}

// page returns the page of cluster cl, which must lie inside the file, and the index of cl in it.
func (c *checker) page(cl uint64) (*page, uint64, error) {
	r := &c.refs
	num, i := cl>>r.pageBits, cl&(1<<r.pageBits-1)
	if r.last != nil && num == r.lastNum {
		return r.last, i, nil
	}
	p := r.pages[num]
	if p == nil {
		p = r.take(c.h.RefcountOrder)
		r.pages[num] = p
		if r.memory += p.size(); r.memory+c.tableMemory() > c.opts.MaxMemory {
			return nil, 0, fmt.Errorf("check needs more than %d bytes of memory", c.opts.MaxMemory)
		}
		if err := c.readStored(p.stored, num<<r.pageBits); err != nil {
			return nil, 0, err
		}
	}
	r.last, r.lastNum = p, num
	return p, i, nil
}

// readStored reads the refcounts of the clusters from cl on, which must not span blocks, into p.
func (c *checker) readStored(p []byte, cl uint64) error {
	block := cl >> c.h.BlockBits()
	if block >= uint64(len(c.blocks)) || c.blocks[block] == 0 {
		clear(p)
		return nil
	}
	inBlock := (cl & (c.h.BlockEntries() - 1)) << c.h.RefcountOrder / 8
	return c.read(RefcountBlock, p, c.blocks[block]+format.HostOffset(inBlock))
}

// refer counts n references to cluster cl, which must lie inside the file, by t. It returns the owner from before,
// Nothing for the first reference, and the stored refcount.
func (c *checker) refer(t Table, cl, n uint64) (before Table, stored uint64, err error) {
	p, i, err := c.page(cl)
	if err != nil {
		return Nothing, 0, err
	}
	word := p.refs[i]
	before = Table(word >> ownerShift)
	owner := before
	switch {
	case before == Nothing:
		owner = t
	case before.exclusive() || t.exclusive() || (before == L2Table) != (t == L2Table):
		c.found(Overlap, t, c.h.OffsetOf(format.Cluster(cl)), "the cluster is also used as %v", before)
	}
	count := min(uint64(word&maxReferences)+min(n, maxReferences), maxReferences)
	p.refs[i] = uint32(owner)<<ownerShift | uint32(count)
	return before, format.Refcount(p.stored, c.h.RefcountOrder, i), nil
}

// referTable counts a reference to each cluster of the n bytes of a table at off. The pointer to it is at the offset
// `from` of the structure `in`. It returns how many bytes of the table to read: 0 when it overlaps another structure, less
// than n when it exceeds the file. It stops at the first overlap, so that many pointers to one place cost little.
func (c *checker) referTable(ctx context.Context, t Table, off format.HostOffset, n uint64, in Table, from format.HostOffset) (uint64, error) {
	if !c.h.Aligned(off) {
		c.found(Misaligned, in, from, "%v at %#x", t, uint64(off))
		return 0, nil
	}
	first := uint64(c.h.ClusterOf(off))
	for i := range c.h.ClustersFor(n) {
		if first+i >= c.clusters {
			c.found(OutsideFile, in, from, "%v of %d bytes at %#x, file of %d bytes", t, n, uint64(off), c.size)
			return i << c.h.ClusterBits, nil
		}
		before, _, err := c.refer(t, first+i, 1)
		if err != nil || before != Nothing {
			return 0, err
		}
		if i%contextInterval == contextInterval-1 && ctx.Err() != nil {
			return 0, ctx.Err()
		}
	}
	return n, nil
}

// compare judges the stored refcount of every cluster of the pages, and of all clusters that have no page because
// nothing refers to them.
func (c *checker) compare(ctx context.Context) error {
	entries := uint64(1) << c.refs.pageBits
	for _, num := range c.refs.numbers() {
		p := c.refs.pages[num]
		for i, word := range p.refs {
			c.compareCluster(num<<c.refs.pageBits+uint64(i), format.Refcount(p.stored, c.h.RefcountOrder, uint64(i)), word)
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	}

	pageBytes := entries << c.h.RefcountOrder / 8
	perBlock := c.h.BlockEntries() >> c.refs.pageBits
	for block, off := range c.blocks {
		if off == 0 {
			continue
		}
		err := c.stream(ctx, RefcountBlock, off, c.h.ClusterSize(), func(at format.HostOffset, b []byte) error {
			num := uint64(block)*perBlock + uint64(at-off)/pageBytes
			for ; len(b) > 0; num, b = num+1, b[pageBytes:] {
				stored := b[:pageBytes]
				if c.refs.pages[num] != nil || allZero(stored) {
					continue
				}
				for i := range entries {
					c.compareCluster(num<<c.refs.pageBits+i, format.Refcount(stored, c.h.RefcountOrder, i), 0)
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

// compareCluster compares the stored refcount of cluster cl with its reference word.
func (c *checker) compareCluster(cl, stored uint64, word uint32) {
	owner, count := Table(word>>ownerShift), uint64(word&maxReferences)
	if (stored > 0 || count > 0) && cl < c.clusters {
		c.highest = max(c.highest, cl)
	}
	off := c.h.OffsetOf(format.Cluster(cl))
	switch {
	case stored == count:
	case stored < count:
		c.found(RefcountTooLow, owner, off, "refcount %d, %d references", stored, count)
	case count == maxReferences: // and perhaps more
	case cl >= c.clusters:
		c.found(Leaked, owner, off, "refcount %d past the end of the file", stored)
	default:
		c.found(Leaked, owner, off, "refcount %d, %d references", stored, count)
	}
}

// tableMemory returns the bytes in the lists of tables.
func (c *checker) tableMemory() int64 {
	return int64(cap(c.blocks))*format.EntrySize + int64(cap(c.l2Tables))*l2TableSize
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
