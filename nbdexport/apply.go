package nbdexport

import (
	"errors"
	"io"
	"syscall"
)

const (
	// longestPiece is how many bytes are trimmed or zeroed in one call of the backend, which others may have to wait for.
	longestPiece = 1 << 30
	// cachePiece is how many bytes are read at a time for nothing but to have been read.
	cachePiece = 256 << 10
)

// apply lets the backend carry out a request that is answered without data. data is its payload.
func (t *transmission) apply(r *request, data []byte) errno {
	off, n := int64(r.offset), int64(r.length)
	var err error
	switch {
	case r.command == cmdFlush:
		return errnoOf(t.backend.Flush())
	case n == 0: // leaves it to the server what to do; there is nothing to do
	case r.command == cmdWrite && r.fua():
		_, err = t.backend.WriteSync(data, off)
		return errnoOf(err)
	case r.command == cmdWrite:
		_, err = t.backend.WriteAt(data, off)
	case r.command == cmdTrim, r.command == cmdWriteZeroes:
		if err = t.clear(r, off, n); r.flags&commandFastZero != 0 && errors.Is(err, syscall.ENOTSUP) {
			return errnoNotSup
		}
	case r.command == cmdCache:
		return errnoOf(t.cache(off, n))
	}
	if err == nil && r.fua() {
		err = t.backend.Flush()
	}
	return errnoOf(err)
}

// clear trims or zeroes n bytes at off, in pieces.
func (t *transmission) clear(r *request, off, n int64) (err error) {
	how := Zeroing{MayUnmap: r.flags&commandNoHole == 0, Fast: r.flags&commandFastZero != 0}
	for n > 0 && err == nil {
		k := min(n, longestPiece)
		if r.command == cmdTrim {
			err = t.backend.Discard(off, k)
		} else {
			err = t.backend.WriteZeroes(off, k, how)
		}
		off, n = off+k, n-k
	}
	return err
}

// cache carries out CACHE: it reads what can't be answered without a look at it, so that it is at hand.
func (t *transmission) cache(off, n int64) error {
	b := newBuffer(int(min(n, cachePiece)))
	defer b.recycle()
	for n > 0 {
		k, _, err := t.backend.ReadExtent(b.payload(int(min(n, cachePiece))), off)
		if err != nil {
			return err
		}
		if k == 0 {
			return io.ErrNoProgress // the backend has done less than it promises
		}
		off, n = off+int64(k), n-int64(k)
	}
	return nil
}
