package generator

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// MaxDepth is the most requests that one connection keeps in flight: their headers and payloads fit into one sendmsg.
const MaxDepth = 512

// receiveBuffer, in bytes, holds what a unix socket holds by default, and stays in the second level cache.
const receiveBuffer = 256 << 10

// slot is a place for a request in flight. Its index is the cookie.
type slot struct {
	request
	sent       time.Duration // since the beginning
	payload    []byte        // of writes
	generation uint32        // that is being written, of the ledger
	inFlight   bool
	failed     bool
}

// connection keeps requests in flight on one connection to a server.
type connection struct {
	session  *session
	requests *stream
	ledger   *ledger // nil: what is read is not looked at
	block    int
	slots    []slot
	free     []int // indices of slots that are not in flight
	outcome

	headers []byte       // of the requests in vectors
	vectors []unix.Iovec // what is to be sent, from the index unsent on
	unsent  int
	message unix.Msghdr

	in     []byte // received
	have   int    // bytes of in
	skip   int    // bytes of a payload that is not looked at and has not arrived yet
	ending int    // slot that is done once they have; -1 if none is
}

func newConnection(s *session, requests *stream, depth int, verify bool) *connection {
	c := &connection{
		session:  s,
		requests: requests,
		block:    int(requests.Block),
		slots:    make([]slot, depth),
		free:     make([]int, depth),
		headers:  make([]byte, 0, depth*requestSize),
		vectors:  make([]unix.Iovec, 0, 2*depth),
		in:       make([]byte, receiveBuffer),
		ending:   -1,
	}
	random := newPayload(c.block)
	if verify {
		c.ledger = newLedger(requests.begin, requests.size)
		c.in = make([]byte, max(receiveBuffer, 2*(c.block+64)))
	}
	for i := range c.slots {
		c.free[i] = i
		c.slots[i].payload = random
		if verify {
			c.slots[i].payload = append([]byte(nil), random...)
		}
	}
	return c
}

// newPayload returns random bytes, which no server can mistake for zeroes or compress.
func newPayload(n int) []byte {
	p := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{}).Read(p) // never fails
	return p
}

// run makes requests until the time is over or there are no more, and waits for the replies to all of them.
func (c *connection) run(clock clock) error {
	for {
		now := clock.now()
		if c.unsent == len(c.vectors) && now < clock.runtime {
			c.fill(now)
		}
		if err := c.send(); err != nil {
			return fmt.Errorf("send: %w", err)
		}
		if len(c.free) == len(c.slots) {
			break
		}
		// A server may stop receiving until its replies are taken: then the rest is sent after some of them.
		if c.unsent < len(c.vectors) {
			readable, err := wait(int(c.session.descriptor))
			if err != nil {
				return err
			}
			if !readable {
				continue
			}
		}
		n, err := c.session.Read(c.in[c.have:])
		if err != nil {
			return fmt.Errorf("%d requests are in flight: %w", len(c.slots)-len(c.free), err)
		}
		c.have += n
		if err := c.handle(clock.now()); err != nil {
			return err
		}
	}
	c.elapsed = clock.now()
	_, err := c.session.Write(appendRequest(nil, cmdDisc, 0, 0, 0))
	return err
}

// fill puts a request into every free slot.
func (c *connection) fill(now time.Duration) {
	c.headers, c.vectors, c.unsent = c.headers[:0], c.vectors[:0], 0
	merge := false // the last vector is a header, and what follows it in memory is the next one
	for len(c.free) > 0 {
		r, ok := c.choose()
		if !ok {
			return
		}
		cookie := c.free[len(c.free)-1]
		c.free = c.free[:len(c.free)-1]
		s := &c.slots[cookie]
		s.request, s.sent, s.inFlight, s.failed = r, now, true, false

		begin := len(c.headers)
		command := uint16(cmdRead)
		if r.write {
			command = cmdWrite
		}
		c.headers = appendRequest(c.headers, command, uint64(cookie), r.offset, uint32(c.block))
		if merge {
			c.vectors[len(c.vectors)-1].Len += requestSize
		} else {
			c.vectors = append(c.vectors, vector(c.headers[begin:]))
		}
		if merge = !r.write; r.write {
			if c.ledger != nil {
				s.generation = c.ledger.stamp(s.payload, r.offset)
			}
			c.vectors = append(c.vectors, vector(s.payload))
		}
	}
}

// choose returns the next request. Where everything is verified it must not touch what is in flight: which of two
// requests comes first is for the server to choose.
func (c *connection) choose() (request, bool) {
	const tries = 100
	for range tries {
		r, ok := c.requests.take()
		if !ok || c.ledger == nil || !slices.ContainsFunc(c.slots, func(s slot) bool {
			return s.inFlight && max(s.offset-r.offset, r.offset-s.offset) < int64(c.block)
		}) {
			return r, ok
		}
	}
	return request{}, false
}

func vector(b []byte) unix.Iovec {
	v := unix.Iovec{Base: unsafe.SliceData(b)}
	v.SetLen(len(b))
	return v
}

// send sends as much as the socket takes at once.
func (c *connection) send() error {
	for c.unsent < len(c.vectors) {
		rest := c.vectors[c.unsent:]
		c.message.Iov = unsafe.SliceData(rest)
		c.message.SetIovlen(len(rest))
		n, _, errno := unix.Syscall(unix.SYS_SENDMSG, uintptr(c.session.descriptor), uintptr(unsafe.Pointer(&c.message)),
			unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		switch {
		case errno == unix.EAGAIN:
			return nil
		case errno == unix.EINTR:
			continue
		case errno != 0:
			return errno
		}
		for left := uint64(n); left > 0; {
			v := &c.vectors[c.unsent]
			if left < v.Len {
				v.Base = (*byte)(unsafe.Add(unsafe.Pointer(v.Base), left))
				v.Len -= left
				break
			}
			left -= v.Len
			c.unsent++
		}
	}
	return nil
}

// wait waits until the socket can be read from or written to.
func wait(fd int) (readable bool, err error) {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN | unix.POLLOUT}}
	if _, err := unix.Poll(fds, -1); err != nil && !errors.Is(err, unix.EINTR) {
		return false, err
	}
	return fds[0].Revents&^unix.POLLOUT != 0, nil
}

// handle takes all replies that have arrived.
func (c *connection) handle(now time.Duration) error {
	p := c.in[:c.have]
	for {
		if c.skip > 0 {
			n := min(c.skip, len(p))
			c.skip -= n
			p = p[n:]
		}
		if c.skip > 0 {
			break
		}
		if c.ending >= 0 {
			c.done(c.ending, now)
			c.ending = -1
		}
		r, length, err := decodeReply(p)
		if err != nil {
			return err
		}
		if length == 0 {
			break
		}
		if r.cookie >= uint64(len(c.slots)) || !c.slots[r.cookie].inFlight {
			return fmt.Errorf("reply to request %d, which was not made", r.cookie)
		}
		s := &c.slots[r.cookie]
		if r.kind == simpleData && r.errno == 0 && !s.write {
			r.payload = c.block
		}
		if r.payload > c.block+64 {
			return fmt.Errorf("reply with %d bytes to a request for %d", r.payload, c.block)
		}
		if c.ledger != nil {
			if len(p) < length+r.payload {
				break
			}
			if err := c.verify(s, r, p[length:][:r.payload]); err != nil {
				c.mismatch(err)
			}
		}
		if r.errno != 0 || r.kind >= chunkError {
			s.failed = true
			c.fail(fmt.Errorf("%v: error %d, chunk %#x", s.request, r.errno, r.kind))
		}
		p = p[length:]
		c.skip = r.payload
		if r.last {
			c.ending = int(r.cookie)
		}
	}
	c.have = copy(c.in, p)
	return nil
}

// done notes that the reply to a request is complete.
func (c *connection) done(cookie int, now time.Duration) {
	s := &c.slots[cookie]
	s.inFlight = false
	c.free = append(c.free, cookie)
	if s.failed {
		return
	}
	if s.write && c.ledger != nil {
		c.ledger.set(s.offset, c.block, s.generation)
	}
	c.count(s.write, now-s.sent)
}

// verify looks at the payload of a reply or a chunk.
func (c *connection) verify(s *slot, r reply, payload []byte) error {
	switch {
	case s.write || r.errno != 0 || r.kind == chunkNone || r.kind >= chunkError:
		return nil
	case r.kind == simpleData:
		return c.ledger.check(payload, s.offset)
	}
	if len(payload) < 12 {
		return fmt.Errorf("%v: chunk of kind %d with %d bytes", s.request, r.kind, len(payload))
	}
	offset, data := int64(binary.BigEndian.Uint64(payload)), payload[8:]
	n := int64(len(data))
	if r.kind == chunkOffsetHole {
		n = int64(binary.BigEndian.Uint32(data))
	}
	switch {
	case offset < s.offset || offset+n > s.offset+int64(c.block) || offset%blockSize != 0 || n%blockSize != 0:
		return fmt.Errorf("%v: chunk with %d bytes at %d", s.request, n, offset)
	case r.kind == chunkOffsetHole:
		return c.ledger.checkHole(offset, n)
	case r.kind == chunkOffsetData:
		return c.ledger.check(data, offset)
	}
	return fmt.Errorf("%v: chunk of kind %d", s.request, r.kind)
}
