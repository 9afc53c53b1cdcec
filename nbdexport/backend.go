package nbdexport

import (
	"io"
	"iter"
)

// Backend is what an export serves. All methods may be called concurrently. An error that matches syscall.ENOSPC
// (errors.Is), EDQUOT or EFBIG reaches the client as NBD_ENOSPC, one that matches syscall.EINVAL as NBD_EINVAL,
// syscall.EPERM and EROFS as NBD_EPERM, every other one as NBD_EIO.
type Backend interface {
	// ReadAt fills p; ranges outside Info().Size never arrive.
	io.ReaderAt
	// WriteAt writes all of p. Once it has returned nil the data outlives the process; Flush makes it outlive the
	// machine.
	io.WriterAt
	// Info describes the export. What it says when a client chooses the export holds for that connection, but for the
	// size: a request past the end that the server knows makes it ask again, so an export may grow while it is served.
	Info() Info
	// ReadExtent reads the first bytes of p, which is not empty, that are alike. It returns how many these are, at
	// least 1, and whether they are known to be zeroes without a look at them: then p is as it was.
	ReadExtent(p []byte, off int64) (n int, zero bool, err error)
	// Splice moves the first of n bytes at off, at least one, into a pipe, given by its descriptor, without copying them. It returns how many, 0
	// where it can't: then they are read. The pipe may show what is written to the bytes before they are read from it.
	Splice(pipe int, off int64, n int) (int, error)
	// WatchSplices makes unread known, which says whether something that was spliced has not been read yet. It is called before Splice, and forget
	// when nothing is spliced any more.
	WatchSplices(unread func() bool) (forget func())
	// WriteSync is a WriteAt whose data outlives the machine once it has returned nil.
	WriteSync(p []byte, off int64) (int, error)
	// WriteZeroes makes n bytes at off read as zeroes.
	WriteZeroes(off, n int64, how Zeroing) error
	// Discard hints that n bytes at off are no longer needed. Whole clusters inside the range read as zeroes
	// afterwards.
	Discard(off, n int64) error
	// Flush makes everything that was acknowledged before it durable.
	Flush() error
	// Extents describes n bytes from off on, in order and without gaps, by a metadata context that Info lists. It stops
	// after the first error.
	Extents(context string, off, n int64) iter.Seq2[Extent, error]
}

// Zeroing says how bytes become zeroes.
type Zeroing struct {
	// MayUnmap allows to give the space of the bytes back. Without it, a later write there must not need new space
	// where the bytes had space before.
	MayUnmap bool
	// Fast wants an error that matches syscall.ENOTSUP, soon and with nothing changed, where writing zeroes would take
	// no longer. Only backends whose Info says FastZero see it.
	Fast bool
}

// Extent is a range of an export that a metadata context describes. Flags are those of the context: for
// [ContextAllocation] StateHole and StateZero, for [ContextAllocationDepth] how many files deep in the chain of backing
// files the bytes are, 1 the image's own and 0 none, for a [ContextDirtyBitmap] StateDirty.
type Extent struct {
	Length int64 // bytes, at least 1
	Flags  uint64
}
