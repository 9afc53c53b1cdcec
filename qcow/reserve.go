package qcow

import (
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

const (
	// firstReserve is how many clusters the reserve of a new user is filled up to, if it may hold so many.
	firstReserve = 16
	// blankReserve is how many clusters are made blank together, if the reserve may hold so many.
	blankReserve = 64
	// calm is how long less than half of the reserve has to last for it to be too large.
	calm = 30 * time.Second
)

// reserve is where the allocator takes clusters from. For a cluster in it three things are durable: its refcount is 1, it reads as
// zeroes, and no table mentions it. So whoever takes one may write to any part of it and then link it, with no sync between:
// whatever a crash keeps of the two, the guest sees zeroes or what it wrote (rules 1 and 3). One sync fills the reserve for many
// allocations; a crash leaks at most what is in it.
//
// A goroutine fills it again when half of it is used, and ends; so nobody waits unless clusters are taken faster than a sync makes new ones.
// Then the reserve becomes twice as large. It gets smaller again while it lasts for long. There is one fill at a time, whose punches and
// whose sync run without the allocator's lock; the clusters it has claimed are in use meanwhile, for everybody who counts.
type reserve struct {
	clean   []run  // ascending
	blank   []run  // like the clean ones, but nothing of it is durable
	stained []run  // like the blank ones, but their content is undefined
	n       uint64 // clean clusters
	target  uint64 // clusters to fill up to; 0 before the first fill
	most    uint64 // target is not made larger

	filling bool
	filled  *sync.Cond // signalled, on the allocator's lock, when a fill has ended
	wanted  bool       // somebody waits, or has to wait, for clean clusters
	futile  bool       // the last fill added nothing: there is none in the background until whoever needs clusters has tried again, and met the error
	since   time.Time  // the last fill, or the last time the target was lowered

	byTakers bool // whoever finds the reserve empty fills it, nobody else: for tests, which want the same order each time
}

func newReserve(lock sync.Locker, most uint64) reserve {
	return reserve{most: most, filled: sync.NewCond(lock)}
}

// take returns at least one and at most n neighbouring clusters of the reserve.
func (a *allocator) take(n uint64) (run, error) {
	return a.takeBelow(n, format.Cluster(format.MaxHostOffset))
}

// takeBelow is take for clusters before limit. A run of 0 says that the lowest free ones are not.
func (a *allocator) takeBelow(n uint64, limit format.Cluster) (run, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	r := &a.reserve
	for r.n == 0 {
		r.wanted = true
		if r.filling {
			r.filled.Wait()
			continue
		}
		if err := a.fill(n, limit); err != nil {
			return run{}, fmt.Errorf("allocate clusters: %w", err)
		}
		if r.n == 0 {
			return run{}, nil
		}
	}
	head := &r.clean[0]
	if head.first >= limit {
		return run{}, nil
	}
	x := run{head.first, min(n, head.n, uint64(limit-head.first))}
	head.first, head.n = head.first+format.Cluster(x.n), head.n-x.n
	if head.n == 0 {
		r.clean = r.clean[1:]
	}
	if r.n -= x.n; r.n < r.target/2 && !r.filling && !r.futile && !r.byTakers {
		r.filling = true
		go a.refill(limit)
	}
	return x, nil
}

// takeSoon is take for a link that can be held back, and then need not wait for a sync: where wantClean is false, or the reserve has none, the
// clusters are blank, and clean is false.
func (a *allocator) takeSoon(n uint64, wantClean bool) (x run, clean bool, err error) {
	a.mu.Lock()
	r := &a.reserve
	if wantClean && r.n == 0 {
		r.wanted = true
		if !r.filling && !r.futile && !r.byTakers {
			r.filling = true
			go a.refill(format.Cluster(format.MaxHostOffset))
		}
	}
	if wantClean && r.n > 0 || len(r.blank) == 0 && !a.addBlank(max(n, min(blankReserve, r.most))) {
		a.mu.Unlock()
		x, err = a.take(n)
		return x, true, err
	}
	defer a.mu.Unlock()
	head := &r.blank[0]
	x = run{head.first, min(n, head.n)}
	head.first, head.n = x.end(), head.n-x.n
	if head.n == 0 {
		r.blank = r.blank[1:]
	}
	return x, false, nil
}

// addBlank claims free clusters and makes them blank, n if there are so many. It releases the allocator's lock meanwhile. It is false where no
// cluster is blank then.
func (a *allocator) addBlank(n uint64) bool {
	r, g := &a.reserve, a.img.geometry
	before := len(r.stained)
	if err := a.claimFree(n, format.Cluster(format.MaxHostOffset)); err != nil && len(r.stained) == before {
		return false // whoever waits for clean clusters meets the error
	}
	claimed := sortRuns(slices.Clone(r.stained[before:]))
	r.stained = r.stained[:before]
	a.mu.Unlock()
	var punched []run
	for len(claimed) > 0 {
		x := claimed[0]
		if a.img.file.PunchHole(int64(g.OffsetOf(x.first)), int64(x.n<<g.ClusterBits)) != nil {
			break
		}
		punched, claimed = append(punched, x), claimed[1:]
	}
	a.mu.Lock()
	r.stained = append(r.stained, claimed...)
	r.blank = sortRuns(append(r.blank, punched...))
	return len(r.blank) > 0
}

// giveBack returns clusters that were taken, perhaps written, but certainly never linked.
func (a *allocator) giveBack(x run) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.reserve.stained = append(a.reserve.stained, x)
}

// refill fills the reserve for those who come later. When it fails they try again.
func (a *allocator) refill(limit format.Cluster) {
	a.mu.Lock()
	defer a.mu.Unlock()
	_ = a.fill(0, limit)
}

// fill puts clusters into the reserve up to its target, and if possible n: those before limit, and what is stained. Into an empty one it puts
// at least one unless it fails, or the lowest free cluster is not before limit. It releases the allocator's lock while it makes them clean.
func (a *allocator) fill(n uint64, limit format.Cluster) error {
	r := &a.reserve
	r.filling = true
	added, err := a.fillUp(n, limit)
	r.filling, r.futile, r.since = false, added == 0, time.Now()
	r.filled.Broadcast()
	return err
}

func (a *allocator) fillUp(n uint64, limit format.Cluster) (added uint64, err error) {
	r := &a.reserve
	if r.wanted || r.target == 0 {
		r.target = min(max(2*r.target, firstReserve), r.most)
	}
	r.wanted = false
	if err := a.img.poisoned(); err != nil {
		return 0, err
	}
	if want, have := min(max(n, r.target), r.most), r.n+countRuns(r.stained); have < want {
		if err := a.claimFree(want-have, limit); err != nil && len(r.stained) == 0 {
			return 0, err
		}
	}
	batch := sortRuns(r.stained)
	if len(batch) == 0 {
		return 0, nil
	}
	r.stained = nil
	a.mu.Unlock()
	err = a.clean(batch)
	a.mu.Lock()
	if err != nil {
		r.stained = append(r.stained, batch...)
		return 0, err
	}
	added = countRuns(batch)
	r.n += added
	r.clean = sortRuns(append(r.clean, batch...))
	return added, nil
}

// clean makes clusters zeroes, and this and their refcounts durable.
func (a *allocator) clean(runs []run) error {
	g := a.img.geometry
	for _, x := range runs {
		if err := a.img.file.PunchHole(int64(g.OffsetOf(x.first)), int64(x.n<<g.ClusterBits)); err != nil {
			return err
		}
	}
	return a.img.sync()
}

// finishFill waits for a fill that is under way.
func (a *allocator) finishFill() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.finishFillLocked()
}

func (a *allocator) finishFillLocked() {
	for a.reserve.filling {
		a.reserve.filled.Wait()
	}
}

// relax makes a reserve smaller of which little was used of late.
func (a *allocator) relax() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	r := &a.reserve
	if r.target <= firstReserve || r.filling || time.Since(r.since) < calm {
		return nil
	}
	r.target, r.since = max(r.target/2, firstReserve), time.Now()
	if r.n <= r.target {
		return nil
	}
	var excess []run
	for r.n > r.target {
		last := &r.clean[len(r.clean)-1]
		n := min(last.n, r.n-r.target)
		last.n -= n
		r.n -= n
		excess = append(excess, run{last.end(), n})
		if last.n == 0 {
			r.clean = r.clean[:len(r.clean)-1]
		}
	}
	return a.dissolve(excess)
}

// trim frees what is left of the reserve and cuts off the free clusters at the end of the file.
func (a *allocator) trim() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.finishFillLocked()
	g, r := a.img.geometry, &a.reserve
	for _, x := range r.stained {
		if err := a.img.file.PunchHole(int64(g.OffsetOf(x.first)), int64(x.n<<g.ClusterBits)); err != nil {
			return err
		}
	}
	runs := slices.Concat(r.clean, r.blank, r.stained)
	r.clean, r.blank, r.stained, r.n = nil, nil, nil, 0
	return a.dissolve(runs)
}

// dissolve frees clusters that were in the reserve, and cuts off the free ones at the end of the file. Those that it fails to free are stained.
func (a *allocator) dissolve(runs []run) error {
	runs = sortRuns(runs)
	for i, x := range runs {
		if done, err := a.freeLocked(x); err != nil {
			runs[i] = run{x.first + format.Cluster(done), x.n - done}
			a.reserve.stained = append(a.reserve.stained, runs[i:]...)
			return err
		}
	}
	return a.cut()
}
