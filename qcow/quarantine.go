package qcow

import (
	"errors"
	"sync"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// quarantineLimit is how many clusters may wait in quarantine before a discard flushes by itself.
const quarantineLimit = 1 << 16

// quarantine holds clusters that no table mentions any more, but a table on disk may, since that was not synced yet,
// and requests may still be using. They keep their refcount and content until [Image.reclaim].
type quarantine struct {
	// emptying is read-locked from the moment clusters are taken out until they are given back, or here again.
	emptying sync.RWMutex

	mu      sync.Mutex
	runs    []run
	durable []run // no table on disk mentions them either
	n       uint64
}

// add puts unlinked clusters in.
func (q *quarantine) add(x run) {
	if x.n == 0 {
		return
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	q.runs = appendRun(q.runs, x)
	q.n += x.n
}

func (q *quarantine) length() uint64 {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.n
}

// takeAll empties the quarantine of what needs a sync.
func (q *quarantine) takeAll() []run { return q.empty(&q.runs) }

// takeDurable empties the quarantine of what needs no sync.
func (q *quarantine) takeDurable() []run { return q.empty(&q.durable) }

func (q *quarantine) empty(list *[]run) []run {
	q.mu.Lock()
	defer q.mu.Unlock()
	runs := *list
	q.n -= countRuns(runs)
	*list = nil
	return runs
}

func (q *quarantine) putBack(runs []run) {
	for _, x := range runs {
		q.add(x)
	}
}

// addDurable is add for clusters whose un-linking is durable already.
func (q *quarantine) addDurable(runs []run) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.durable = append(q.durable, runs...)
	q.n += countRuns(runs)
}

// Flush makes every write, discard and resize that returned before it was called durable, and then gives the space of
// discarded clusters back. Its result speaks of the former only: clusters that can't be given back now are tried
// again with the next flush, and by Close, which reports it.
func (img *Image) Flush() error {
	img.maintenance.RLock()
	defer img.maintenance.RUnlock()
	if err := img.usable(); err != nil {
		return err
	}
	if img.readOnly {
		return nil
	}
	reclaimErr, err := img.flush()
	_ = reclaimErr // the clusters are back in quarantine
	return err
}

func (img *Image) flush() (reclaimErr, err error) {
	img.quarantine.emptying.RLock()
	defer img.quarantine.emptying.RUnlock()
	unlinked := img.quarantine.takeAll()
	if err := img.syncAll(); err != nil {
		img.quarantine.putBack(unlinked)
		return nil, err
	}
	if unlinked = append(unlinked, img.quarantine.takeDurable()...); len(unlinked) > 0 {
		reclaimErr = img.reclaim(sortRuns(unlinked))
	}
	return errors.Join(reclaimErr, img.alloc.relax()), nil
}

// emptyQuarantine flushes until every cluster that was unlinked is given back, and keeps others from flushing until release is called: whoever
// counts references must not find some that no table mentions. Nothing is unlinked meanwhile, since the image is frozen.
func (img *Image) emptyQuarantine() (release func(), err error) {
	for {
		reclaimErr, err := img.flush()
		if err := errors.Join(reclaimErr, err); err != nil {
			return nil, err
		}
		img.quarantine.emptying.Lock()
		if img.quarantine.length() == 0 {
			return img.quarantine.emptying.Unlock, nil
		}
		img.quarantine.emptying.Unlock() // another flush has put something back
	}
}

// reclaim frees clusters whose un-linking is durable (rule 2), in ascending runs: it waits until nobody uses them, punches them, and only
// then lowers their refcounts, so that whoever allocates them next can't meet a late punch (rule 6).
func (img *Image) reclaim(runs []run) error {
	img.epochs.wait()
	img.unpacked.forget()
	for i, x := range runs {
		done, err := img.release(x)
		if err != nil {
			runs[i] = run{x.first + format.Cluster(done), x.n - done}
			img.quarantine.putBack(runs[i:])
			return err
		}
	}
	return nil
}

// release takes one reference from each cluster of x, and punches and frees those that have none left; when it fails, the first done of
// them are dealt with.
func (img *Image) release(x run) (done uint64, err error) {
	g := img.geometry
	for done < x.n {
		c := x.first + format.Cluster(done)
		sole, count, err := img.alloc.soleRun(run{c, x.n - done})
		if err != nil {
			return done, err
		}
		if sole == 0 {
			if count == 0 {
				return done, img.markCorrupt(format.Corruptf("refcount block", g.OffsetOf(c), "a cluster that was in use has the refcount 0"))
			}
			lowered, err := img.alloc.lower(c)
			if err != nil {
				return done, err
			}
			if lowered {
				done++
			}
			continue
		}
		if c, found := img.metadata.find(run{c, sole}); found {
			return done, img.markCorrupt(format.Corruptf("L2 table", g.OffsetOf(c), "a discarded cluster holds metadata"))
		}
		if err := img.file.PunchHole(int64(g.OffsetOf(c)), int64(sole<<g.ClusterBits)); err != nil {
			return done, err
		}
		img.tables.drop(run{c, sole})
		n, err := img.alloc.free(run{c, sole})
		done += n
		if err != nil {
			return done, err
		}
	}
	return done, nil
}
