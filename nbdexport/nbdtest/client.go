package nbdtest

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"syscall"
	"testing"
)

// Client is one end of a connection to a server. Its methods fail the test when the connection breaks or when the
// server sends what the protocol does not allow; what the server may answer, errors included, they return.
//
// A client is used by one goroutine at a time.
type Client struct {
	net.Conn
	tb     testing.TB
	cookie uint64
}

// Numbers of the protocol, for tests that build messages themselves.
const (
	OptExportName = 1
	OptAbort      = 2
	OptList       = 3
	OptStartTLS   = 5
	OptInfo       = 6
	OptGo         = 7

	RepAck        = 1
	RepServer     = 2
	RepInfo       = 3
	RepErrUnsup   = 1<<31 | 1
	RepErrInvalid = 1<<31 | 3
	RepErrUnknown = 1<<31 | 6
	RepErrTooBig  = 1<<31 | 9

	InfoExport      = 0
	InfoName        = 1
	InfoDescription = 2
	InfoBlockSize   = 3

	CmdRead        = 0
	CmdWrite       = 1
	CmdDisc        = 2
	CmdFlush       = 3
	CmdTrim        = 4
	CmdCache       = 5
	CmdWriteZeroes = 6
	CmdBlockStatus = 7

	FlagFUA    = 1 << 0
	FlagNoHole = 1 << 1
	FlagDF     = 1 << 2

	RequestMagic = 0x25609513
	OptionMagic  = 0x49484156454F5054
)

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

// Receive returns the next n bytes.
func (c *Client) Receive(n int) []byte {
	c.tb.Helper()
	b := make([]byte, n)
	if got, err := io.ReadFull(c, b); err != nil {
		c.tb.Fatalf("receive: %d of %d bytes, then %v", got, n, err)
	}
	return b
}

// ReceiveEnd fails the test unless the server closes the connection without sending anything more.
func (c *Client) ReceiveEnd() {
	c.tb.Helper()
	var b [1]byte
	if n, err := c.Read(b[:]); n != 0 || err == nil {
		c.tb.Fatalf("received byte %#x, want the end of the connection", b[0])
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
		if magic != 0x3e889045565a9 || to != option || length > 1<<20 {
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
	c.Greet(3)
	e, final := c.Info(OptGo, name, InfoBlockSize)
	if final != RepAck {
		c.tb.Fatalf("export %q: reply %#x", name, final)
	}
	return e
}

// Request is a request as it goes over the wire. The zero value of Magic stands for the right one.
type Request struct {
	Magic   uint32
	Flags   uint16
	Command uint16
	Cookie  uint64
	Offset  uint64
	Length  uint32
	Payload []byte
}

// Encode returns the bytes of the request.
func (r Request) Encode() []byte {
	magic := r.Magic
	if magic == 0 {
		magic = RequestMagic
	}
	return Message(magic, r.Flags, r.Command, r.Cookie, r.Offset, r.Length, r.Payload)
}

// ReceiveReply returns the cookie and the error of the next reply, and the data that follows unless there is an
// error. The number of bytes depends on the request, so the caller says it for the cookie.
func (c *Client) ReceiveReply(length func(cookie uint64) int) (cookie uint64, data []byte, err error) {
	c.tb.Helper()
	header := c.Receive(16)
	if magic := binary.BigEndian.Uint32(header); magic != 0x67446698 {
		c.tb.Fatalf("reply header % x", header)
	}
	cookie = binary.BigEndian.Uint64(header[8:])
	if number := binary.BigEndian.Uint32(header[4:]); number != 0 {
		return cookie, nil, syscall.Errno(number)
	}
	return cookie, c.Receive(length(cookie)), nil
}

// Do sends one request and waits for its reply. It sets the cookie.
func (c *Client) Do(r Request) ([]byte, error) {
	c.tb.Helper()
	c.cookie++
	r.Cookie = c.cookie
	c.Send(r.Encode())
	cookie, data, err := c.ReceiveReply(func(uint64) int {
		if r.Command == CmdRead {
			return int(r.Length)
		}
		return 0
	})
	if cookie != r.Cookie {
		c.tb.Fatalf("reply to %d, want one to %d", cookie, r.Cookie)
	}
	return data, err
}

// ReadBytes reads n bytes at off.
func (c *Client) ReadBytes(off uint64, n int) ([]byte, error) {
	c.tb.Helper()
	return c.Do(Request{Command: CmdRead, Offset: off, Length: uint32(n)})
}

// WriteBytes writes p at off.
func (c *Client) WriteBytes(off uint64, p []byte) error {
	c.tb.Helper()
	_, err := c.Do(Request{Command: CmdWrite, Offset: off, Length: uint32(len(p)), Payload: p})
	return err
}

// Disconnect says goodbye and waits until the server has closed the connection.
func (c *Client) Disconnect() {
	c.tb.Helper()
	c.Send(Request{Command: CmdDisc}.Encode())
	c.ReceiveEnd()
}
