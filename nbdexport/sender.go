package nbdexport

import (
	"encoding/binary"
	"net"
	"sync"
	"sync/atomic"
)

// sender sends whole replies, one at a time.
type sender struct {
	conn net.Conn

	mu     sync.Mutex
	err    error       // of the first reply that could not be sent; no other was sent after it
	failed atomic.Bool // there is such a reply
}

// send sends whole replies. When that fails it closes the connection, so that a receiver that waits takes notice.
func (s *sender) send(replies []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return
	}
	if _, s.err = s.conn.Write(replies); s.err != nil {
		s.failed.Store(true)
		s.conn.Close()
	}
}

// putReplyHeader writes the header of a simple reply to the start of b.
func putReplyHeader(b []byte, cookie uint64, fault errno) {
	binary.BigEndian.PutUint32(b, magicSimpleReply)
	binary.BigEndian.PutUint32(b[4:], uint32(fault))
	binary.BigEndian.PutUint64(b[8:], cookie)
}
