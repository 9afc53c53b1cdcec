package interop_test

import "fmt"

// deed is what a request asks for.
type deed int

const (
	plainWrite deed = iota
	compressedWrite
	zeroKept     // zeroes, and the clusters stay
	zeroUnmapped // zeroes, and the clusters may go
	discard
)

// request is one for the disk of a subject.
type request struct {
	deed   deed
	off, n int64 // bytes; of compressedWrite and discard whole clusters, where the end of the disk ends one
	ink    *ink
}

// String is the command of qemu-io for it.
func (r request) String() string {
	command := map[deed]string{
		plainWrite: "write -q -s " + r.ink.String(), compressedWrite: "write -q -c -s " + r.ink.String(),
		zeroKept: "write -q -z", zeroUnmapped: "write -q -z -u", discard: "discard -q",
	}[r.deed]
	return fmt.Sprintf("%s %d %d", command, r.off, r.n)
}

// note does a request on what the disk should hold.
func (s *subject) note(r request) {
	p := s.disk[r.off : r.off+r.n]
	switch r.deed {
	case plainWrite, compressedWrite:
		r.ink.fill(p)
	case discard:
		if s.version == 2 && s.backing != nil { // it could only be unlinked, and show the backing file
			s.mayBeDirty(r)
			return
		}
		clear(p)
	default:
		clear(p)
	}
	for _, d := range s.bitmaps {
		d.note(r.off, r.n)
	}
}

func (s *subject) mayBeDirty(r request) {
	for _, d := range s.bitmaps {
		d.mayBe(r.off, r.n)
	}
}

// requests returns n random requests, each of one of some kinds.
func (s *subject) requests(n int, kinds ...deed) []request {
	var list []request
	for len(list) < n {
		r := request{deed: kinds[s.rng.IntN(len(kinds))], ink: inks()[s.rng.IntN(len(inks()))]}
		size, cluster := int64(len(s.disk)), s.cluster()
		r.off = s.rng.Int64N(size)
		r.n = min(1+s.rng.Int64N(max(3*cluster/2, size/12)), size-r.off)
		switch {
		case r.deed == discard || r.deed == compressedWrite:
			r.off = r.off / cluster * cluster
			if end := r.off + (r.n+cluster-1)/cluster*cluster; end < size {
				r.n = end - r.off
			} else {
				r.n = size - r.off
			}
		case s.encrypted() || s.rng.IntN(2) == 0: // whole sectors
			r.n = min(r.n+r.off&511+511, size-r.off&^511) &^ 511
			r.off &^= 511
		}
		list = append(list, r)
	}
	return list
}
