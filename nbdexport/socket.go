package nbdexport

import (
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// socket is a link over a unix socket in blocking mode. Waiting in the system call itself, instead of in the runtime's
// poller, saves two system calls and two switches of goroutines for each time there is nothing to read, which at a
// depth of 1 is each request. It costs a thread while the connection lasts.
type socket struct {
	fd   int
	busy bool // the last read found something without waiting

	splicing atomic.Int32 // replies that are being spliced

	mu     sync.Mutex // keeps fd from being closed, and its number from being used again, while it is shut down
	closed bool
}

// sendBuffer is how many bytes of replies may wait for a client that does not take them at once.
const sendBuffer = 2 << 20

// takeSocket takes conn over, or returns nil and leaves it as it is.
func takeSocket(conn *net.UnixConn) *socket {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil
	}
	fd := -1
	if raw.Control(func(original uintptr) {
		if fd, err = unix.FcntlInt(original, unix.F_DUPFD_CLOEXEC, 0); err == nil {
			err = unix.SetNonblock(fd, false)
		}
	}) != nil || err != nil {
		if fd >= 0 {
			_ = unix.Close(fd) // conn goes on
		}
		return nil
	}
	// Without room for a long reply, server and client wait for each other several times in the middle of it. This needs a privilege; without
	// it the room stays what it is.
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, sendBuffer)
	_ = conn.Close() // out of the poller; the socket itself has fd
	return &socket{fd: fd}
}

func (s *socket) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	n, err := 0, error(unix.EAGAIN)
	if s.busy {
		n, err = s.look(p)
	}
	begin := monotonic()
	for err == unix.EAGAIN || err == unix.EINTR { //nolint:errorlint // a system call returns its number as it is
		n, err = unix.Read(s.fd, p)
	}
	s.busy = monotonic()-begin < atOnce
	switch {
	case err != nil:
		return 0, os.NewSyscallError("read", err)
	case n == 0:
		return 0, io.EOF
	}
	return n, nil
}

// atOnce is the time that a read takes at most which has not waited.
const atOnce = 5 * time.Microsecond

// look reads without waiting, and so without telling the scheduler, which would give the processor to another goroutine. EAGAIN says that there is
// nothing to read.
func (s *socket) look(p []byte) (int, error) {
	n, _, errno := unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(s.fd),
		uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)), unix.MSG_DONTWAIT, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

// Write writes all of p.
func (s *socket) Write(p []byte) (n int, err error) { return s.send(p, 0) }

func (s *socket) send(p []byte, flags int) (n int, err error) {
	for n < len(p) {
		k, err := unix.SendmsgN(s.fd, p[n:], nil, nil, unix.MSG_NOSIGNAL|flags)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return n, os.NewSyscallError("sendmsg", err)
		}
		n += k
	}
	return n, nil
}

// splice writes header and the n bytes in the pipe.
func (s *socket) splice(header []byte, p *pipe, n int) error {
	if _, err := s.send(header, unix.MSG_MORE); err != nil {
		return err
	}
	for n > 0 {
		moved, err := unix.Splice(p.out, nil, s.fd, nil, n, unix.SPLICE_F_MOVE)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return os.NewSyscallError("splice", err)
		case moved == 0:
			return io.ErrUnexpectedEOF
		default:
			n -= int(moved)
		}
	}
	return nil
}

// hangUp stops receiving. The client can't send any more, but what it has sent arrives.
func (s *socket) hangUp() { s.shutdown(unix.SHUT_RD) }

// linger gives the client a little time to take its last replies. Closing a unix socket takes none away; but what was spliced should have been
// taken before it is forgotten.
func (s *socket) linger() {
	for begin := monotonic(); s.unread() && monotonic()-begin < lingerTime; time.Sleep(time.Millisecond) {
	}
}

// unread reports whether the client has not taken all that was sent to it, or is being sent.
func (s *socket) unread() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.splicing.Load() > 0 {
		return true
	}
	if s.closed {
		return false
	}
	n, err := unix.IoctlGetInt(s.fd, unix.SIOCOUTQ)
	return err != nil || n > 0
}

func (s *socket) abort() { s.shutdown(unix.SHUT_RDWR) }

func (s *socket) shutdown(how int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		_ = unix.Shutdown(s.fd, how) // fails only if the client is gone
	}
}

// Close is called when nobody reads or writes any more.
func (s *socket) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	return os.NewSyscallError("close", unix.Close(s.fd))
}
