package nbdexport

import (
	"bufio"
	"bytes"
	"io"
	"sync"
)

// connection is what a server knows of a connection that it may have to end.
type connection struct {
	mu      sync.Mutex
	link    link
	aborted bool
}

// become makes l what abort ends: the same connection in another form.
func (c *connection) become(l link) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.link = l; c.aborted {
		l.abort()
	}
}

// abort ends the connection at once.
func (c *connection) abort() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.aborted = true
	c.link.abort()
}

// resume returns a reader of l that begins with what in has received already.
func resume(in *bufio.Reader, l link) *bufio.Reader {
	if in.Buffered() == 0 {
		in.Reset(l)
		return in
	}
	ahead, _ := in.Peek(in.Buffered()) // it is there
	in.Reset(io.MultiReader(bytes.NewReader(bytes.Clone(ahead)), l))
	return in
}
