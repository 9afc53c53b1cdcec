package generator

import (
	"errors"
	"fmt"
	"math/bits"
)

// Pattern says which requests are made.
type Pattern struct {
	RW       string // "read", "write" (sequential), "randread", "randwrite" or "randrw"
	Mix      int    // percentage of reads, of randrw
	Block    int64  // bytes of a request
	Align    int64  // bytes; offsets are multiples of it. 0 means Block
	Size     int64  // bytes of the disk, from its beginning, that are used. 0 means all
	Distinct bool   // use no place twice, and end when all have been used; of the random patterns
	Seed     uint64 // of the random patterns
}

// MaxBlock is the most bytes that a request may have: what every NBD server must accept.
const MaxBlock = 32 << 20

// resolve fills in what follows from the size of the disk in bytes, and refuses what makes no sense.
func (p Pattern) resolve(disk int64) (Pattern, error) {
	if p.Align == 0 {
		p.Align = p.Block
	}
	if p.Size == 0 {
		p.Size = disk
	}
	switch p.RW {
	case "read", "write", "randread", "randwrite", "randrw":
	default:
		return p, fmt.Errorf("pattern %q is none of read, write, randread, randwrite, randrw", p.RW)
	}
	switch {
	case p.Mix < 0 || p.Mix > 100:
		return p, fmt.Errorf("a mix of %d %% reads", p.Mix)
	case p.Block < 1 || p.Block > MaxBlock || p.Align < 1:
		return p, fmt.Errorf("blocks of %d bytes at multiples of %d", p.Block, p.Align)
	case p.Size > disk:
		return p, fmt.Errorf("%d bytes are to be used of a disk that has %d", p.Size, disk)
	case p.Distinct && !p.random():
		return p, errors.New("distinct places are for random patterns")
	}
	return p, nil
}

func (p Pattern) random() bool { return p.RW != "read" && p.RW != "write" }

// request is one read or write of Pattern.Block bytes.
type request struct {
	offset int64 // bytes
	write  bool
}

func (r request) String() string {
	if r.write {
		return fmt.Sprintf("write at %d", r.offset)
	}
	return fmt.Sprintf("read at %d", r.offset)
}

// stream makes the requests of one worker.
type stream struct {
	Pattern
	begin  int64  // bytes, where the part of the disk that this worker uses begins
	size   int64  // bytes of that part
	places uint64 // offsets that can be chosen
	next   uint64 // place, of sequential patterns
	state  uint64 // of the random numbers
	left   uint64 // places not used yet, of distinct ones
	cycle  uint64 // state of the permutation of distinct places
}

// newStream returns the requests of one of several workers. Each has its own part of the disk where that matters: when
// no place may be used twice, when one worker must know what is on the disk (own), and when reading ahead would
// otherwise serve all of them.
func newStream(p Pattern, worker, workers int, own bool) (*stream, error) {
	s := &stream{Pattern: p, state: p.Seed + uint64(worker)*0x9e3779b97f4a7c15}
	s.size = p.Size
	if own || p.Distinct || !p.random() {
		s.size = p.Size / int64(workers) / p.Align * p.Align
		s.begin = int64(worker) * s.size
	}
	if s.size < p.Block {
		return nil, fmt.Errorf("%d bytes for each worker, less than a block of %d", s.size, p.Block)
	}
	s.places = uint64((s.size-p.Block)/p.Align) + 1
	s.left = s.places
	s.cycle = s.draw()
	return s, nil
}

// take returns the next request; false when there are no more.
func (s *stream) take() (request, bool) {
	r := request{write: s.RW == "write" || s.RW == "randwrite"}
	if s.RW == "randrw" {
		r.write = s.draw()%100 >= uint64(s.Mix)
	}
	var place uint64
	switch {
	case s.Distinct && s.left == 0:
		return request{}, false
	case s.Distinct:
		s.left--
		place = s.permute()
	case s.Pattern.random():
		place, _ = bits.Mul64(s.draw(), s.places)
	default:
		place = s.next
		s.next = (s.next + 1) % s.places
	}
	r.offset = s.begin + int64(place)*s.Align
	return r, true
}

// draw returns 64 random bits (splitmix64).
func (s *stream) draw() uint64 {
	s.state += 0x9e3779b97f4a7c15
	z := s.state
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return z ^ z>>31
}

// permute returns each place once: a linear congruential generator goes through all numbers below the next power of
// two in an order that looks random, and those that are no place are left out.
func (s *stream) permute() uint64 {
	mask := uint64(1)<<bits.Len64(s.places-1) - 1
	for {
		s.cycle = (s.cycle*0xd1342543de82ef95 + 0x2545f4914f6cdd1d) & mask
		if s.cycle < s.places {
			return s.cycle
		}
	}
}
