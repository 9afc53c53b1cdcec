// Package generator puts load on an NBD server and measures how it answers, at as little cost of its own as a client can
// have: what a benchmark reports is always the server and the client together, and a client that takes a third
// of the processor hides a third of the difference between two servers.
//
// A connection is one thread with a blocking socket. It keeps a fixed number of requests in flight: it takes all that has
// arrived with one read, handles every reply in it, and sends as many new requests with one sendmsg. No goroutine
// waits for another, nothing is allocated for a request, and the data of a read are received into one small buffer,
// over and over, and not looked at. All writes send the same random bytes.
//
// With Job.Verify everything is looked at: each block of 512 bytes that is written carries its offset and a
// generation, and what is read must be what this job wrote last. That is for tests; it costs speed.
//
// The same patterns can be run on a file with pread and pwrite, which is what no server can beat.
package generator
