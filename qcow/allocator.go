package qcow

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// firstReserve is how many clusters the reserve is filled with for the first time, if it may hold so many. Each later time it is
// twice as many as before, up to the limit.
const firstReserve = 16

// allocator hands out host clusters from a reserve. For a cluster in the reserve three things are durable: its refcount is 1,
// it reads as zeroes, and no table mentions it. So whoever takes one may write to any part of it and then
// link it, with no sync between: whatever a crash keeps of the two, the guest sees zeroes or what it wrote (rules 1 and 3). One
// sync fills the reserve for many allocations; a crash leaks at most what is in it.
type allocator struct {
	img *Image
	end atomic.Uint64 // clusters in the file, the last one perhaps in part

	mu       sync.Mutex
	counts   refcounts
	reserve  []run          // ascending
	stained  []run          // like the reserve, but their content is undefined
	hint     format.Cluster // no cluster below it is free
	nextFill uint64         // clusters to fill the reserve with next time
	maxFill  uint64
	keep     uint64 // the file is not made shorter than so many clusters (see keepTail)
}

// take returns at least one and at most n neighbouring clusters of the reserve.
func (a *allocator) take(n uint64) (run, error) {
	return a.takeBelow(n, format.Cluster(format.MaxHostOffset))
}

// takeBelow is take for clusters before limit. A run of 0 says that the lowest free ones are not.
func (a *allocator) takeBelow(n uint64, limit format.Cluster) (run, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.reserve) == 0 {
		if err := a.fill(n, limit); err != nil {
			return run{}, fmt.Errorf("allocate clusters: %w", err)
		}
	}
	if len(a.reserve) == 0 || a.reserve[0].first >= limit {
		return run{}, nil
	}
	head := &a.reserve[0]
	x := run{head.first, min(n, head.n, uint64(limit-head.first))}
	head.first, head.n = head.first+format.Cluster(x.n), head.n-x.n
	if head.n == 0 {
		a.reserve = a.reserve[1:]
	}
	return x, nil
}

// giveBack returns clusters that were taken, perhaps written, but certainly never linked.
func (a *allocator) giveBack(x run) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.stained = append(a.stained, x)
}

// fill puts at least one cluster, and if possible n and more, into the empty reserve; none where only those from limit on are free.
func (a *allocator) fill(n uint64, limit format.Cluster) error {
	g := a.img.geometry
	want := min(max(n, a.nextFill), a.maxFill)
	if len(a.stained) == 0 {
		if err := a.claimFree(want, limit); err != nil && len(a.stained) == 0 {
			return err
		}
	}
	if err := a.img.poisoned(); err != nil {
		return err
	}
	if len(a.stained) == 0 {
		return nil
	}
	// Everything that was stained, just claimed or not, becomes zero and durable with one sync.
	clean := sortRuns(a.stained)
	for _, x := range clean {
		if err := a.img.file.PunchHole(int64(g.OffsetOf(x.first)), int64(x.n<<g.ClusterBits)); err != nil {
			return err
		}
	}
	if err := a.img.sync(); err != nil {
		return err
	}
	a.stained = nil
	a.reserve = clean
	a.nextFill = min(a.nextFill*2, a.maxFill)
	return nil
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
		if total > 0 && a.counts.block(x.first) == 0 {
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
		a.stained = append(a.stained, run{x.first, done})
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
	a.stained = a.stained[:len(a.stained)-1]
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

// trim frees what is left of the reserve and cuts off the free clusters at the end of the file.
func (a *allocator) trim() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	g := a.img.geometry
	for _, x := range a.stained {
		if err := a.img.file.PunchHole(int64(g.OffsetOf(x.first)), int64(x.n<<g.ClusterBits)); err != nil {
			return err
		}
	}
	for _, x := range sortRuns(append(a.reserve, a.stained...)) {
		if _, err := a.freeLocked(x); err != nil {
			return err
		}
	}
	a.reserve, a.stained = nil, nil
	return a.cut()
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
