package nbdexport

import "encoding/binary"

// request is one request as the client sent it, without its payload.
type request struct {
	magic   uint32
	flags   uint16
	command command
	cookie  uint64
	offset  uint64
	length  uint64 // bytes of the payload where there is one, else of the export
	carries bool   // a payload follows the header
}

// parseRequest reads a header in the first requestSize bytes of b, or, with extended headers, extendedRequestSize.
func parseRequest(b []byte, extended bool) request {
	r := request{
		magic:   binary.BigEndian.Uint32(b),
		flags:   binary.BigEndian.Uint16(b[4:]),
		command: command(binary.BigEndian.Uint16(b[6:])),
		cookie:  binary.BigEndian.Uint64(b[8:]),
		offset:  binary.BigEndian.Uint64(b[16:]),
	}
	if extended {
		r.length = binary.BigEndian.Uint64(b[24:])
		r.carries = r.flags&commandPayloadLen != 0
	} else {
		r.length = uint64(binary.BigEndian.Uint32(b[24:]))
		r.carries = r.command == cmdWrite
	}
	return r
}

// payload is the number of bytes that follow the header.
func (r *request) payload() uint64 {
	if r.carries {
		return r.length
	}
	return 0
}

// room is the number of bytes that carrying the request out needs in memory.
func (r *request) room() int {
	if r.command == cmdRead {
		return int(r.length)
	}
	return int(r.payload())
}

func (r *request) fua() bool { return r.flags&commandFUA != 0 }

// allowedFlags returns the flags that the specification documents for the command, false for an unknown command. FUA
// is allowed on everything: real clients set it on reads, and the specification puts up with that.
func (t *transmission) allowedFlags(c command) (uint16, bool) {
	allowed := commandFUA
	switch c {
	case cmdRead:
		if t.terms.replies != simpleReplies {
			allowed |= commandDF
		}
	case cmdWrite:
		if t.terms.replies == extendedReplies {
			allowed |= commandPayloadLen
		}
	case cmdWriteZeroes:
		if allowed |= commandNoHole; t.info.FastZero {
			allowed |= commandFastZero
		}
	case cmdBlockStatus:
		if allowed |= commandReqOne; t.terms.replies == extendedReplies {
			allowed |= commandPayloadLen
		}
	case cmdFlush, cmdTrim, cmdCache:
	default:
		return 0, false
	}
	return allowed, true
}

// verify returns why the request must not reach the backend, or errnoNone.
func (t *transmission) verify(r *request) errno {
	allowed, known := t.allowedFlags(r.command)
	alignment := uint64(t.info.MinimumBlock - 1)
	changes := r.command == cmdWrite || r.command == cmdTrim || r.command == cmdWriteZeroes
	switch {
	case !known:
		return errnoInval
	case changes && t.info.ReadOnly:
		return errnoPerm
	case r.flags&^allowed != 0:
		return errnoInval
	case r.command == cmdFlush && (r.offset != 0 || r.length != 0):
		return errnoInval
	case r.command == cmdFlush:
		return errnoNone
	case r.command == cmdWrite && !r.carries:
		return errnoInval
	case r.command == cmdBlockStatus && len(t.terms.contexts) == 0:
		return errnoInval
	case r.command == cmdBlockStatus && r.carries:
		return errnoNone // the payload says what it is about
	case r.command == cmdBlockStatus && r.length == 0:
		return errnoInval
	case r.offset&alignment != 0 || r.length&alignment != 0:
		return errnoInval
	case r.length > MaxPayload && r.command == cmdWrite:
		return errnoInval
	case r.length > MaxPayload && (r.command == cmdRead || r.command == cmdCache):
		if t.terms.replies == simpleReplies && r.command == cmdRead {
			return errnoInval
		}
		return errnoOverflow
	case !t.within(r.offset, r.length):
		if r.command == cmdWrite || r.command == cmdWriteZeroes {
			return errnoNoSpc
		}
		return errnoInval
	}
	return errnoNone
}

// within says whether n bytes at off lie inside of the export, which may have grown.
func (t *transmission) within(off, n uint64) bool {
	inside := func(size int64) bool { return off <= uint64(size) && n <= uint64(size)-off }
	if inside(t.size.Load()) {
		return true
	}
	size := t.backend.Info().Size
	t.size.Store(size)
	return inside(size)
}
