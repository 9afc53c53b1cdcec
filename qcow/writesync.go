package qcow

import (
	"sync/atomic"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// durability counts changes of tables, to know whether all of them are durable.
type durability struct {
	changed atomic.Uint64 // changes written
	synced  atomic.Uint64 // those of them that are durable for sure
}

// covered is called with what changed was before a sync that has succeeded.
func (d *durability) covered(changed uint64) {
	for {
		old := d.synced.Load()
		if old >= changed || d.synced.CompareAndSwap(old, changed) {
			return
		}
	}
}

func (d *durability) complete() bool { return d.synced.Load() >= d.changed.Load() }

// WriteSync is a WriteAt whose data is durable when it returns nil (FUA). Where clusters are overwritten in place and every table is
// durable already it makes nothing else durable, which costs less than a Flush; elsewhere it includes one.
func (img *Image) WriteSync(p []byte, off int64) (n int, err error) {
	n, done, err := img.overwriteSync(p, off)
	if done || err != nil {
		return n, err
	}
	if n, err = img.WriteAt(p, off); err != nil {
		return n, err
	}
	if err := img.Flush(); err != nil {
		return 0, err
	}
	return n, nil
}

// overwriteSync writes p if it can be written in place, and durably, at once. When it can't it has written nothing, done is false.
func (img *Image) overwriteSync(p []byte, off int64) (n int, done bool, err error) {
	epoch, err := img.begin(off, int64(len(p)), true)
	if err != nil {
		return 0, false, err
	}
	defer img.epochs.leave(epoch)
	if len(p) == 0 || img.cipher != nil || img.detectZeroes || img.moving.overlaps(uint64(off), uint64(len(p))) {
		return 0, false, nil
	}
	m, err := img.lookup(format.GuestOffset(off), uint64(len(p)))
	if err != nil || m.kind != format.Data || m.length < uint64(len(p)) {
		return 0, false, err
	}
	// Asked after the lookup: the change that made the mapping is counted by then.
	if !img.tablesDurable.complete() || img.links.any() {
		return 0, false, nil
	}
	if owned, err := img.ownedRun(&m); err != nil || owned < uint64(len(p)) {
		return 0, false, err
	}
	if err := img.mustBeData(m.host, uint64(len(p))); err != nil {
		return 0, false, err
	}
	if n, err = img.data.WriteSync(p, int64(m.host)); err != nil {
		// As with a sync that failed, what is on disk is unknown.
		return n, true, img.poison(err)
	}
	return n, true, nil
}
