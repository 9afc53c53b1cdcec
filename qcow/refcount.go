package qcow

import (
	"fmt"
	"slices"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// run is a sequence of neighbouring host clusters.
type run struct {
	first format.Cluster
	n     uint64
}

func (r run) end() format.Cluster { return r.first + format.Cluster(r.n) }

// appendRun adds r to a list of runs, to its last run where it continues that.
func appendRun(runs []run, r run) []run {
	if last := len(runs) - 1; last >= 0 && runs[last].end() == r.first {
		runs[last].n += r.n
		return runs
	}
	return append(runs, r)
}

// countRuns returns how many clusters runs are.
func countRuns(runs []run) (n uint64) {
	for _, x := range runs {
		n += x.n
	}
	return n
}

// refcounts is the refcount table and its blocks. The allocator's lock guards it.
type refcounts struct {
	img    *Image
	offset format.HostOffset // of the refcount table
	table  []byte            // its content, as on disk
}

// get returns the refcount of a cluster; 0 where no block covers it.
func (r *refcounts) get(c format.Cluster) (uint64, error) {
	block := r.block(c)
	if block == 0 {
		return 0, nil
	}
	g := r.img.geometry
	i := uint64(c) & (g.BlockEntries() - 1)
	perSlice := r.perSlice()
	s, err := r.img.tables.pin(block + format.HostOffset(i/perSlice*r.img.tables.sliceSize))
	if err != nil {
		return 0, err
	}
	defer s.unpin()
	s.mu.RLock()
	defer s.mu.RUnlock()
	return format.Refcount(s.b, g.RefcountOrder, i%perSlice), nil
}

// freeRun returns the first clusters at or behind c whose refcount is 0, at most limit of them. It may return fewer than there are.
// Clusters without a refcount block are free.
func (r *refcounts) freeRun(c format.Cluster, limit uint64) (run, error) {
	g := r.img.geometry
	perSlice := r.perSlice()
	for {
		i := uint64(c) & (g.BlockEntries() - 1)
		block := r.block(c)
		if block == 0 {
			return run{c, min(limit, g.BlockEntries()-i)}, nil
		}
		x, err := r.freeInSlice(block+format.HostOffset(i/perSlice*r.img.tables.sliceSize), c, limit)
		if err != nil || x.n > 0 {
			return x, err
		}
		c += format.Cluster(perSlice - i%perSlice)
	}
}

// freeInSlice is freeRun within the slice at off, which holds the refcount of c; none free: a run of 0.
func (r *refcounts) freeInSlice(off format.HostOffset, c format.Cluster, limit uint64) (run, error) {
	s, err := r.img.tables.pin(off)
	if err != nil {
		return run{}, err
	}
	defer s.unpin()
	s.mu.RLock()
	defer s.mu.RUnlock()
	order, perSlice := r.img.geometry.RefcountOrder, r.perSlice()
	i := uint64(c) % perSlice
	for ; i < perSlice && format.Refcount(s.b, order, i) != 0; i++ {
		c++
	}
	x, perWord := run{first: c}, uint64(64)>>order
	for i < perSlice && x.n < limit {
		n := uint64(1)
		if i%perWord == 0 && x.n+perWord <= limit && format.Entry(s.b, i/perWord) == 0 {
			n = perWord
		} else if format.Refcount(s.b, order, i) != 0 {
			break
		}
		i, x.n = i+n, x.n+n
	}
	return x, nil
}

// usedBefore returns the end of the last cluster before end whose refcount is not 0.
func (r *refcounts) usedBefore(end format.Cluster) (format.Cluster, error) {
	perBlock := format.Cluster(r.img.geometry.BlockEntries())
	end = min(end, format.Cluster(uint64(len(r.table))/format.EntrySize)*perBlock)
	for end > 0 {
		start := (end - 1) / perBlock * perBlock
		if r.block(start) == 0 {
			end = start
			continue
		}
		for ; end > start; end-- {
			if n, err := r.get(end - 1); err != nil || n != 0 {
				return end, err
			}
		}
	}
	return 0, nil
}

// perSlice returns how many refcounts a cached slice holds.
func (r *refcounts) perSlice() uint64 {
	return r.img.tables.sliceSize * 8 >> r.img.geometry.RefcountOrder
}

// usedClusters returns how many clusters from first on and before end have a refcount other than 0.
func (r *refcounts) usedClusters(first, end uint64) (used uint64, err error) {
	perBlock := r.img.geometry.BlockEntries()
	for c := first; c < end; {
		next := min(end, (c/perBlock+1)*perBlock)
		if r.block(format.Cluster(c)) != 0 {
			for ; c < next; c++ {
				count, err := r.get(format.Cluster(c))
				if err != nil {
					return 0, err
				}
				if count != 0 {
					used++
				}
			}
		}
		c = next
	}
	return used, nil
}

// block returns where the refcount block of a cluster is, 0 where there is none.
func (r *refcounts) block(c format.Cluster) format.HostOffset {
	i := uint64(c) >> r.img.geometry.BlockBits()
	if i >= uint64(len(r.table))/format.EntrySize {
		return 0
	}
	return format.RefcountTableEntry(format.Entry(r.table, i)).Offset()
}

// set gives every cluster of x the refcount v. Each of them has a block already. When it fails the first done clusters of x
// have the new refcount, the others the old one.
func (r *refcounts) set(x run, v uint64) (done uint64, err error) {
	g := r.img.geometry
	perSlice := r.perSlice()
	for c := x.first; c < x.end(); {
		i := uint64(c) & (g.BlockEntries() - 1)
		n := min(uint64(x.end()-c), perSlice-i%perSlice)
		// The bytes that hold these refcounts; widths below 8 bits share their first and last one with others.
		first, last := i<<g.RefcountOrder/8, ((i+n)<<g.RefcountOrder+7)/8
		skip := i - first*8>>g.RefcountOrder
		err := r.img.tables.update(r.block(c)+format.HostOffset(first), last-first, func(b []byte) {
			for k := range n {
				format.PutRefcount(b, g.RefcountOrder, skip+k, v)
			}
		})
		if err != nil {
			return uint64(c - x.first), fmt.Errorf("refcount of cluster %d: %w", c, err)
		}
		c += format.Cluster(n)
	}
	return x.n, nil
}

// cover makes sure that a refcount block covers cluster c. It returns the clusters that it used for that, whose refcounts it
// has set; they lie at or behind the start of the range that c's block covers, where no cluster was in use.
func (r *refcounts) cover(c format.Cluster) (used run, err error) {
	if r.block(c) != 0 {
		return run{}, nil
	}
	g := r.img.geometry
	i := uint64(c) >> g.BlockBits()
	start := format.Cluster(i << g.BlockBits())
	if i >= uint64(len(r.table))/format.EntrySize {
		return r.growTable(start)
	}
	// The new block describes itself. It is durable before the table mentions it (rule 5).
	used = run{start, 1}
	if err := r.img.metadata.mustBeFree(used); err != nil {
		return run{}, err
	}
	if err := r.writeBlock(g.OffsetOf(start), run{start, 1}); err != nil {
		return run{}, err
	}
	if err := r.img.sync(); err != nil {
		return run{}, err
	}
	entry := make([]byte, format.EntrySize)
	format.PutEntry(entry, 0, uint64(g.OffsetOf(start)))
	if err := r.img.overwrite(r.offset+format.HostOffset(i*format.EntrySize), make([]byte, format.EntrySize), entry); err != nil {
		return run{}, fmt.Errorf("refcount table entry %d: %w", i, err)
	}
	format.PutEntry(r.table, i, uint64(g.OffsetOf(start)))
	r.img.metadata.add(used)
	return used, nil
}

// writeBlock writes a new refcount block at off, in which the clusters of x, all within its range, have the refcount 1.
func (r *refcounts) writeBlock(off format.HostOffset, x run) error {
	g := r.img.geometry
	b := make([]byte, g.ClusterSize())
	for k := range x.n {
		format.PutRefcount(b, g.RefcountOrder, (uint64(x.first)+k)&(g.BlockEntries()-1), 1)
	}
	if _, err := r.img.file.WriteAt(b, int64(off)); err != nil {
		return fmt.Errorf("write refcount block at %#x: %w", uint64(off), err)
	}
	return nil
}

// growTable makes a larger refcount table at start, the first cluster that the present one can't cover: first the blocks that
// cover the new structures, then the table. All of it is built aside and becomes valid with one write of the header.
func (r *refcounts) growTable(start format.Cluster) (used run, err error) {
	img, g := r.img, r.img.geometry
	oldEntries := uint64(len(r.table)) / format.EntrySize
	firstBlock := uint64(start) >> g.BlockBits()
	// The table must have an entry for each block that covers the new structures, themselves included, and should
	// not have to grow again soon. Both numbers only ever rise, so this ends.
	blocks, tableClusters := uint64(1), uint64(0)
	for {
		spare := min(oldEntries+oldEntries/2, format.MaxRefcountTableBytes/format.EntrySize)
		t := g.ClustersFor(max(firstBlock+blocks, spare) * format.EntrySize)
		b := (blocks + t + g.BlockEntries() - 1) / g.BlockEntries()
		if t == tableClusters && b == blocks {
			break
		}
		tableClusters, blocks = t, max(b, blocks)
	}
	if tableClusters<<g.ClusterBits > max(format.MaxRefcountTableBytes, g.ClusterSize()) {
		return run{}, fmt.Errorf("%w: the refcount table has reached its limit of %d bytes", ErrNoSpace, format.MaxRefcountTableBytes)
	}
	used = run{start, blocks + tableClusters}
	if err := img.metadata.mustBeFree(used); err != nil {
		return run{}, err
	}
	table := make([]byte, tableClusters<<g.ClusterBits)
	copy(table, r.table)
	for k := range blocks {
		covered := run{start + format.Cluster(k<<g.BlockBits()), min(g.BlockEntries(), used.n-k<<g.BlockBits())}
		at := g.OffsetOf(start + format.Cluster(k))
		if err := r.writeBlock(at, covered); err != nil {
			return run{}, err
		}
		format.PutEntry(table, firstBlock+k, uint64(at))
	}
	at := g.OffsetOf(start + format.Cluster(blocks))
	if _, err := img.file.WriteAt(table, int64(at)); err != nil {
		return run{}, fmt.Errorf("write refcount table at %#x: %w", uint64(at), err)
	}
	err = img.changeHeader(func(h *format.Header) {
		h.RefcountTableOffset, h.RefcountTableClusters = at, uint32(tableClusters)
	})
	if err != nil {
		return run{}, err
	}
	old := run{g.ClusterOf(r.offset), oldEntries * format.EntrySize >> g.ClusterBits}
	r.offset = at
	r.table = table
	img.metadata.add(used)
	img.metadata.remove(old)
	img.quarantine.add(old)
	return used, nil
}

// sortRuns sorts runs by their first cluster and joins neighbours.
func sortRuns(runs []run) []run {
	slices.SortFunc(runs, func(a, b run) int {
		if a.first < b.first {
			return -1
		}
		return 1
	})
	var out []run
	for _, r := range runs {
		out = appendRun(out, r)
	}
	return out
}
