package nbdexport

import (
	"fmt"
	"io"
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
	// WriteZeroes makes n bytes at off read as zeroes. With mayUnmap their space may be given back;
	// without, a later write there must not need new space where the bytes had space before.
	WriteZeroes(off, n int64, mayUnmap bool) error
	// Discard hints that n bytes at off are no longer needed. Whole clusters inside the range read as zeroes
	// afterwards.
	Discard(off, n int64) error
	// Flush makes everything that was acknowledged before it durable.
	Flush() error
}

// Info describes an export to its clients.
type Info struct {
	Size           int64 // bytes
	ReadOnly       bool
	MinimumBlock   uint32 // bytes, a power of two, 1 to 64 Ki; 0 means 1
	PreferredBlock uint32 // bytes, a power of two, 512 to 32 Mi, not below MinimumBlock; 0 means 4096 or MinimumBlock
	MultiConn      bool   // Flush on one connection covers writes acknowledged on all
}

// TransmissionFlags returns the flags that tell a client what an export with this description can do (section
// "Transmission flags" of the specification). A kernel client that is set up without a handshake needs them.
func TransmissionFlags(i Info) uint16 {
	flags := FlagHasFlags | FlagSendFlush
	if i.ReadOnly {
		flags |= FlagReadOnly
	} else {
		flags |= FlagSendFUA | FlagSendTrim | FlagSendWriteZeroes
	}
	if i.MultiConn {
		flags |= FlagCanMultiConn
	}
	return flags
}

// inspect asks b for its description, fills in the defaults and refuses one that the specification does not allow.
func inspect(b Backend) (Info, error) {
	i := b.Info()
	if i.MinimumBlock == 0 {
		i.MinimumBlock = 1
	}
	if i.PreferredBlock == 0 {
		i.PreferredBlock = max(4096, i.MinimumBlock)
	}
	switch {
	case i.Size < 0:
		return Info{}, fmt.Errorf("export of %d bytes", i.Size)
	case !powerOfTwo(i.MinimumBlock) || i.MinimumBlock > 64<<10:
		return Info{}, fmt.Errorf("minimum block of %d bytes", i.MinimumBlock)
	case !powerOfTwo(i.PreferredBlock) || i.PreferredBlock < max(512, i.MinimumBlock) || i.PreferredBlock > MaxPayload:
		return Info{}, fmt.Errorf("preferred block of %d bytes with a minimum of %d", i.PreferredBlock, i.MinimumBlock)
	case i.Size%int64(i.MinimumBlock) != 0:
		return Info{}, fmt.Errorf("export of %d bytes is no multiple of its minimum block, %d", i.Size, i.MinimumBlock)
	}
	return i, nil
}

func powerOfTwo(n uint32) bool { return n > 0 && n&(n-1) == 0 }
