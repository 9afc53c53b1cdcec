// Package nbdexport is an NBD server: it makes anything that is a [Backend] available to the clients of the Network
// Block Device protocol, the kernel's among them. It knows nothing of images but for [NewImageBackend].
//
// # Concepts
//
// An [Export] is a backend under a name. A [Server] offers exports to clients that connect to its listeners. A
// connection has two phases: in the handshake (fixed newstyle; NBD_OPT_EXPORT_NAME, ABORT, LIST, INFO and GO) the
// client chooses an export, in the transmission phase it sends requests (NBD_CMD_READ, WRITE, FLUSH, TRIM,
// WRITE_ZEROES and DISC), which are answered in any order by simple replies. The kernel's client, when it is set up
// by netlink, skips the first: [ServeTransmission] is the second alone, and [TransmissionFlags] says what the client
// would have learned.
//
// The specification is doc/proto.md of github.com/NetworkBlockDevice/nbd; comments here name its sections and
// constants.
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
//   - A reply is sent whole or the connection is closed. An error never carries data, and a read that failed sends
//     none.
//   - A reply to FLUSH, or to a request with FUA, is sent after the backend's Flush has returned.
//   - What one connection holds is bounded: two buffers of 128 KiB, 16 workers, 32 MiB of payloads. A client that
//     takes no replies blocks itself only. The handshake is bounded in time, in the number of options and in their
//     size.
//
// # How a connection works
//
// The receiver, a goroutine, reads ahead into one buffer, checks each request, and carries small reads and writes out
// by itself: writes from the receive buffer, reads into the buffer of replies, which is sent when nothing is left to
// do. Many requests cost one system call to receive and one to answer this way. Whatever may take long (flushes, FUA,
// trims, zeroes, more than 64 KiB) goes to the crew, up to 16 workers, and so do all requests that have others behind
// them when the backend has been slow lately. Nothing is allocated for a request.
//
// Measured with fio on a file in the page cache, this needs half of the processor time that workers for every request
// need at a depth of 16, and with a backend that takes 1 ms for a read it is as fast as they are.
//
// # Locks
//
// Server.mu guards the set of connections. Of a connection, crew.mu guards the idle workers and sender.mu makes
// replies whole: it is held while a reply is sent, which lasts as long as the client takes to receive it. None is
// held while another is taken or while the backend is called.
package nbdexport
