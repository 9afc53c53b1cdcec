package storage

import "io"

// File is the door to one file. Its methods, except Close, may be called concurrently, also with each other.
//
// Errors wrap what the operating system said; a full file system is ErrNoSpace, whatever the call.
type File interface {
	// ReadAt reads len(p) bytes; a read that reaches past the end returns the bytes before it and io.EOF.
	io.ReaderAt
	// Splice moves the first of n bytes at off into a pipe, given by its descriptor, without copying them: at least one, as many as the file
	// has and the pipe takes without waiting. The pipe shows what the bytes are when they are read from it, which may be newer. It returns 0
	// where this can't be done, and the bytes have to be read.
	Splice(pipe int, off int64, n int) (int, error)
	// WriteAt writes all of p, growing the file as needed. Bytes between the old end and off read as zeroes.
	io.WriterAt
	// WriteSync is a WriteAt whose bytes are durable when it returns, along with what it takes to read them back: the
	// length of the file, the place of the bytes. Nothing else need be durable: it is no Sync of what was written
	// before. A failure leaves the same doubt as one of Sync.
	WriteSync(p []byte, off int64) (n int, err error)
	// Size returns the length of the file in bytes.
	Size() (int64, error)
	// Truncate makes the file size bytes long. Bytes gained read as zeroes.
	Truncate(size int64) error
	// Allocate reserves space for n bytes at off without changing what they are, growing the file as needed; bytes gained
	// read as zeroes. Where the file system cannot reserve space the error is ErrUnsupported and nothing has changed;
	// after any other error a part may be reserved, and the file may have grown.
	Allocate(off, n int64) error
	// PunchHole makes n bytes at off read as zeroes and gives their space back where the file system can. It does not
	// change the length of the file; the part of the range past its end is ignored.
	PunchHole(off, n int64) error
	// NextData returns the first range [start, end) at or behind off that may hold data: all bytes between off and start read as
	// zeroes, and start < end. It returns io.EOF when only zeroes follow, or nothing. Where the file system does not
	// know its holes the range is the rest of the file.
	NextData(off int64) (start, end int64, err error)
	// Sync makes every completed write, punch, allocation and truncate durable. After it has failed once the state of the
	// file on disk is unknown, and the caller must not trust a later success.
	Sync() error
	io.Closer
}
