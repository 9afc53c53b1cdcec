package nbdexport

import (
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"
	"time"
)

// longAgo is a deadline that is over.
var longAgo = time.Unix(1, 0)

// lingerTime is how long a client that is sending may take to notice that nobody reads.
const lingerTime = time.Second

// hangUp stops receiving from conn. On a unix socket the client cannot send any more, but what it has sent arrives;
// elsewhere what has been received is all.
func hangUp(conn net.Conn) {
	if unix, ok := conn.(*net.UnixConn); ok && unix.CloseRead() == nil {
		return
	}
	_ = conn.SetReadDeadline(longAgo) // fails only if conn is closed
}

// linger ends the sending side of conn and waits a little for the client to end the other. A connection that is
// closed while the client sends is reset, and then the last replies may be lost on their way.
func linger(conn net.Conn) {
	c, ok := conn.(interface{ CloseWrite() error })
	if !ok || c.CloseWrite() != nil {
		return
	}
	if conn.SetReadDeadline(time.Now().Add(lingerTime)) == nil {
		_, _ = io.Copy(io.Discard, conn)
	}
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
