package qcow

import (
	"context"
	"errors"
	"fmt"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// maxMove is how many bytes of guest data move between two syncs, if a cluster is not larger: so long a request for one of them
// may have to wait.
const maxMove = 4 << 20

// Compacted says what Compact did.
type Compacted struct {
	Moved         int64 // bytes
	Before, After int64 // length of the file in bytes
}

// Compact moves clusters from the end of the file to free places before it, and cuts the file off behind the last one that
// is left, while requests go on: one for clusters that are just being moved waits for some milliseconds, and all that change the
// image wait while tables are exchanged at the end. A crash leaves every cluster in its old place or its new one. Compressed
// clusters, bitmaps and the encryption header stay where they are. progress, unless nil, is told how many bytes of how many are done.
//
// ErrBusy: a reader of what was spliced has not read it (WatchSplices). When ctx is done Compact returns its error; what has been moved stays where it is then, and the file is as short as that allows.
func (img *Image) Compact(ctx context.Context, progress func(done, total int64)) (Compacted, error) {
	end, err := img.maintain(ctx)
	if err != nil {
		return Compacted{}, err
	}
	defer end()
	resume, err := img.stopSplices(ctx)
	if err != nil {
		return Compacted{}, err
	}
	defer resume()
	if progress == nil {
		progress = func(int64, int64) {}
	}
	img.alloc.keepNothing()
	var sum Compacted
	for pass := 0; ; pass++ {
		if err := img.settleReserve(); err != nil {
			return sum, err
		}
		before := img.alloc.end.Load()
		c := &compaction{img: img, ctx: ctx, progress: progress, end: format.Cluster(before)}
		if pass > 0 { // a few clusters that had no place before
			c.progress = func(int64, int64) {}
		}
		err := c.run()
		trimErr := img.settleReserve()
		after := img.alloc.end.Load()
		if pass == 0 {
			sum.Before = int64(before << img.geometry.ClusterBits)
		}
		sum.After = int64(after << img.geometry.ClusterBits)
		sum.Moved += c.moved
		// Tables that were exchanged may have found no place before the limit; the next pass has it. So may a refcount block that the reserve
		// needed behind the end of the file.
		if err := errors.Join(err, trimErr); err != nil || after == before || after < before && c.moved == 0 || pass == 2 {
			return sum, err
		}
	}
}

// settleReserve gives unlinked clusters and the reserve back and cuts off what is free at the end of the file.
func (img *Image) settleReserve() error {
	reclaimErr, err := img.flush()
	if err := errors.Join(reclaimErr, err); err != nil {
		return err
	}
	return img.alloc.trim()
}

// compaction is one pass of Compact.
type compaction struct {
	img      *Image
	ctx      context.Context
	progress func(done, total int64)
	end      format.Cluster // where the file ends
	limit    format.Cluster // there are as many clusters before it as are in use: what lies behind is to move
	total    int64          // bytes in use behind limit when the pass began
	moved    int64          // bytes
	full     bool           // nothing is free before limit any more
}

func (c *compaction) run() error {
	a := &c.img.alloc
	a.mu.Lock()
	used, err := a.counts.usedClusters(0, a.end.Load())
	if err == nil {
		var behind uint64
		c.limit = format.Cluster(used)
		behind, err = a.counts.usedClusters(used, a.end.Load())
		c.total = int64(behind << c.img.geometry.ClusterBits)
	}
	a.mu.Unlock()
	if err != nil || c.total == 0 {
		return err
	}
	c.progress(0, c.total)
	for i := uint64(0); i < uint64(len(c.img.l1))/format.EntrySize; i++ {
		if err := c.moveUnder(i); err != nil {
			return err
		}
	}
	// What moved is released, so that the rest finds the free places that are left.
	if _, err := c.img.flush(); err != nil {
		return err
	}
	return c.moveShared()
}

// done counts clusters that have moved.
func (c *compaction) done(n uint64) {
	c.moved += int64(n << c.img.geometry.ClusterBits)
	c.progress(min(c.moved, c.total), c.total)
}

// moveUnder moves the guest clusters under L1 entry i, and the L2 table.
func (c *compaction) moveUnder(i uint64) error {
	g := c.img.geometry
	if c.img.l1Entry(i).Offset() == 0 {
		return c.ctx.Err()
	}
	size := uint64(c.img.Size())
	for off, end := i*g.L2Span(), min((i+1)*g.L2Span(), size); off < end && !c.full; {
		if err := c.ctx.Err(); err != nil {
			return err
		}
		next, err := c.moveWindow(format.GuestOffset(off), end)
		if err != nil {
			return err
		}
		off = next
	}
	return c.moveTable(i)
}

// moveWindow moves the first guest clusters at or behind off that have to move, and returns up to where none is left.
func (c *compaction) moveWindow(off format.GuestOffset, end uint64) (next uint64, err error) {
	start, stop, err := c.window(off, end)
	if err != nil || start == stop {
		return stop, err
	}
	img := c.img
	g := img.geometry
	// From now on whoever writes to the window claims it; and whoever does not yet has finished after the wait.
	img.moving.add(start, stop)
	defer img.moving.remove(start, stop)
	img.epochs.wait()
	claim := img.claims.acquire(start>>g.ClusterBits, (stop+g.ClusterSize()-1)>>g.ClusterBits)
	defer img.claims.release(claim)
	moves, err := c.copyWindow(start, stop)
	if err == nil && len(moves) > 0 {
		err = img.syncData()
	}
	for len(moves) > 0 && err == nil {
		if err = c.relink(&moves[0]); err == nil {
			moves = moves[1:]
		}
	}
	for _, m := range moves {
		img.alloc.giveBack(m.to)
	}
	return stop, err
}

// window finds guest clusters that have to move, from off on and before end: a range within one slice, with at most maxMove bytes
// to be moved in it.
func (c *compaction) window(off format.GuestOffset, end uint64) (start, stop uint64, err error) {
	g := c.img.geometry
	pos, behind := uint64(off), uint64(0)
	end = min(end, pos+c.img.sliceSpan(off))
	start = end
	for pos < end && behind < maxMove {
		m, err := c.img.lookup(format.GuestOffset(pos), end-pos)
		if err != nil {
			return 0, 0, err
		}
		n := m.length
		if g.ExtendedL2 {
			n = min(end-pos, g.ClusterSize()) // all subclusters of one entry
		}
		if c.toMove(&m, n) {
			start = min(start, pos)
			n = min(n, max(maxMove-behind, g.ClusterSize())&^(g.ClusterSize()-1))
			behind += n
		}
		pos += n
	}
	return min(start, pos), pos, nil
}

// toMove reports whether the first n bytes of m have clusters of their own behind the limit.
func (c *compaction) toMove(m *mapping, n uint64) bool {
	x := c.img.hostRun(m, c.img.geometry.ClustersFor(n))
	if m.kind == format.Compressed || x.n == 0 || x.end() <= c.limit {
		return false
	}
	owned, err := c.img.ownedRun(&mapping{host: m.host, length: 1, copied: m.copied})
	return err == nil && owned > 0
}

// A move is guest clusters on their way.
type move struct {
	off   format.GuestOffset
	from  run
	to    run
	table format.HostOffset
}

// copyWindow copies the clusters of a claimed window that have to move, as far as there are free ones before the limit.
func (c *compaction) copyWindow(start, stop uint64) (moves []move, err error) {
	img := c.img
	g := img.geometry
	for pos := start; pos < stop; {
		m, err := img.lookup(format.GuestOffset(pos), stop-pos)
		if err != nil {
			return moves, err
		}
		n := m.length
		if g.ExtendedL2 {
			n = min(stop-pos, g.ClusterSize())
		}
		if !c.toMove(&m, n) {
			pos += n
			continue
		}
		from := img.hostRun(&m, g.ClustersFor(n))
		to, err := img.alloc.takeBelow(from.n, min(c.limit, from.first))
		if err != nil || to.n == 0 {
			c.full = c.full || err == nil
			return moves, err
		}
		moves = append(moves, move{format.GuestOffset(pos), run{from.first, to.n}, to, m.table})
		if err := c.copy(format.GuestOffset(pos), &m, to); err != nil {
			return moves, err
		}
		pos = min(stop, pos+to.n<<g.ClusterBits)
	}
	return moves, nil
}

// copy copies the data of clusters that begin with those of m. Encrypted data is encrypted anew, for its new place.
func (c *compaction) copy(off format.GuestOffset, m *mapping, to run) error {
	img := c.img
	g := img.geometry
	if m.kind != format.Data && !g.ExtendedL2 {
		return nil // what allocated zeroes hold does not matter
	}
	if err := img.mustBeData(g.OffsetOf(to.first), to.n<<g.ClusterBits); err != nil {
		return err
	}
	b := buffers.get(int(max(min(to.n<<g.ClusterBits, maxCopy), g.ClusterSize())))
	defer buffers.put(b)
	for done, n := uint64(0), to.n<<g.ClusterBits; done < n; done += uint64(len(b)) {
		b = b[:min(uint64(len(b)), n-done)]
		at := off + format.GuestOffset(done)
		if err := img.readHost(b, m.host+format.HostOffset(done), at); err != nil {
			return err
		}
		if _, err := img.writeHost(b, g.OffsetOf(to.first)+format.HostOffset(done), at); err != nil {
			return err
		}
	}
	return nil
}

// relink makes the guest clusters of m point to their copies, which are durable, and unlinks the old ones.
func (c *compaction) relink(m *move) error {
	img := c.img
	g := img.geometry
	err := img.setEntries(m.table, m.off, m.to.n, func(i uint64, old format.MappingEntry) format.MappingEntry {
		old.L2Entry = old.WithOffset(g.OffsetOf(m.to.first + format.Cluster(i))).WithCopied(true)
		return old
	})
	if err != nil {
		return err
	}
	img.quarantine.add(m.from)
	c.done(m.to.n)
	return nil
}

// moveTable moves the L2 table of L1 entry i, if it is the active L1 table's own.
func (c *compaction) moveTable(i uint64) error {
	img := c.img
	g := img.geometry
	old := img.l1Entry(i)
	from := run{g.ClusterOf(old.Offset()), 1}
	if c.full || from.first < c.limit || !old.Copied() {
		return nil
	}
	claim := img.claims.acquire(i<<g.L2Bits(), (i+1)<<g.L2Bits())
	defer img.claims.release(claim)
	img.newTable.Lock()
	defer img.newTable.Unlock()
	to, err := img.alloc.takeBelow(1, c.limit)
	if err != nil || to.n == 0 {
		c.full = c.full || err == nil
		return err
	}
	b := make([]byte, g.ClusterSize())
	if err = img.settleLinks(); err == nil {
		err = readFull(img.file, b, old.Offset())
	}
	if err == nil {
		_, err = img.file.WriteAt(b, int64(g.OffsetOf(to.first)))
	}
	if err == nil {
		err = img.sync()
	}
	if err != nil {
		img.alloc.giveBack(to)
		return fmt.Errorf("move the L2 table at %#x: %w", uint64(old.Offset()), err)
	}
	if err := img.linkL2Table(i, to); err != nil {
		return err
	}
	img.metadata.remove(from)
	img.quarantine.add(from)
	c.done(1)
	return nil
}
