package qcow

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// splices knows who splices. What was spliced refers to clusters for as long as nobody has read it, which no epoch covers: so before the image gives
// clusters to other data of its own accord, nothing is spliced any more, and all that was has been read.
type splices struct {
	stopped atomic.Int32

	mu      sync.Mutex
	readers map[*spliceReader]struct{}
}

type spliceReader struct{ unread func() bool }

// splicePatience is how long readers have to read what was spliced.
const splicePatience = 5 * time.Second

// WatchSplices makes unread known, which says whether anything that the caller has spliced may not have been read yet. Whoever calls Splice does
// so before, and calls forget when it says false for good.
func (img *Image) WatchSplices(unread func() bool) (forget func()) {
	s, r := &img.splices, &spliceReader{unread}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.readers == nil {
		s.readers = map[*spliceReader]struct{}{}
	}
	s.readers[r] = struct{}{}
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.readers, r)
	}
}

// stopSplices returns when all that was spliced has been read, and keeps more from being spliced until resume is called. ErrBusy: some of it is
// not read for a long time. The caller is not inside an epoch.
func (img *Image) stopSplices(ctx context.Context) (resume func(), err error) {
	s := &img.splices
	s.stopped.Add(1)
	resume = func() { s.stopped.Add(-1) }
	img.epochs.wait()
	for begin := time.Now(); s.unread(); time.Sleep(time.Millisecond) {
		err := ctx.Err()
		if err == nil && time.Since(begin) > splicePatience {
			err = fmt.Errorf("%w: a client has not taken what it has read for %v", ErrBusy, splicePatience)
		}
		if err != nil {
			resume()
			return nil, err
		}
	}
	return resume, nil
}

func (s *splices) unread() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for r := range s.readers {
		if r.unread() {
			return true
		}
	}
	return false
}

// Splice moves the first of n bytes at off, which lie inside the disk, into a pipe, given by its descriptor, without copying them. It returns
// how many it moved; 0 where the bytes are not stored as the guest reads them, or the file or the pipe does not allow it: then they have to be
// read. Errors are those of [Image.ReadAt].
//
// The pipe shows what the bytes are when they are read from it: what is written to them until then may be in it, and where they are discarded,
// anything that the guest has. See WatchSplices.
func (img *Image) Splice(pipe int, off int64, n int) (int, error) {
	epoch, err := img.begin(off, int64(n), false)
	if err != nil {
		return 0, err
	}
	defer img.epochs.leave(epoch)
	if img.cipher != nil || n == 0 || img.splices.stopped.Load() > 0 {
		return 0, nil
	}
	m, err := img.lookup(format.GuestOffset(off), uint64(n))
	switch {
	case err != nil:
		return 0, err
	case m.kind == format.Data:
		return img.data.Splice(pipe, int64(m.host), int(m.length))
	case m.absent():
		return img.under().splice(pipe, off, int(m.length))
	}
	return 0, nil
}
