package nbdexport

import "encoding/binary"

// request is one request as the client sent it, without its payload.
type request struct {
	magic   uint32
	flags   uint16
	command command
	cookie  uint64
	offset  uint64
	length  uint32
}

// parseRequest reads the header in the first requestSize bytes of b.
func parseRequest(b []byte) request {
	return request{
		magic:   binary.BigEndian.Uint32(b),
		flags:   binary.BigEndian.Uint16(b[4:]),
		command: command(binary.BigEndian.Uint16(b[6:])),
		cookie:  binary.BigEndian.Uint64(b[8:]),
		offset:  binary.BigEndian.Uint64(b[16:]),
		length:  binary.BigEndian.Uint32(b[24:]),
	}
}

// payload is the number of bytes that follow the header.
func (r *request) payload() int {
	if r.command == cmdWrite {
		return int(r.length)
	}
	return 0
}

// answer is the number of bytes that follow the header of the reply when all goes well.
func (r *request) answer() int {
	if r.command == cmdRead {
		return int(r.length)
	}
	return 0
}

func (r *request) fua() bool { return r.flags&commandFUA != 0 }

// verify returns why the request must not reach the backend, or errnoNone. grown is asked for the size of the export only
// when the one in info is too small for the request.
func (r *request) verify(info *Info, grown func() int64) errno {
	// FUA is allowed on everything: real clients set it on reads, and the specification puts up with that.
	allowed, beyond := commandFUA, errnoInval
	switch r.command {
	case cmdFlush:
		if r.flags&^allowed != 0 || r.offset != 0 || r.length != 0 {
			return errnoInval
		}
		return errnoNone
	case cmdRead:
	case cmdWrite:
		beyond = errnoNoSpc
	case cmdTrim:
	case cmdWriteZeroes:
		allowed |= commandNoHole
		beyond = errnoNoSpc
	default:
		return errnoInval
	}
	alignment := uint64(info.MinimumBlock - 1)
	switch {
	case r.command != cmdRead && info.ReadOnly:
		return errnoPerm
	case r.flags&^allowed != 0:
		return errnoInval
	case r.offset&alignment != 0 || uint64(r.length)&alignment != 0:
		return errnoInval
	case max(r.payload(), r.answer()) > MaxPayload:
		return errnoInval
	case !r.within(info.Size) && !r.within(grown()):
		return beyond
	}
	return errnoNone
}

// within says whether the request ends at or before size.
func (r *request) within(size int64) bool {
	return r.offset <= uint64(size) && uint64(r.length) <= uint64(size)-r.offset
}
