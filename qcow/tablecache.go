package qcow

import (
	"fmt"
	"io"
	"sync"
	"sync/atomic"

	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// maxSlice is the largest unit of table that is cached: a read of one entry of a 2 MiB table should not cost 2 MiB.
const maxSlice = 4096

// tableCache keeps slices of L2 tables and refcount blocks in memory. Nobody sees anything in one that is not in the file: it is
// locked from before it changes until the change is in the file as well, or undone. So an eviction loses nothing, and
// what was acknowledged survives a kill. Entries that are held back (heldLinks) are the exception: their slices stay pinned.
type tableCache struct {
	file        storage.File
	write       func(off format.HostOffset, old, b []byte) error // Image.overwrite
	sliceSize   uint64
	capacity    int // slices
	clusterBits uint32
	share       *share

	mu     sync.RWMutex
	slices map[format.HostOffset]*tableSlice
	clock  []*tableSlice // every cached slice; the hand sweeps over it to find one that was not used of late
	hand   int
}

// tableSlice is a piece of a table. While pins is not 0 it stays in the cache, so there is never a second copy of it.
type tableSlice struct {
	off   format.HostOffset
	place int // in tableCache.clock
	pins  atomic.Int32
	used  atomic.Bool
	idle  uint8         // sweeps since it was used; tableCache.mu guards it
	ready chan struct{} // closed when b or err is set
	err   error

	mu sync.RWMutex // guards b
	b  []byte
}

func newTableCache(img *Image, bytes int64, budget *CacheBudget) *tableCache {
	size := min(img.geometry.ClusterSize(), maxSlice)
	c := &tableCache{
		file:        img.file,
		write:       img.overwrite,
		sliceSize:   size,
		clusterBits: img.geometry.ClusterBits,
		capacity:    int(max(bytes/int64(size), minSlices)),
		slices:      make(map[format.HostOffset]*tableSlice),
	}
	c.share = budget.join(c)
	return c
}

// sliceStart returns where the slice begins that holds off.
func (c *tableCache) sliceStart(off format.HostOffset) format.HostOffset {
	return off &^ format.HostOffset(c.sliceSize-1)
}

// pin returns the slice that holds off, reading it if need be. The caller unpins it.
func (c *tableCache) pin(off format.HostOffset) (*tableSlice, error) {
	start := c.sliceStart(off)
	c.mu.RLock()
	s := c.slices[start]
	if s != nil {
		s.pins.Add(1)
	}
	c.mu.RUnlock()
	if s == nil {
		var mine bool
		if s, mine = c.insert(start); mine {
			c.load(s)
		}
	}
	<-s.ready
	if s.err != nil {
		s.unpin()
		return nil, s.err
	}
	if !s.used.Load() {
		s.used.Store(true)
	}
	return s, nil
}

func (s *tableSlice) unpin() { s.pins.Add(-1) }

// insert returns the slice at start, pinned. It is new, and the caller's to load, when mine is true.
func (c *tableCache) insert(start format.HostOffset) (s *tableSlice, mine bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if s := c.slices[start]; s != nil {
		s.pins.Add(1)
		return s, false
	}
	s = &tableSlice{off: start, ready: make(chan struct{})}
	s.pins.Store(1)
	c.slices[start] = s
	room := len(c.clock) < c.capacity && c.share.take(int64(c.sliceSize), len(c.clock) < minSlices)
	if room || !c.replace(s) {
		if !room { // every slice is pinned
			c.share.take(int64(c.sliceSize), true)
		}
		s.place = len(c.clock)
		c.clock = append(c.clock, s)
	}
	return s, true
}

// replace puts s in the place of a slice that is not pinned and was not used since the hand last passed it. With every slice
// pinned it returns false.
func (c *tableCache) replace(s *tableSlice) bool {
	for range 2 * len(c.clock) {
		c.hand = (c.hand + 1) % len(c.clock)
		old := c.clock[c.hand]
		if old.pins.Load() != 0 || old.used.Swap(false) {
			continue
		}
		delete(c.slices, old.off)
		s.place = c.hand
		c.clock[c.hand] = s
		return true
	}
	return false
}

func (c *tableCache) load(s *tableSlice) {
	b := make([]byte, c.sliceSize)
	if err := readFull(c.file, b, s.off); err != nil {
		s.err = fmt.Errorf("read table at %#x: %w", uint64(s.off), err)
		c.forget(s)
	} else {
		s.b = b
	}
	close(s.ready)
}

// forget removes a slice that could not be loaded, so that the next pin tries again.
func (c *tableCache) forget(s *tableSlice) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.slices[s.off] == s {
		c.remove(s.off)
	}
}

// drop forgets the slices of clusters that hold no table any more. Nobody has them pinned.
func (c *tableCache) drop(x run) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.slices) == 0 {
		return
	}
	start, end := uint64(x.first)<<c.clusterBits, uint64(x.end())<<c.clusterBits
	if (end-start)/c.sliceSize <= uint64(len(c.slices)) {
		for off := start; off < end; off += c.sliceSize {
			c.remove(format.HostOffset(off))
		}
		return
	}
	for off := range c.slices {
		if uint64(off) >= start && uint64(off) < end {
			c.remove(off)
		}
	}
}

// remove forgets a slice, if it is here.
func (c *tableCache) remove(off format.HostOffset) {
	s := c.slices[off]
	if s == nil {
		return
	}
	delete(c.slices, off)
	last := len(c.clock) - 1
	c.clock[s.place] = c.clock[last]
	c.clock[s.place].place = s.place
	c.clock[last] = nil
	c.clock = c.clock[:last]
	c.share.giveBack(int64(c.sliceSize))
}

// update changes n bytes at off, which lie in one slice: fn edits them, and they go to the file. When that fails they are as before.
func (c *tableCache) update(off format.HostOffset, n uint64, fn func(b []byte)) error {
	s, err := c.pin(off)
	if err != nil {
		return err
	}
	defer s.unpin()
	s.mu.Lock()
	defer s.mu.Unlock()
	b := s.b[off-s.off:][:n]
	before := undo.Get().(*[]byte)
	defer undo.Put(before)
	*before = append((*before)[:0], b...)
	old := *before
	fn(b)
	if err := c.write(off, old, b); err != nil {
		copy(b, old)
		return err
	}
	return nil
}

// undo holds byte slices for what an update changes.
var undo = sync.Pool{New: func() any { return new([]byte) }}

// readFull reads len(p) bytes that must be there: a table is never cut off by the end of the file.
func readFull(f io.ReaderAt, p []byte, off format.HostOffset) error {
	if len(p) == 0 {
		return nil // an empty table may be anywhere
	}
	n, err := f.ReadAt(p, int64(off))
	if n == len(p) {
		return nil
	}
	if err == io.EOF {
		return format.Corruptf("table", off, "file ends after %d of %d bytes", n, len(p))
	}
	return err
}
