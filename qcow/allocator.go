package qcow

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// allocator hands out host clusters from a reserve, and keeps the refcounts.
type allocator struct {
	img *Image
	end atomic.Uint64 // clusters in the file, the last one perhaps in part

	mu      sync.Mutex
	counts  refcounts
	reserve reserve
	hint    format.Cluster // no cluster below it is free
	keep    uint64         // the file is not made shorter than so many clusters (see keepTail)
}

// claimFree raises the refcount of up to want free clusters before limit, at least one if there is one, to 1 and counts them as stained: free
// clusters inside the file first, then new ones behind its end, which it extends. What it had claimed before it failed stays claimed.
func (a *allocator) claimFree(want uint64, limit format.Cluster) error {
	g := a.img.geometry
	for total := uint64(0); total < want; {
		x, err := a.counts.freeRun(a.hint, want-total)
		if err != nil {
			return err
		}
		if a.hint = x.first; x.first >= limit {
			return nil
		}
		x.n = min(x.n, uint64(limit-x.first))
		if uint64(x.end())<<g.ClusterBits > uint64(format.MaxHostOffset) {
			return fmt.Errorf("%w: the image file has reached the limit of its format", ErrNoSpace)
		}
		if total+a.reserve.n > 0 && a.counts.block(x.first) == 0 {
			return nil // a refcount block for nothing but the reserve would keep the file from being cut off
		}
		used, err := a.counts.cover(x.first)
		if err != nil {
			return err
		}
		if used.n > 0 { // x.first may be one of these now
			if err := a.extend(used.end()); err != nil {
				return err
			}
			continue
		}
		if x, err = a.extendSome(x); err != nil {
			return err
		}
		if err := a.claim(x); err != nil {
			return err
		}
		a.hint = x.end()
		total += x.n
	}
	return nil
}

// claim takes possession of free clusters that refcount blocks cover.
func (a *allocator) claim(x run) error {
	if err := a.img.metadata.mustBeFree(x); err != nil {
		return err
	}
	if err := a.extend(x.end()); err != nil {
		return err
	}
	done, err := a.counts.set(x, 1)
	if done > 0 {
		a.reserve.stained = append(a.reserve.stained, run{x.first, done})
	}
	return err
}

// extendSome is extend that is content with less than all of x, where the file can't grow so far.
func (a *allocator) extendSome(x run) (run, error) {
	for {
		err := a.extend(x.end())
		if err == nil || x.n == 1 || !errors.Is(err, ErrNoSpace) {
			return x, err
		}
		x.n /= 2
	}
}

// extend makes the file end not before cluster end.
func (a *allocator) extend(end format.Cluster) error {
	if uint64(end) <= a.end.Load() {
		return nil
	}
	if err := a.img.file.Truncate(int64(a.img.geometry.OffsetOf(end))); err != nil {
		return fmt.Errorf("extend the image file to %d clusters: %w", end, err)
	}
	a.end.Store(uint64(end))
	return nil
}

// contiguous returns n neighbouring clusters for a table: allocated, and this durably, but with undefined content.
func (a *allocator) contiguous(n uint64) (run, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	x := run{format.Cluster(a.end.Load()), n}
	for {
		used, err := a.coverAll(x)
		if err != nil {
			return run{}, err
		}
		if used.n > 0 {
			x.first = max(x.first, used.end())
			continue
		}
		free, err := a.freeLength(x)
		if err != nil {
			return run{}, err
		}
		if free == n {
			break
		}
		x.first += format.Cluster(free) + 1
	}
	if err := a.claim(x); err != nil {
		return run{}, err
	}
	a.reserve.stained = a.reserve.stained[:len(a.reserve.stained)-1]
	return x, a.img.sync()
}

// coverAll makes sure that refcount blocks cover all of x. When it had to make one it returns the clusters used at once.
func (a *allocator) coverAll(x run) (used run, err error) {
	perBlock := format.Cluster(a.img.geometry.BlockEntries())
	for c := x.first; c < x.end(); c += perBlock - c%perBlock {
		used, err := a.counts.cover(c)
		if err != nil {
			return run{}, err
		}
		if used.n > 0 {
			return used, a.extend(used.end())
		}
	}
	return run{}, nil
}

// freeLength returns how many clusters at the start of x are free.
func (a *allocator) freeLength(x run) (uint64, error) {
	for got := uint64(0); got < x.n; {
		c := x.first + format.Cluster(got)
		free, err := a.counts.freeRun(c, x.n-got)
		if err != nil || free.first != c {
			return got, err
		}
		got += free.n
	}
	return x.n, nil
}

// free lowers the refcount of clusters that durably nothing refers to, and that nobody uses, to 0. When it fails the first
// done clusters are free.
func (a *allocator) free(x run) (done uint64, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.freeLocked(x)
}

func (a *allocator) freeLocked(x run) (done uint64, err error) {
	done, err = a.counts.set(x, 0)
	if done > 0 {
		a.hint = min(a.hint, x.first)
	}
	return done, err
}

// soleRun returns how many clusters at the start of x have the refcount 1, and the refcount of the one behind them.
func (a *allocator) soleRun(x run) (n, next uint64, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for n < x.n {
		count, err := a.counts.get(x.first + format.Cluster(n))
		if err != nil || count != 1 {
			return n, count, err
		}
		n++
	}
	return n, 0, nil
}

// raise adds a reference to each cluster of x, which has some.
func (a *allocator) raise(x run) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	for c := x.first; c < x.end(); c++ {
		count, err := a.counts.get(c)
		if err != nil {
			return err
		}
		if _, err := a.counts.set(run{c, 1}, count+1); err != nil {
			return err
		}
	}
	return nil
}

// lower takes one reference from a cluster that has several. It returns false when it has not, or no longer.
func (a *allocator) lower(c format.Cluster) (bool, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	count, err := a.counts.get(c)
	if err != nil || count < 2 {
		return false, err
	}
	_, err = a.counts.set(run{c, 1}, count-1)
	return err == nil, err
}

// refcount returns the refcount of a cluster.
func (a *allocator) refcount(c format.Cluster) (uint64, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.counts.get(c)
}

// keepTail keeps the end of a file that is being opened from being cut off, if its last cluster is free: where the image is damaged that may
// be in use all the same, and its refcount the only thing that is wrong.
func (a *allocator) keepTail() error {
	end := a.end.Load()
	count, err := a.counts.get(format.Cluster(end - 1))
	if count == 0 {
		a.keep = end
	}
	return err
}

func (a *allocator) keepNothing() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.keep = 0
}

// cut cuts off the free clusters at the end of the file, unless tables lie there, which they do where refcounts are wrong.
func (a *allocator) cut() error {
	g := a.img.geometry
	used, err := a.counts.usedBefore(format.Cluster(a.end.Load()))
	if err != nil {
		return err
	}
	end := max(uint64(used), a.keep)
	if end >= a.end.Load() {
		return nil
	}
	if _, found := a.img.metadata.find(run{format.Cluster(end), a.end.Load() - end}); found {
		return nil
	}
	if err := a.img.file.Truncate(int64(end << g.ClusterBits)); err != nil {
		return err
	}
	a.end.Store(end)
	return nil
}
