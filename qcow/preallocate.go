package qcow

import (
	"context"
	"fmt"

	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// Preallocation says how much of a disk is allocated before anything is written to it.
type Preallocation uint8

const (
	// PreallocationOff: nothing. A cluster is allocated when it is written to.
	PreallocationOff Preallocation = iota
	// PreallocationMetadata: every cluster has its place in the file, one behind the other, but takes no space yet. An encrypted
	// image takes it all the same, as zeroes are something else there.
	PreallocationMetadata
	// PreallocationFalloc: and the file system has reserved the space.
	PreallocationFalloc
	// PreallocationFull: and zeroes have been written to it.
	PreallocationFull
)

var preallocationNames = [...]string{"off", "metadata", "falloc", "full"}

// String returns the name by which QEMU's tools know p.
func (p Preallocation) String() string {
	if int(p) < len(preallocationNames) {
		return preallocationNames[p]
	}
	return fmt.Sprintf("preallocation %d", uint8(p))
}

// ParsePreallocation returns the preallocation that QEMU's tools know by the name: "off", "metadata", "falloc" or "full". Others are
// ErrInvalid.
func ParsePreallocation(name string) (Preallocation, error) {
	for i, n := range preallocationNames {
		if n == name {
			return Preallocation(i), nil
		}
	}
	return 0, format.Invalidf("preallocation %q is none of %v", name, preallocationNames)
}

// A part is a piece of a file to be made. It may be larger than the memory.
type part struct {
	to   storage.File
	at   format.HostOffset
	n    uint64                     // bytes
	fill func(b []byte, pos uint64) // fills b, which is zeroes, with the bytes from pos on; nil: the space is only reserved
}

const (
	writeChunk   = 1 << 20
	reserveChunk = 1 << 30
)

// makeParts makes one part after the other, and tells progress, unless nil, how many bytes of how many are done.
func makeParts(ctx context.Context, parts []part, progress func(done, total int64)) error {
	var done, total int64
	for _, p := range parts {
		total += int64(p.n)
	}
	for _, p := range parts {
		err := p.make(ctx, func(n int) {
			if done += int64(n); progress != nil {
				progress(done, total)
			}
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func (p part) make(ctx context.Context, made func(n int)) error {
	chunk := uint64(reserveChunk)
	if p.fill != nil {
		chunk = writeChunk
	}
	for pos := uint64(0); pos < p.n; pos += chunk {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := min(chunk, p.n-pos)
		if err := p.makeChunk(pos, n); err != nil {
			return err
		}
		made(int(n))
	}
	return nil
}

func (p part) makeChunk(pos, n uint64) error {
	at := int64(p.at) + int64(pos)
	if p.fill == nil {
		if err := p.to.Allocate(at, int64(n)); err != nil {
			return fmt.Errorf("reserve %d bytes at %#x: %w", n, at, err)
		}
		return nil
	}
	b := buffers.get(int(n))
	defer buffers.put(b)
	clear(b)
	p.fill(b, pos)
	if _, err := p.to.WriteAt(b, at); err != nil {
		return fmt.Errorf("write %d bytes at %#x: %w", n, at, err)
	}
	return nil
}

// dataArea is where preallocated data clusters are: bytes of a file that read as zeroes.
type dataArea struct {
	to     storage.File
	at     format.HostOffset
	n      uint64
	cipher sectorCipher // nil: none
	unread bool         // the guest does not read them before it has written them
}

// appendTo appends what there is to do so that the guest reads zeroes there, and what p demands.
func (a dataArea) appendTo(parts []part, p Preallocation) []part {
	zeroes := part{to: a.to, at: a.at, n: a.n, fill: func([]byte, uint64) {}}
	if a.cipher != nil {
		zeroes.fill = func(b []byte, pos uint64) { a.cipher.Encrypt(b, (uint64(a.at)+pos)/format.SectorSize) }
	}
	switch {
	case a.n == 0 || p == PreallocationOff:
		return parts
	case p == PreallocationFull, a.cipher != nil && !a.unread:
		return append(parts, zeroes)
	case p == PreallocationFalloc:
		return append(parts, part{to: a.to, at: a.at, n: a.n})
	}
	return parts
}
