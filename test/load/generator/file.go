package generator

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// file makes requests of a file, one at a time.
type file struct {
	fd       int
	requests *stream
	ledger   *ledger // nil: what is read is not looked at
	outcome
}

// run makes requests until the time is over or there are no more.
func (f *file) run(clock clock) error {
	random := newPayload(int(f.requests.Block))
	buffer := make([]byte, len(random))
	before := clock.now()
	for before < clock.runtime {
		r, ok := f.requests.take()
		if !ok {
			break
		}
		err := f.do(r, random, buffer)
		now := clock.now()
		if err != nil {
			f.fail(fmt.Errorf("%v: %w", r, err))
		} else {
			f.count(r.write, now-before)
		}
		before = now
	}
	f.elapsed = before
	return nil
}

func (f *file) do(r request, random, buffer []byte) error {
	if r.write {
		var generation uint32
		if f.ledger != nil {
			generation = f.ledger.stamp(random, r.offset)
		}
		if n, err := unix.Pwrite(f.fd, random, r.offset); err != nil || n < len(random) {
			return fmt.Errorf("wrote %d of %d bytes: %w", n, len(random), err)
		}
		if f.ledger != nil {
			f.ledger.set(r.offset, len(random), generation)
		}
		return nil
	}
	if n, err := unix.Pread(f.fd, buffer, r.offset); err != nil || n < len(buffer) {
		return fmt.Errorf("read %d of %d bytes: %w", n, len(buffer), err)
	}
	if f.ledger != nil {
		if err := f.ledger.check(buffer, r.offset); err != nil {
			f.mismatch(err)
		}
	}
	return nil
}
