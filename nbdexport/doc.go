// Package nbdexport is an NBD server: it makes anything that is a [Backend] available to the clients of the Network
// Block Device protocol, the kernel's among them. It knows nothing of images but for [NewImageBackend].
//
// # Concepts
//
// An [Export] is a backend under a name. A [Server] offers exports to clients that connect to its listeners. A
// connection has two phases. In the handshake (fixed newstyle, with every option of the specification) client and
// server may agree on TLS, on the form of replies (simple, structured, extended) and on metadata contexts, and the
// client chooses an export. In the transmission phase it sends requests (READ, WRITE, FLUSH, TRIM, CACHE, WRITE_ZEROES,
// BLOCK_STATUS, DISC), which are answered in any order. The kernel's client, when it is set up by netlink, skips the
// first: [ServeTransmission] is the second alone, and [TransmissionFlags] says what the client would have learned.
//
// The specification is doc/proto.md of github.com/NetworkBlockDevice/nbd, with its branch extension-ext-header for
// extended headers; comments here name its sections and constants. Left out are the oldstyle negotiation and what is
// experimental beyond extended headers (RESIZE).
//
// # Invariants
//
//   - When Serve, ServeConn or ServeTransmission returns, no request that came in by it touches the backend any more,
//     and its connection is closed. Who wants to close a backend, or serve it to a new connection in place of a dead
//     one, relies on this.
//   - A write reaches the backend only when its payload has arrived whole. A client that disconnects in the middle of
//     one has changed nothing.
//   - A request reaches the backend only when it lies inside of the export, is aligned to its minimum block, moves at
//     most MaxPayload, and, if it changes anything, only when the export is writable.
//   - A reply, or a chunk of one, is sent whole or the connection is closed. An error never carries data, and a read that
//     failed sends none.
//   - A reply to FLUSH, or to a request with FUA, is sent after the backend has made durable what it is about.
//   - Where TLS is demanded, a client without it learns nothing: not even which exports there are. Nothing that was received
//     or agreed on before TLS counts afterwards.
//   - What one connection holds is bounded: two buffers of 128 KiB, 16 workers, 32 MiB of buffers for payloads, 8 MiB of
//     what else requests need, and in the kernel what waits in its socket. A client that takes no replies blocks itself
//     only. The handshake is bounded in time, in the number of options and in their size.
//   - Clients are told of errors by number and a fixed text, never of the server's files.
//
// # How a connection works
//
// The receiver, a goroutine, reads ahead into one buffer, checks each request, and carries small reads and writes out
// by itself: writes from the receive buffer, reads into the buffer of replies, which is sent when nothing is left to
// do. Many requests cost one system call to receive and one to answer this way. Whatever may take long (flushes, FUA,
// trims, zeroes, more than 64 KiB) goes to the crew, up to 16 workers, and so do all requests that have others behind
// them when the backend has been slow lately. Nothing is allocated for a request.
//
// Over a unix socket the receiver waits in the system call itself ([socket]), which saves the runtime's poller at each
// turn. A program with several connections does well to let more goroutines run than there are processors (GOMAXPROCS):
// those that come back from a system call are then shared out by the kernel. Data of 32 KiB and more goes from the page
// cache to the socket without being copied ([pipe]): all of it is in a pipe before the reply begins, so that an error
// still becomes a reply. A client that discards, or overwrites, what it is reading at the same moment may see either.
//
// A client that understands chunks gets no zeroes that the backend knows of: they are described as holes.
//
// # Locks
//
// Server.mu guards the set of connections. Of a connection, crew.mu guards the idle workers, sender.mu makes replies
// whole (it is held while a reply is sent, which lasts as long as the client takes to receive it), and connection.mu and
// socket.mu guard its end. None is held while another is taken, but for socket.mu under the others, nor while the
// backend is called.
package nbdexport
