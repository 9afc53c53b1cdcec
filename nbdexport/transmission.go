package nbdexport

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync/atomic"
)

const (
	receiveBuffer = 128 << 10 // bytes that are received ahead, and bytes of replies that are sent together
	fewRequests   = 8         // received together are answered together
	inlineLimit   = 64 << 10  // bytes of the largest payload that the receiver handles in these buffers
)

// ServeTransmission serves b to a client that negotiates nothing and starts with requests: the kernel's, which gets its
// end of a socket pair by netlink, with b's size and TransmissionFlags. It takes conn over.
//
// It returns nil after the client has said goodbye (NBD_CMD_DISC), an error that matches ErrDropped when the
// connection ended otherwise, and one that matches ErrProtocol when the client broke the protocol. When ctx ends it
// takes in what the client has sent already (other than over a unix socket: what has been received already), answers
// that, and returns the error of ctx. In every case, when it returns, conn is closed and no request that came in by it
// touches b any more.
func ServeTransmission(ctx context.Context, conn net.Conn, b Backend) error {
	info, err := inspect(b)
	if err != nil {
		return errors.Join(err, conn.Close())
	}
	l := newLink(conn)
	return serveTransmission(ctx, l, bufio.NewReaderSize(l, receiveBuffer), &choice{export: Export{Backend: b}, info: info})
}

// serveTransmission is ServeTransmission after a negotiation, which may have read ahead.
func serveTransmission(ctx context.Context, l link, in *bufio.Reader, c *choice) error {
	t := &transmission{
		in: in, out: sender{link: l}, backend: c.export.Backend, info: c.info, terms: c.terms,
		requestSize: requestSize, magic: magicRequest, batch: make([]byte, 0, receiveBuffer),
	}
	if t.terms.replies == extendedReplies {
		t.requestSize, t.magic = extendedRequestSize, magicExtendedRequest
	}
	if s, ok := l.(*socket); ok {
		t.socket = s
		forget := t.backend.WatchSplices(s.unread)
		defer forget()
	}
	t.size.Store(c.info.Size)
	t.crew = newCrew(t.carryOut)
	stopWatching := context.AfterFunc(ctx, l.hangUp)
	err := t.receive()
	t.flush()
	t.crew.dismiss()
	stopWatching()
	switch {
	case t.out.err != nil:
		err = dropped(t.out.err)
	case err != nil && ctx.Err() != nil && !errors.Is(err, ErrProtocol):
		l.linger()
		err = ctx.Err()
	}
	_ = l.Close() // all replies are on their way, or lost
	return err
}

// transmission is the phase of a connection in which requests are answered. One goroutine, the receiver, takes
// requests in and checks them. It carries out by itself those that are quickly done, and gives the others to the
// crew.
type transmission struct {
	in          *bufio.Reader
	out         sender
	backend     Backend
	info        Info         // but for the size
	size        atomic.Int64 // of the export, in bytes, as far as known
	terms       terms
	socket      *socket // under out, if it is one
	requestSize int     // bytes of a request's header
	magic       uint32  // that it begins with
	batch       []byte  // replies of the receiver's own that are not sent yet
	half        int     // when no more than so many received bytes are left, the batch is sent; 0: not before they are used up
	pace        pace
	crew        *crew
}

// receive is the life of the receiver. It returns nil when the client has said goodbye, and when no reply can be sent
// any more.
func (t *transmission) receive() error {
	for !t.out.failed.Load() {
		r, err := t.next()
		if err != nil {
			return err
		}
		if r.command == cmdDisc {
			return nil
		}
		switch fault := t.verify(&r); {
		case fault != errnoNone:
			err = t.refuse(&r, fault)
		case t.quick(&r):
			err = t.handle(&r)
		default:
			err = t.delegate(&r)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// next receives the header of the next request.
func (t *transmission) next() (request, error) {
	header, err := t.peek(t.requestSize)
	if err != nil {
		return request{}, err
	}
	r := parseRequest(header, t.terms.replies == extendedReplies)
	switch {
	case r.magic != t.magic:
		return request{}, fmt.Errorf("%w: request magic %#x", ErrProtocol, r.magic)
	case r.payload() > MaxPayload && t.terms.replies == extendedReplies:
		return request{}, fmt.Errorf("%w: payload of %d bytes", ErrProtocol, r.payload())
	}
	_, err = t.in.Discard(t.requestSize)
	return r, err
}

// peek returns the next n bytes, at most inlineLimit. They are good until the next call that receives.
func (t *transmission) peek(n int) ([]byte, error) {
	here := t.in.Buffered() >= n
	if !here {
		t.flush()
	}
	b, err := t.in.Peek(n)
	if !here {
		t.half = 0
		if got := t.in.Buffered(); got >= fewRequests*t.requestSize {
			t.half = got / 2
		}
	}
	return b, dropped(err)
}

// refuse answers a request that the backend never sees.
func (t *transmission) refuse(r *request, fault errno) error {
	if n := r.payload(); n > 0 {
		if uint64(t.in.Buffered()) < n {
			t.flush()
		}
		if _, err := io.CopyN(io.Discard, t.in, int64(n)); err != nil {
			return dropped(err)
		}
	}
	t.add(t.terms.replies.putOutcome(t.reserve(largestOutcome), r, fault))
	return nil
}

// quick says whether the receiver should carry the request out by itself. That costs least, but everything behind the
// request waits for it. So it does with small reads and writes, when they are usually done in less time than it takes
// to give them away, or when nothing is behind them.
func (t *transmission) quick(r *request) bool {
	switch {
	case r.command != cmdRead && r.command != cmdWrite, r.fua(), r.length > inlineLimit, t.info.Direct:
		return false // the buffers of the connection are aligned to nothing
	case t.pace.fast():
		return true
	default:
		return uint64(t.in.Buffered()) <= r.payload() && !t.crew.atWork()
	}
}

// handle carries a quick request out in the buffers of the connection.
func (t *transmission) handle(r *request) error {
	if r.command == cmdRead {
		t.add(t.timed(r, t.reserve(readReplySize(int(r.length)))))
		return nil
	}
	data, err := t.peek(int(r.length))
	if err != nil {
		return err
	}
	begin := monotonic()
	fault := t.apply(r, data)
	t.pace.add(monotonic() - begin)
	t.add(t.terms.replies.putOutcome(t.reserve(largestOutcome), r, fault))
	_, err = t.in.Discard(int(r.length))
	return err
}

// timed is read that takes note of the time. It returns 0 when the reply is sent already.
func (t *transmission) timed(r *request, b []byte) int {
	begin := monotonic()
	n := 0
	if !t.spliced(b, r) {
		n = t.read(b, r)
	}
	if r.length <= inlineLimit {
		t.pace.add(monotonic() - begin)
	}
	return n
}

// delegate gives the request to a worker, after it has received the payload.
func (t *transmission) delegate(r *request) error {
	n := r.room()
	w := t.crew.tryTake(n)
	if w == nil {
		t.flush()
		w = t.crew.take(n)
	}
	w.request = *r
	payload := w.buffer.payload(int(r.payload()))
	if len(payload) > t.in.Buffered() {
		t.flush()
	}
	if _, err := io.ReadFull(t.in, payload); err != nil {
		t.crew.release(w)
		return dropped(err)
	}
	w.start <- struct{}{}
	return nil
}

// carryOut is what a worker does with a request.
func (t *transmission) carryOut(w *worker) {
	r := &w.request
	switch r.command {
	case cmdRead:
		reply := w.buffer.reply(t.terms.replies.dataHeaderSize())
		if n := t.timed(r, reply); n > 0 {
			t.out.send(reply[:n])
		}
	case cmdBlockStatus:
		t.blockStatus(w)
	default:
		begin := monotonic()
		fault := t.apply(r, w.buffer.payload(int(r.payload())))
		if r.command == cmdWrite && !r.fua() && r.length <= inlineLimit {
			t.pace.add(monotonic() - begin)
		}
		t.sendOutcome(w, fault)
	}
}

// sendOutcome sends a reply without data on its own, from the worker's buffer.
func (t *transmission) sendOutcome(w *worker, fault errno) {
	b := w.buffer.reply(0)
	t.out.send(b[:t.terms.replies.putOutcome(b, &w.request, fault)])
}

// reserve makes room for n bytes in the batch of replies, where add counts what was used of it.
func (t *transmission) reserve(n int) []byte {
	if cap(t.batch)-len(t.batch) < n {
		t.flush()
	}
	return t.batch[len(t.batch):cap(t.batch)]
}

// add counts n bytes of reserved room as a reply. Replies are sent together, because each sending costs as much as a small read; but not all
// that are due at once: with the first half the client can go on while the second is worked on, instead of the one always waiting for the other.
func (t *transmission) add(n int) {
	t.batch = t.batch[:len(t.batch)+n]
	if t.in.Buffered() < t.half {
		t.half = 0
		t.flush()
	}
}

// flush sends the batch. The receiver does so before it waits for anything.
func (t *transmission) flush() {
	if len(t.batch) > 0 {
		t.out.send(t.batch)
		t.batch = t.batch[:0]
	}
}
