package nbdexport

import (
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"
	"time"
)

// link is what the transmission phase needs of a connection. Reading and writing may happen at the same time, and the
// other methods but Close at any time.
type link interface {
	io.ReadWriteCloser
	// hangUp stops receiving: reading ends, and what has arrived may still be read.
	hangUp()
	// linger ends the sending side and waits a little for the client to end the other. A connection that is closed
	// while the client sends is reset, and then the last replies may be lost on their way.
	linger()
	// abort ends the connection at once: what is read or written at the moment fails.
	abort()
}

// lingerTime is how long a client that is sending may take to notice that nobody reads.
const lingerTime = time.Second

// longAgo is a deadline that is over.
var longAgo = time.Unix(1, 0)

// newLink takes conn over, of which nobody is reading or writing.
func newLink(conn net.Conn) link {
	if unix, ok := conn.(*net.UnixConn); ok {
		if s := takeSocket(unix); s != nil {
			return s
		}
	}
	return stream{conn}
}

// stream is a link over any kind of connection.
type stream struct{ net.Conn }

func (s stream) hangUp() { _ = s.SetReadDeadline(longAgo) } // fails only if it is closed

func (s stream) linger() {
	c, ok := s.Conn.(interface{ CloseWrite() error })
	if !ok || c.CloseWrite() != nil {
		return
	}
	if s.SetReadDeadline(time.Now().Add(lingerTime)) == nil {
		_, _ = io.Copy(io.Discard, s.Conn)
	}
}

func (s stream) abort() {
	// A TLS connection would first want to say goodbye.
	if c, ok := s.Conn.(interface{ NetConn() net.Conn }); ok {
		c.NetConn().Close()
		return
	}
	s.Conn.Close()
}

// dropped gives the error of a connection that the other end has closed or lost the class ErrDropped.
func dropped(err error) error {
	for _, gone := range []error{
		io.EOF, io.ErrUnexpectedEOF, io.ErrClosedPipe,
		syscall.ECONNRESET, syscall.EPIPE, syscall.ETIMEDOUT,
	} {
		if errors.Is(err, gone) {
			return fmt.Errorf("%w: %w", ErrDropped, err)
		}
	}
	return err
}
