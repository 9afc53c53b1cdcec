package nbdtest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"testing"
	"time"
)

// Client is one end of a connection to a server. Its methods fail the test when the connection breaks or when the
// server sends what the protocol does not allow; what the server may answer, errors included, they return.
//
// A client is used by one goroutine at a time.
type Client struct {
	net.Conn
	Ledger
	tb     testing.TB
	cookie uint64
}

// NewClient returns a client for the connection, which it closes at the end of the test.
func NewClient(tb testing.TB, conn net.Conn) *Client {
	tb.Helper()
	tb.Cleanup(func() { _ = conn.Close() })
	return &Client{Conn: conn, tb: tb}
}

// Dial connects to a listening server.
func Dial(tb testing.TB, addr net.Addr) *Client {
	tb.Helper()
	conn, err := net.Dial(addr.Network(), addr.String())
	if err != nil {
		tb.Fatal(err)
	}
	return NewClient(tb, conn)
}

// Send sends the numbers, in network order, and strings and slices of bytes as they are.
func (c *Client) Send(parts ...any) {
	c.tb.Helper()
	if _, err := c.Write(Message(parts...)); err != nil {
		c.tb.Fatalf("send: %v", err)
	}
}

// Message puts fixed-size numbers, in network order, strings and slices of bytes together.
func Message(parts ...any) []byte {
	var b bytes.Buffer
	for _, part := range parts {
		if s, ok := part.(string); ok {
			part = []byte(s)
		}
		if err := binary.Write(&b, binary.BigEndian, part); err != nil {
			panic(fmt.Sprintf("nbdtest.Message: %T: %v", part, err))
		}
	}
	return b.Bytes()
}

// patience is how long a server may take to answer. Tests that wait for nothing fail instead of hanging.
const patience = 20 * time.Second

// expecting limits how long the next receiving may take.
func (c *Client) expecting() {
	_ = c.SetReadDeadline(time.Now().Add(patience)) // fails only if the connection has ended, and then nothing waits
}

// Receive returns the next n bytes.
func (c *Client) Receive(n int) []byte {
	c.tb.Helper()
	c.expecting()
	b := make([]byte, n)
	if got, err := io.ReadFull(c, b); err != nil {
		c.tb.Fatalf("receive: %d of %d bytes, then %v", got, n, err)
	}
	return b
}

// ReceiveEnd fails the test unless the server closes the connection without sending anything more.
func (c *Client) ReceiveEnd() {
	c.tb.Helper()
	c.expecting()
	var b [1]byte
	if n, err := c.Read(b[:]); n != 0 || err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		c.tb.Fatalf("received byte %#x (%v), want the end of the connection", b[0], err)
	}
}

// Greet receives the greeting of a fixed newstyle server and answers it with the client flags. It returns the
// handshake flags.
func (c *Client) Greet(flags uint32) uint16 {
	c.tb.Helper()
	greeting := c.Receive(18)
	if string(greeting[:16]) != "NBDMAGICIHAVEOPT" {
		c.tb.Fatalf("greeting %q", greeting)
	}
	c.Send(flags)
	return binary.BigEndian.Uint16(greeting[16:])
}

// SendOption sends an option with its data.
func (c *Client) SendOption(option uint32, data ...any) {
	c.tb.Helper()
	d := Message(data...)
	c.Send(uint64(OptionMagic), option, uint32(len(d)), d)
}

// OptionReply is one reply to an option.
type OptionReply struct {
	Type uint32
	Data []byte
}

// ReceiveOptionReplies returns the replies to an option up to the final one, an acknowledgement or an error.
func (c *Client) ReceiveOptionReplies(option uint32) []OptionReply {
	c.tb.Helper()
	var replies []OptionReply
	for {
		header := c.Receive(20)
		magic, to := binary.BigEndian.Uint64(header), binary.BigEndian.Uint32(header[8:])
		r := OptionReply{Type: binary.BigEndian.Uint32(header[12:])}
		length := binary.BigEndian.Uint32(header[16:])
		if magic != OptionReplyMagic || to != option || length > 1<<20 {
			c.tb.Fatalf("reply header % x to option %d", header, option)
		}
		r.Data = c.Receive(int(length))
		replies = append(replies, r)
		if r.Type == RepAck || r.Type >= 1<<31 {
			return replies
		}
	}
}

// Export is what a server says of an export.
type Export struct {
	Size  uint64
	Flags uint16
	Infos map[uint16][]byte // the other items of information, by type
}

// InfoRequest is the data of OptInfo and OptGo.
func InfoRequest(name string, items ...uint16) []byte {
	return Message(uint32(len(name)), name, uint16(len(items)), items)
}

// Info asks for a description of an export, with OptInfo or OptGo. It returns the type of the final reply, too.
func (c *Client) Info(option uint32, name string, items ...uint16) (Export, uint32) {
	c.tb.Helper()
	c.SendOption(option, InfoRequest(name, items...))
	e := Export{Infos: make(map[uint16][]byte)}
	replies := c.ReceiveOptionReplies(option)
	final := replies[len(replies)-1]
	for _, r := range replies[:len(replies)-1] {
		if r.Type != RepInfo || len(r.Data) < 2 {
			c.tb.Fatalf("reply %+v to option %d", r, option)
		}
		item, payload := binary.BigEndian.Uint16(r.Data), r.Data[2:]
		if item != InfoExport {
			e.Infos[item] = payload
			continue
		}
		if len(payload) != 10 {
			c.tb.Fatalf("export described in %d bytes", len(payload))
		}
		e.Size, e.Flags = binary.BigEndian.Uint64(payload), binary.BigEndian.Uint16(payload[8:])
	}
	if final.Type == RepAck && e.Flags == 0 {
		c.tb.Fatal("acknowledged without a description of the export")
	}
	return e, final.Type
}

// Go negotiates from the greeting up to the transmission phase.
func (c *Client) Go(name string) Export {
	c.tb.Helper()
	return c.GoIn(Simple, name)
}

// GoIn is Go with a style, and with metadata contexts.
func (c *Client) GoIn(s Style, name string, contexts ...string) Export {
	c.tb.Helper()
	c.Greet(3)
	c.Agree(s)
	if len(contexts) > 0 {
		c.SetContexts(name, contexts...)
	}
	return c.Choose(name)
}

// Choose enters the transmission phase.
func (c *Client) Choose(name string) Export {
	c.tb.Helper()
	e, final := c.Info(OptGo, name, InfoBlockSize)
	if final != RepAck {
		c.tb.Fatalf("export %q: reply %#x", name, final)
	}
	if sizes := e.Infos[InfoBlockSize]; len(sizes) == 12 {
		c.Block = uint64(binary.BigEndian.Uint32(sizes))
	}
	return e
}

// Post sends requests to which replies are due.
func (c *Client) Post(requests ...Request) {
	c.tb.Helper()
	var b []byte
	for _, r := range requests {
		c.Expect(r)
		b = append(b, r.EncodeIn(c.Style)...)
	}
	c.Send(b)
}

// Await returns the next reply that is whole.
func (c *Client) Await() *Reply {
	c.tb.Helper()
	c.expecting()
	reply, err := c.Ledger.Await(c)
	if err != nil {
		c.tb.Fatal(err)
	}
	return reply
}

// Exchange sends one request and waits for its reply. It sets the cookie.
func (c *Client) Exchange(r Request) *Reply {
	c.tb.Helper()
	c.cookie++
	r.Cookie = c.cookie
	c.Post(r)
	reply := c.Await()
	if reply.Cookie != r.Cookie {
		c.tb.Fatalf("reply to %d, want one to %d", reply.Cookie, r.Cookie)
	}
	return reply
}

// Do is Exchange for who wants the data only.
func (c *Client) Do(r Request) ([]byte, error) {
	c.tb.Helper()
	reply := c.Exchange(r)
	return reply.Data, reply.Err
}

// ReadBytes reads n bytes at off.
func (c *Client) ReadBytes(off uint64, n int) ([]byte, error) {
	c.tb.Helper()
	return c.Do(Request{Command: CmdRead, Offset: off, Length: uint64(n)})
}

// WriteBytes writes p at off.
func (c *Client) WriteBytes(off uint64, p []byte) error {
	c.tb.Helper()
	_, err := c.Do(Request{Command: CmdWrite, Offset: off, Length: uint64(len(p)), Payload: p})
	return err
}

// Disconnect says goodbye and waits until the server has closed the connection.
func (c *Client) Disconnect() {
	c.tb.Helper()
	c.Send(Request{Command: CmdDisc}.EncodeIn(c.Style))
	c.ReceiveEnd()
}
