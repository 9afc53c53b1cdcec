package nbdexport

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"time"
)

const (
	receiveBuffer = 128 << 10 // bytes that are received ahead, and bytes of replies that are sent together
	inlineLimit   = 64 << 10  // bytes of the largest payload that the receiver handles in these buffers
)

// ServeTransmission serves b to a client that negotiates nothing and starts with requests: the kernel's, which gets its
// end of a socket pair by netlink, with b's size and TransmissionFlags.
//
// It returns nil after the client has said goodbye (NBD_CMD_DISC), an error that matches ErrDropped when the
// connection ended otherwise, and one that matches ErrProtocol when the client broke the protocol. When ctx ends it
// takes in what the client has sent already (over TCP: what has been received already), answers that, and returns the
// error of ctx. Closing conn ends it at once, without answers. In every case, when it returns, conn is closed and no
// request that came in by it touches b any more.
func ServeTransmission(ctx context.Context, conn net.Conn, b Backend) error {
	info, err := inspect(b)
	if err != nil {
		return errors.Join(err, conn.Close())
	}
	return serveTransmission(ctx, conn, bufio.NewReaderSize(conn, receiveBuffer), b, info)
}

// serveTransmission is ServeTransmission after a negotiation, which may have read ahead.
func serveTransmission(ctx context.Context, conn net.Conn, in *bufio.Reader, b Backend, info Info) error {
	t := &transmission{in: in, out: sender{conn: conn}, backend: b, info: info, batch: make([]byte, 0, receiveBuffer)}
	t.crew = newCrew(t.carryOut)
	stopWatching := context.AfterFunc(ctx, func() { hangUp(conn) })
	err := t.receive()
	t.flush()
	t.crew.dismiss()
	stopWatching()
	switch {
	case t.out.err != nil:
		err = dropped(t.out.err)
	case err != nil && ctx.Err() != nil && !errors.Is(err, ErrProtocol):
		linger(conn)
		err = ctx.Err()
	}
	conn.Close() // all replies are on their way, or lost
	return err
}

// transmission is the phase of a connection in which requests are answered. One goroutine, the receiver, takes
// requests in and checks them. It carries out by itself those that are quickly done, and gives the others to the
// crew.
type transmission struct {
	in      *bufio.Reader
	out     sender
	backend Backend
	info    Info   // Size follows the backend's growth
	batch   []byte // replies of the receiver's own that are not sent yet
	pace    pace
	crew    *crew
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
		switch fault := r.verify(&t.info, t.grown); {
		case fault != errnoNone:
			err = t.refuse(r, fault)
		case t.quick(r):
			err = t.handle(r)
		default:
			err = t.delegate(r)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// next receives the header of the next request.
func (t *transmission) next() (request, error) {
	header, err := t.peek(requestSize)
	if err != nil {
		return request{}, err
	}
	r := parseRequest(header)
	if r.magic != magicRequest {
		return request{}, fmt.Errorf("%w: request magic %#x", ErrProtocol, r.magic)
	}
	_, err = t.in.Discard(requestSize)
	return r, err
}

// peek returns the next n bytes, at most inlineLimit. They are good until the next call that receives.
func (t *transmission) peek(n int) ([]byte, error) {
	if t.in.Buffered() < n {
		t.flush()
	}
	b, err := t.in.Peek(n)
	return b, dropped(err)
}

// grown returns the size that the backend has now, which may be more than it was.
func (t *transmission) grown() int64 {
	t.info.Size = max(t.info.Size, t.backend.Info().Size)
	return t.info.Size
}

// refuse answers a request that the backend never sees.
func (t *transmission) refuse(r request, fault errno) error {
	if t.in.Buffered() < r.payload() {
		t.flush()
	}
	if _, err := t.in.Discard(r.payload()); err != nil {
		return dropped(err)
	}
	putReplyHeader(t.reserve(0), r.cookie, fault)
	return nil
}

// quick says whether the receiver should carry the request out by itself. That costs least, but everything behind the
// request waits for it. So it does with small reads and writes, when they are usually done in less time than it takes
// to give them away, or when nothing is behind them.
func (t *transmission) quick(r request) bool {
	switch {
	case r.command != cmdRead && r.command != cmdWrite, r.fua(), r.length > inlineLimit:
		return false
	case t.pace.fast():
		return true
	default:
		return t.in.Buffered() <= r.payload() && !t.crew.atWork()
	}
}

// handle carries a quick request out in the buffers of the connection.
func (t *transmission) handle(r request) error {
	data, err := t.peek(r.payload())
	if err != nil {
		return err
	}
	reply := t.reserve(r.answer())
	if r.command == cmdRead {
		data = reply[simpleReplySize:]
	}
	fault := t.apply(r, data)
	if fault != errnoNone {
		t.batch = t.batch[:len(t.batch)-r.answer()] // an error carries no data
	}
	putReplyHeader(reply, r.cookie, fault)
	_, err = t.in.Discard(r.payload())
	return err
}

// delegate gives the request to a worker, after it has received the payload.
func (t *transmission) delegate(r request) error {
	n := max(r.payload(), r.answer())
	w := t.crew.tryTake(n)
	if w == nil {
		t.flush()
		w = t.crew.take(n)
	}
	w.request = r
	if r.payload() > t.in.Buffered() {
		t.flush()
	}
	if _, err := io.ReadFull(t.in, w.buffer.payload(r.payload())); err != nil {
		t.crew.release(w)
		return dropped(err)
	}
	w.start <- struct{}{}
	return nil
}

// carryOut is what a worker does with a request.
func (t *transmission) carryOut(w *worker) {
	n := w.answer()
	fault := t.apply(w.request, w.buffer.payload(w.size))
	if fault != errnoNone {
		n = 0
	}
	reply := w.buffer.reply(n)
	putReplyHeader(reply, w.cookie, fault)
	t.out.send(reply)
}

// apply lets the backend carry out a request. data is its payload, or the place for that of its reply.
func (t *transmission) apply(r request, data []byte) errno {
	off, n := int64(r.offset), int64(r.length)
	begin := time.Now()
	var err error
	switch {
	case r.command == cmdFlush:
		return errnoOf(t.backend.Flush())
	case n == 0: // leaves it to the server what to do; there is nothing to do
	case r.command == cmdRead:
		var read int
		if read, err = t.backend.ReadAt(data, off); read == len(data) {
			err = nil // io.ReaderAt may report io.EOF with the last byte
		}
	case r.command == cmdWrite:
		_, err = t.backend.WriteAt(data, off)
	case r.command == cmdTrim:
		err = t.backend.Discard(off, n)
	case r.command == cmdWriteZeroes:
		err = t.backend.WriteZeroes(off, n, r.flags&commandNoHole == 0)
	}
	if n <= inlineLimit && (r.command == cmdRead || r.command == cmdWrite) {
		t.pace.add(time.Since(begin))
	}
	if err == nil && r.fua() && r.command != cmdRead {
		err = t.backend.Flush()
	}
	return errnoOf(err)
}

// reserve makes room for a reply header and n bytes in the batch.
func (t *transmission) reserve(n int) []byte {
	if len(t.batch)+simpleReplySize+n > cap(t.batch) {
		t.flush()
	}
	begin := len(t.batch)
	t.batch = t.batch[:begin+simpleReplySize+n]
	return t.batch[begin:]
}

// flush sends the batch. The receiver does so before it waits for anything.
func (t *transmission) flush() {
	if len(t.batch) > 0 {
		t.out.send(t.batch)
		t.batch = t.batch[:0]
	}
}
