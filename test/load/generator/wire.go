package generator

import (
	"encoding/binary"
	"fmt"
)

// Numbers and lengths in bytes of the transmission phase.
const (
	magicRequest         = 0x25609513
	magicSimpleReply     = 0x67446698
	magicStructuredReply = 0x668e33ef

	requestSize         = 28
	simpleReplySize     = 16
	structuredReplySize = 20

	cmdRead  = 0
	cmdWrite = 1
	cmdDisc  = 2

	chunkDone       = 1 << 0 // flag of a chunk: it is the last one
	chunkNone       = 0
	chunkOffsetData = 1
	chunkOffsetHole = 2
	chunkError      = 1 << 15 // the first of the errors
)

// appendRequest appends the header of a request.
func appendRequest(b []byte, command uint16, cookie uint64, offset int64, length uint32) []byte {
	b = binary.BigEndian.AppendUint32(b, magicRequest)
	b = binary.BigEndian.AppendUint16(b, 0)
	b = binary.BigEndian.AppendUint16(b, command)
	b = binary.BigEndian.AppendUint64(b, cookie)
	b = binary.BigEndian.AppendUint64(b, uint64(offset))
	return binary.BigEndian.AppendUint32(b, length)
}

// reply is the header of a simple reply or of one chunk of a structured one.
type reply struct {
	cookie  uint64
	kind    uint16 // of the chunk; a simple reply to a read has the kind simpleData
	errno   uint32 // of a simple reply
	payload int    // bytes that follow; those of a simple reply depend on the request
	last    bool
}

// simpleData is the kind of a reply that is no chunk.
const simpleData = 1<<15 - 1

// decodeReply decodes the header at the beginning of p. It returns its length, 0 as long as p holds only a part of it.
func decodeReply(p []byte) (r reply, length int, err error) {
	if len(p) < simpleReplySize {
		return reply{}, 0, nil
	}
	switch magic := binary.BigEndian.Uint32(p); magic {
	case magicSimpleReply:
		r.kind, r.last = simpleData, true
		r.errno = binary.BigEndian.Uint32(p[4:])
		r.cookie = binary.BigEndian.Uint64(p[8:])
		return r, simpleReplySize, nil
	case magicStructuredReply:
		if len(p) < structuredReplySize {
			return reply{}, 0, nil
		}
		r.last = binary.BigEndian.Uint16(p[4:])&chunkDone != 0
		r.kind = binary.BigEndian.Uint16(p[6:])
		r.cookie = binary.BigEndian.Uint64(p[8:])
		r.payload = int(binary.BigEndian.Uint32(p[16:]))
		return r, structuredReplySize, nil
	default:
		return reply{}, 0, fmt.Errorf("reply begins with %#x", magic)
	}
}
