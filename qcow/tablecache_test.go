package qcow

import (
	"bytes"
	"errors"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

const testSlice = 512

// newTestCache returns a cache of so many slices over f.
func newTestCache(f storage.File, capacity int) *tableCache {
	c := &tableCache{
		file: f,
		write: func(off format.HostOffset, _, b []byte) error {
			_, err := f.WriteAt(b, int64(off))
			return err
		},
		sliceSize: testSlice,
		capacity:  capacity,
		slices:    make(map[format.HostOffset]*tableSlice),
	}
	c.share = NewCacheBudget(1 << 30).join(c)
	return c
}

// expectConsistent expects that nothing is pinned, and that the cache holds every slice once and what the file holds.
func expectConsistent(t *testing.T, c *tableCache) {
	t.Helper()
	if len(c.clock) != len(c.slices) {
		t.Errorf("%d slices on the clock, %d in the map", len(c.clock), len(c.slices))
	}
	for _, s := range c.clock {
		if c.slices[s.off] != s {
			t.Errorf("the slice at %#x is not in the map", uint64(s.off))
		}
		if n := s.pins.Load(); n != 0 {
			t.Errorf("the slice at %#x has %d pins", uint64(s.off), n)
		}
		inFile := make([]byte, testSlice)
		if err := readFull(c.file, inFile, s.off); err != nil || !bytes.Equal(inFile, s.b) {
			t.Errorf("the slice at %#x is not what the file holds (%v)", uint64(s.off), err)
		}
	}
}

// With fewer slices than goroutines everything is evicted all the time, and no update is lost.
func TestTableCacheEviction(t *testing.T) {
	const slices, workers, updates = 16, 6, 300
	f := storage.NewMemoryFrom(make([]byte, slices*testSlice))
	c := newTestCache(f, 2)
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for i := range updates {
				// Everybody counts in the same entry of every slice.
				off := format.HostOffset((w + i) % slices * testSlice)
				err := c.update(off+8, 8, func(b []byte) { format.PutEntry(b, 0, format.Entry(b, 0)+1) })
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	total := uint64(0)
	for s := range uint64(slices) {
		total += format.Entry(f.Bytes()[s*testSlice:], 1)
	}
	if total != workers*updates {
		t.Errorf("%d updates of %d are in the file", total, workers*updates)
	}
	if len(c.clock) > 2+workers {
		t.Errorf("a cache of 2 slices with %d users holds %d", workers, len(c.clock))
	}
	expectConsistent(t, c)
}

// Pinned slices stay; when all are, the cache grows past its capacity rather than fail.
func TestTableCacheWithEverythingPinned(t *testing.T) {
	const slices, capacity = 8, 2
	c := newTestCache(storage.NewMemoryFrom(make([]byte, 2*slices*testSlice)), capacity)
	pin := func(i int) *tableSlice {
		t.Helper()
		s, err := c.pin(format.HostOffset(i*testSlice + 3))
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	var pinned []*tableSlice
	for i := range slices {
		pinned = append(pinned, pin(i))
	}
	for i, s := range pinned {
		if again := pin(i); again != s {
			t.Errorf("slice %d was loaded twice", i)
		}
		s.unpin()
		s.unpin()
	}
	for i := range slices {
		pin(slices + i).unpin()
	}
	if len(c.clock) != slices {
		t.Errorf("the cache holds %d slices after it needed %d", len(c.clock), slices)
	}
	expectConsistent(t, c)
}

// A slice that is in use all the time is not evicted by others that are used once.
func TestTableCacheKeepsWhatIsUsed(t *testing.T) {
	f := &countingFile{File: storage.NewMemoryFrom(make([]byte, 100*testSlice))}
	c := newTestCache(f, 4)
	for i := range 99 {
		for _, off := range []format.HostOffset{0, format.HostOffset((i + 1) * testSlice)} {
			s, err := c.pin(off)
			if err != nil {
				t.Fatal(err)
			}
			s.unpin()
		}
	}
	// The first time that the hand goes round it finds every slice used, and may meet this one first.
	if n := f.reads.Load(); n > 101 {
		t.Errorf("%d reads for 100 slices", n)
	}
}

// countingFile counts reads, and lets them fail while failing is set.
type countingFile struct {
	storage.File

	reads   atomic.Int64
	failing atomic.Bool
}

func (f *countingFile) ReadAt(p []byte, off int64) (int, error) {
	f.reads.Add(1)
	if f.failing.Load() {
		return 0, syscall.EIO
	}
	return f.File.ReadAt(p, off)
}

func TestTableCacheLoadFails(t *testing.T) {
	f := &countingFile{File: storage.NewMemoryFrom(bytes.Repeat([]byte{7}, 2*testSlice))}
	c := newTestCache(f, 4)
	f.failing.Store(true)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if _, err := c.pin(5); !errors.Is(err, syscall.EIO) {
				t.Errorf("pin: %v; want EIO", err)
			}
		})
	}
	wg.Wait()
	if len(c.slices) != 0 || len(c.clock) != 0 {
		t.Errorf("%d slices remain that could not be loaded", len(c.slices))
	}
	f.failing.Store(false)
	s, err := c.pin(5)
	if err != nil {
		t.Fatal(err)
	}
	s.unpin()
	if _, err := c.pin(2 * testSlice); !errors.Is(err, ErrCorrupt) {
		t.Errorf("pin of a table behind the end of the file: %v; want ErrCorrupt", err)
	}
	expectConsistent(t, c)
}

func TestTableCacheUpdateFails(t *testing.T) {
	c := newTestCache(storage.NewMemoryFrom(make([]byte, testSlice)), 4)
	c.write = func(format.HostOffset, []byte, []byte) error { return syscall.EIO }
	if err := c.update(8, 8, func(b []byte) { b[0] = 1 }); !errors.Is(err, syscall.EIO) {
		t.Fatal(err)
	}
	expectConsistent(t, c) // that is, the slice is as it was
}
