package nbdexport

import "encoding/binary"

// replyStyle is the form of all replies of a connection.
type replyStyle int

const (
	simpleReplies     replyStyle = iota
	structuredReplies            // after NBD_OPT_STRUCTURED_REPLY
	extendedReplies              // after NBD_OPT_EXTENDED_HEADERS
)

const (
	// largestDataHeader is the length of what precedes data in the style where that is longest.
	largestDataHeader = extendedChunkSize + 8
	// largestOutcome is the length of the longest reply without data: an error with its text.
	largestOutcome = extendedChunkSize + 6 + 64
)

// headerSize returns the length in bytes of the header of a reply, or of a chunk of one.
func (s replyStyle) headerSize() int {
	switch s {
	case structuredReplies:
		return structuredChunkSize
	case extendedReplies:
		return extendedChunkSize
	default:
		return simpleReplySize
	}
}

// dataHeaderSize returns the length in bytes of what precedes data.
func (s replyStyle) dataHeaderSize() int {
	if s == simpleReplies {
		return simpleReplySize
	}
	return s.headerSize() + 8
}

// putSimple writes the header of a simple reply to the start of b.
func putSimple(b []byte, r *request, fault errno) {
	binary.BigEndian.PutUint32(b, magicSimpleReply)
	binary.BigEndian.PutUint32(b[4:], uint32(fault))
	binary.BigEndian.PutUint64(b[8:], r.cookie)
}

// putChunk writes the header of a chunk with n bytes of payload to the start of b.
func (s replyStyle) putChunk(b []byte, r *request, kind chunkType, flags uint16, n int) {
	binary.BigEndian.PutUint16(b[4:], flags)
	binary.BigEndian.PutUint16(b[6:], uint16(kind))
	binary.BigEndian.PutUint64(b[8:], r.cookie)
	if s == extendedReplies {
		binary.BigEndian.PutUint32(b, magicExtendedReply)
		binary.BigEndian.PutUint64(b[16:], r.offset)
		binary.BigEndian.PutUint64(b[24:], uint64(n))
		return
	}
	binary.BigEndian.PutUint32(b, magicStructuredReply)
	binary.BigEndian.PutUint32(b[16:], uint32(n))
}

// putData writes what precedes n bytes of data, which are those at off, to the start of b.
func (s replyStyle) putData(b []byte, r *request, flags uint16, off uint64, n int) {
	s.putChunk(b, r, chunkOffsetData, flags, 8+n)
	binary.BigEndian.PutUint64(b[s.headerSize():], off)
}

// putHole writes a chunk to the start of b that says that n bytes at off are zeroes.
func (s replyStyle) putHole(b []byte, r *request, flags uint16, off uint64, n int) {
	s.putChunk(b, r, chunkOffsetHole, flags, holeSize)
	binary.BigEndian.PutUint64(b[s.headerSize():], off)
	binary.BigEndian.PutUint32(b[s.headerSize()+8:], uint32(n))
}

// putOutcome writes a whole reply without data to the start of b, which has room for largestOutcome, and returns its length.
func (s replyStyle) putOutcome(b []byte, r *request, fault errno) int {
	switch {
	case s == simpleReplies:
		putSimple(b, r, fault)
		return simpleReplySize
	case fault == errnoNone:
		s.putChunk(b, r, chunkNone, chunkDone, 0)
		return s.headerSize()
	}
	text := fault.text()
	s.putChunk(b, r, chunkError, chunkDone, 6+len(text))
	b = b[s.headerSize():]
	binary.BigEndian.PutUint32(b, uint32(fault))
	binary.BigEndian.PutUint16(b[4:], uint16(len(text)))
	return s.headerSize() + 6 + copy(b[6:], text)
}
