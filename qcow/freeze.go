package qcow

import (
	"sync"
	"sync/atomic"
)

// freezer holds requests that change the image up while its tables are exchanged. Reads go on.
type freezer struct {
	on      atomic.Bool
	mu      sync.Mutex
	holders int           // a freeze may be held inside another
	thaw    chan struct{} // closed by the last thaw; set while frozen
}

// frozen is asked by a request that has entered its epoch: either it sees the freeze, or the freeze waits for it.
func (f *freezer) frozen() bool { return f.on.Load() }

// wait returns when the freeze that was seen is over.
func (f *freezer) wait() {
	f.mu.Lock()
	thaw := f.thaw
	f.mu.Unlock()
	if thaw != nil {
		<-thaw
	}
}

// freeze waits for the requests under way and keeps those that change the image from beginning, until thaw is called.
// The caller holds Image.maintaining. Nothing is held back in the meantime, unless the image is poisoned.
func (img *Image) freeze() (thaw func()) {
	f := &img.freezer
	f.mu.Lock()
	if f.holders++; f.holders == 1 {
		f.thaw = make(chan struct{})
		f.on.Store(true)
	}
	f.mu.Unlock()
	img.epochs.wait()
	_ = img.settleLinks() // a failure poisons the image, and whatever is to be written meets that
	return func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		if f.holders--; f.holders == 0 {
			f.on.Store(false)
			close(f.thaw)
			f.thaw = nil
		}
	}
}
