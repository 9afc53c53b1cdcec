package nbdexport

import (
	"sync"
	"sync/atomic"
)

// sender sends whole replies, one at a time.
type sender struct {
	link link

	mu     sync.Mutex
	err    error       // of the first reply that could not be sent; no other was sent after it
	failed atomic.Bool // there is such a reply
}

// send sends whole replies. When that fails it ends the connection, so that a receiver that waits takes notice.
func (s *sender) send(replies []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return
	}
	if _, s.err = s.link.Write(replies); s.err != nil {
		s.failed.Store(true)
		s.link.abort()
	}
}

// sendSpliced sends a reply whose last n bytes are in the pipe, which it takes over.
func (s *sender) sendSpliced(header []byte, p *pipe, n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil {
		s.err = s.link.(*socket).splice(header, p, n)
	}
	if s.err != nil {
		s.failed.Store(true)
		s.link.abort()
		p.close()
		return
	}
	p.recycle()
}
