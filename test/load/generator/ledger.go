package generator

import (
	"encoding/binary"
	"fmt"
)

// blockSize is the unit of verification, in bytes: what a disk writes at once.
const blockSize = 512

// ledger knows what a worker has written to its part of the disk. A block that it has not written, or whose write failed,
// may hold anything.
type ledger struct {
	begin       int64    // bytes, of the part
	generations []uint32 // by block; 0 is unknown
	last        uint32
}

func newLedger(begin, size int64) *ledger {
	return &ledger{begin: begin, generations: make([]uint32, (size+blockSize-1)/blockSize)}
}

// stamp marks every block of p, which is about to be written at the offset, with a new generation. While the write is in
// flight its blocks are unknown.
func (l *ledger) stamp(p []byte, offset int64) uint32 {
	l.last++
	for at := 0; at < len(p); at += blockSize {
		b := p[at:][:blockSize]
		mark(b, uint64(offset)+uint64(at), l.last)
		mark(b[blockSize-16:], uint64(offset)+uint64(at), l.last)
	}
	l.set(offset, len(p), 0)
	return l.last
}

func mark(b []byte, offset uint64, generation uint32) {
	binary.BigEndian.PutUint64(b, offset)
	binary.BigEndian.PutUint64(b[8:], uint64(generation))
}

// set notes the generation of n bytes at the offset.
func (l *ledger) set(offset int64, n int, generation uint32) {
	first := (offset - l.begin) / blockSize
	for i := range n / blockSize {
		l.generations[first+int64(i)] = generation
	}
}

// check tells in which way p, read at the offset, is not what was written there.
func (l *ledger) check(p []byte, offset int64) error {
	for at := 0; at < len(p); at += blockSize {
		here := offset + int64(at)
		want := l.generations[(here-l.begin)/blockSize]
		if want == 0 {
			continue
		}
		b := p[at:][:blockSize]
		for _, end := range [][]byte{b, b[blockSize-16:]} {
			gotOffset, gotGeneration := binary.BigEndian.Uint64(end), binary.BigEndian.Uint64(end[8:])
			if gotOffset != uint64(here) || gotGeneration != uint64(want) {
				return fmt.Errorf("block at %d has the mark of offset %d and generation %d, want generation %d",
					here, gotOffset, gotGeneration, want)
			}
		}
	}
	return nil
}

// checkHole is check for n bytes that were said to be zeroes.
func (l *ledger) checkHole(offset, n int64) error {
	for here := offset; here < offset+n; here += blockSize {
		if want := l.generations[(here-l.begin)/blockSize]; want != 0 {
			return fmt.Errorf("block at %d reads as a hole, want generation %d", here, want)
		}
	}
	return nil
}
