package nbdexport

import (
	"math/bits"
	"sync"
)

// A buffer holds the payload of one request that a worker carries out. Its memory has a page in front of the payload,
// at the end of which the header of a reply has its place: header and data go out in one write, and the data is
// aligned to pages. Behind is room for what a reply with holes has more than one without.
type buffer struct{ memory []byte }

const (
	bufferFront   = 4096
	bufferBehind  = 4096
	smallestClass = 12 // log2 of the smallest payload that buffers are made for
	largestClass  = 25 // log2 of MaxPayload
)

// buffers are the idle ones, by class. What is not in use goes back to the garbage collector in the end.
var buffers [largestClass - smallestClass + 1]sync.Pool

// class returns the index in buffers of those with room for n bytes.
func class(n int) int { return bits.Len(uint(max(n, 1<<smallestClass)-1)) - smallestClass }

// roomFor returns the room of the buffers for n bytes.
func roomFor(n int) int { return 1 << (class(n) + smallestClass) }

// newBuffer returns a buffer with room for n bytes of payload, at most MaxPayload.
func newBuffer(n int) *buffer {
	c := class(n)
	if b, ok := buffers[c].Get().(*buffer); ok {
		return b
	}
	return &buffer{memory: make([]byte, bufferFront+roomFor(n)+bufferBehind)}
}

// recycle hands the buffer back. It must not be used any more.
func (b *buffer) recycle() { buffers[class(b.room())].Put(b) }

// room is the number of bytes of payload that fit in.
func (b *buffer) room() int { return len(b.memory) - bufferFront - bufferBehind }

// payload is the place of n bytes of payload.
func (b *buffer) payload(n int) []byte { return b.memory[bufferFront:][:n] }

// reply is the place of a reply whose data, if it begins with data after a header of so many bytes, is aligned.
func (b *buffer) reply(header int) []byte { return b.memory[bufferFront-header:] }
