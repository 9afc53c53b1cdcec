package storage

import "io"

// File is the door to one file. ReadAt and WriteAt may be called concurrently, also with each other.
//
// Errors wrap what the operating system said; a full file system is ErrNoSpace, whatever the call.
type File interface {
	// ReadAt reads len(p) bytes; a read that reaches past the end returns the bytes before it and io.EOF.
	io.ReaderAt
	// WriteAt writes all of p, growing the file as needed. Bytes between the old end and off read as zeroes.
	io.WriterAt
	// Size returns the length of the file in bytes.
	Size() (int64, error)
	// Truncate makes the file size bytes long. Bytes gained read as zeroes.
	Truncate(size int64) error
	// PunchHole makes n bytes at off read as zeroes and gives their space back where the file system can. It does not
	// change the length of the file; the part of the range past its end is ignored.
	PunchHole(off, n int64) error
	// Sync makes every completed write, punch and truncate durable. After it has failed once the state of the
	// file on disk is unknown, and the caller must not trust a later success.
	Sync() error
	io.Closer
}
