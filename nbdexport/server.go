package nbdexport

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync"
	"syscall"
	"time"
)

var (
	// ErrProtocol: the other end broke the protocol, and the connection was closed.
	ErrProtocol = errors.New("protocol violation")
	// ErrDropped: the other end closed the connection, or lost it, without saying goodbye (NBD_CMD_DISC).
	ErrDropped = errors.New("connection dropped")
	// ErrUnknownExport: the client asked for an export that there is not, in the way that leaves no other answer than
	// hanging up.
	ErrUnknownExport = errors.New("no such export")
	// ErrServerClosed: the server has been told to stop.
	ErrServerClosed = errors.New("server is closed")
)

// Config says what a server offers, and its limits.
type Config struct {
	// Exports have unique names. The first is the default: a client that asks for the empty name gets it, unless
	// another one bears the empty name.
	Exports []Export
	// MaxConnections is the number of clients that are served at a time over all listeners; 0 means 64. Further ones
	// wait in the backlog of the listener.
	MaxConnections int
	// TLS, if set, makes clients use TLS: without it they learn nothing and get nothing. With ClientAuth and ClientCAs in
	// it they need a certificate. It needs a certificate of the server, and at least TLS 1.2 is asked for in any case.
	TLS *tls.Config
	// TLSOptional leaves it to the clients whether they use TLS.
	TLSOptional bool
	// HandshakeTimeout is how long a client may take to choose an export; 0 means 10 s.
	HandshakeTimeout time.Duration
	// Disconnected, if set, is told of every connection that has ended. It is called concurrently, and Serve and
	// Shutdown wait for it to return.
	Disconnected func(Disconnect)
}

// Disconnect describes the end of a connection.
type Disconnect struct {
	Peer      net.Addr
	Export    string // the name of the export that the client chose
	Chosen    bool   // the client chose an export
	Remaining int    // connections that the server still has
	Err       error  // what ServeConn returns
}

// Server serves exports to clients that negotiate which one they want. Its methods may be called concurrently.
type Server struct {
	exports          exports
	security         security
	handshakeTimeout time.Duration
	disconnected     func(Disconnect)
	slots            chan struct{} // one element per connection that came from a listener

	stopping context.Context // done once the server has been told to stop
	stop     context.CancelFunc
	serving  sync.WaitGroup // calls of Serve and ServeConn; none is added once stopping is done

	mu    sync.Mutex // guards conns, and that nothing begins after stop
	conns map[*connection]struct{}
}

// NewServer returns a server for the exports of c. It fails when a name is used twice or is too long, when a backend
// describes itself in a way that the specification does not allow, and when a limit is negative.
func NewServer(c Config) (*Server, error) {
	es, err := newExports(c.Exports)
	if err != nil {
		return nil, err
	}
	if c.MaxConnections < 0 || c.HandshakeTimeout < 0 {
		return nil, fmt.Errorf("negative limits: %d connections, %v for a handshake", c.MaxConnections, c.HandshakeTimeout)
	}
	if c.MaxConnections == 0 {
		c.MaxConnections = 64
	}
	if c.HandshakeTimeout == 0 {
		c.HandshakeTimeout = 10 * time.Second
	}
	if c.Disconnected == nil {
		c.Disconnected = func(Disconnect) {}
	}
	if c.TLS != nil {
		c.TLS = c.TLS.Clone()
		c.TLS.MinVersion = max(c.TLS.MinVersion, tls.VersionTLS12)
		if len(c.TLS.Certificates) == 0 && c.TLS.GetCertificate == nil && c.TLS.GetConfigForClient == nil {
			return nil, errors.New("TLS without a certificate of the server")
		}
	}
	s := &Server{
		exports:          es,
		security:         security{c.TLS, c.TLSOptional},
		handshakeTimeout: c.HandshakeTimeout,
		disconnected:     c.Disconnected,
		slots:            make(chan struct{}, c.MaxConnections),
		conns:            make(map[*connection]struct{}),
	}
	s.stopping, s.stop = context.WithCancel(context.Background())
	return s, nil
}

// Serve accepts clients from l and serves them until ctx is done or the server is told to stop; then it returns nil,
// after every connection has ended as described at ServeTransmission. When accepting fails for good it returns why,
// after its clients have left. It closes l. A server that has been told before returns at once.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	ctx, end, err := s.begin(ctx, nil)
	if err != nil {
		return l.Close()
	}
	defer end()
	unwatch := context.AfterFunc(ctx, func() { l.Close() }) // wakes Accept, which then reports nothing of interest
	defer l.Close()
	defer unwatch()

	var clients sync.WaitGroup
	defer clients.Wait()
	for {
		select {
		case s.slots <- struct{}{}:
		case <-ctx.Done():
			return nil
		}
		conn, err := accept(ctx, l)
		if err != nil {
			<-s.slots
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("accept: %w", err)
		}
		clients.Go(func() {
			defer func() { <-s.slots }()
			_ = s.ServeConn(ctx, conn) // Disconnected is told
		})
	}
}

// accept takes the next connection. It waits where the machine is short of something that may come back.
func accept(ctx context.Context, l net.Listener) (net.Conn, error) {
	const pause = 100 * time.Millisecond
	for {
		conn, err := l.Accept()
		if err == nil || !isTransient(err) {
			return conn, err
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil, err
		}
	}
}

// ServeConn negotiates with the client at the other end of conn and serves it. It returns, and closes conn, as
// ServeTransmission does; a client that leaves in the handshake in the way the protocol has for that is no error
// either.
func (s *Server) ServeConn(ctx context.Context, conn net.Conn) error {
	c := &connection{link: stream{conn}}
	ctx, end, err := s.begin(ctx, c)
	if err != nil {
		return errors.Join(err, conn.Close())
	}
	defer end()

	peer := conn.RemoteAddr()
	in := bufio.NewReaderSize(conn, receiveBuffer)
	chosen, conn, err := s.negotiate(ctx, conn, in)
	if err == nil {
		l := newLink(conn)
		c.become(l)
		err = serveTransmission(ctx, l, resume(in, l), chosen)
	} else {
		conn.Close()
		if errors.Is(err, errAborted) {
			err = nil
		}
	}
	s.mu.Lock()
	delete(s.conns, c)
	d := Disconnect{Peer: peer, Remaining: len(s.conns), Err: err}
	s.mu.Unlock()
	if chosen != nil {
		d.Chosen, d.Export = true, chosen.export.Name
	}
	s.disconnected(d)
	return err
}

// begin registers a call of Serve or, with a connection, of ServeConn. The context it returns is done when ctx is and
// when the server has been told to stop.
func (s *Server) begin(ctx context.Context, c *connection) (_ context.Context, end func(), _ error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopping.Err() != nil {
		return nil, nil, ErrServerClosed
	}
	s.serving.Add(1)
	if c != nil {
		s.conns[c] = struct{}{}
	}
	ctx, cancel := context.WithCancel(ctx)
	detach := context.AfterFunc(s.stopping, cancel)
	return ctx, func() { detach(); cancel(); s.serving.Done() }, nil
}

// Shutdown tells the server to stop and waits until every Serve and ServeConn has ended, each connection as described
// at ServeTransmission; then it flushes all exports. When ctx ends first it closes the connections, as Close does,
// and returns the error of ctx: requests may then still be at work in the backends until Serve and ServeConn return.
func (s *Server) Shutdown(ctx context.Context) error {
	s.halt()
	ended := make(chan struct{})
	go func() {
		s.serving.Wait()
		close(ended)
	}()
	select {
	case <-ended:
	case <-ctx.Done():
		return errors.Join(ctx.Err(), s.Close())
	}
	var errs []error
	for _, e := range s.exports {
		if err := e.Backend.Flush(); err != nil {
			errs = append(errs, fmt.Errorf("flush export %q: %w", e.Name, err))
		}
	}
	return errors.Join(errs...)
}

// Close tells the server to stop and ends every connection at once. Requests that are at work are not waited for:
// Serve and ServeConn return when they have ended.
func (s *Server) Close() error {
	s.halt()
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		c.abort()
	}
	return nil
}

// halt makes sure that nothing begins any more, and tells what has begun to end.
func (s *Server) halt() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stop()
}

// negotiate is the handshake under its deadline. The end of ctx ends it at once. It returns the connection to go on with.
func (s *Server) negotiate(ctx context.Context, conn net.Conn, in *bufio.Reader) (*choice, net.Conn, error) {
	if err := conn.SetDeadline(time.Now().Add(s.handshakeTimeout)); err != nil {
		return nil, conn, err
	}
	interrupt := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(longAgo) })
	h := handshake{conn: conn, in: in, exports: s.exports, security: s.security}
	chosen, err := h.negotiate()
	switch {
	case !interrupt():
		return nil, h.conn, ctx.Err()
	case err != nil:
		return nil, h.conn, fmt.Errorf("handshake: %w", err)
	}
	return chosen, h.conn, conn.SetDeadline(time.Time{})
}

// isTransient says whether a connection could not be accepted for a reason that may pass.
func isTransient(err error) bool {
	for _, number := range []syscall.Errno{
		syscall.ECONNABORTED, syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM,
	} {
		if errors.Is(err, number) {
			return true
		}
	}
	return false
}
