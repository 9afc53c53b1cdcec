package nbdexport

// smallestHole is how many zeroes, in bytes, are worth a chunk of their own. It is more than the headers of a hole and of the data
// behind it, so that a reply with holes is never longer than one without.
const smallestHole = 512

// read carries a READ out and writes the whole reply to the start of b, which has room for readReplySize. It returns the length
// of the reply. An error carries no data.
func (t *transmission) read(b []byte, r *request) int {
	style := t.terms.replies
	if r.length == 0 {
		return style.putOutcome(b, r, errnoNone)
	}
	if style != simpleReplies && r.flags&commandDF == 0 {
		return t.readChunks(b, r)
	}
	header := style.dataHeaderSize()
	data := b[header:][:r.length]
	n, err := t.backend.ReadAt(data, int64(r.offset))
	switch {
	case n < len(data): // io.ReaderAt may report io.EOF with the last byte
		return style.putOutcome(b, r, failure(err))
	case style == simpleReplies:
		putSimple(b, r, errnoNone)
	default:
		style.putData(b, r, chunkDone, r.offset, n)
	}
	return header + n
}

// spliced carries a READ out without copying its data, and sends the reply. It returns false where that can't be done, with nothing sent; b has
// room for readReplySize.
func (t *transmission) spliced(b []byte, r *request) bool {
	n := int(r.length)
	if t.socket == nil || n < shortestSplice || n > longestSplice {
		return false
	}
	p := takePipe()
	if p == nil {
		return false
	}
	t.socket.splicing.Add(1)
	defer t.socket.splicing.Add(-1)
	for moved := 0; moved < n; {
		k, err := t.backend.Splice(p.in, int64(r.offset)+int64(moved), n-moved)
		if k == 0 || err != nil { // read meets the error again, if it is one to stay
			if p.drain(b[:moved]) != nil {
				p.close()
			} else {
				p.recycle()
			}
			return false
		}
		moved += k
	}
	style := t.terms.replies
	if style == simpleReplies {
		putSimple(b, r, errnoNone)
	} else {
		style.putData(b, r, chunkDone, r.offset, n)
	}
	t.out.sendSpliced(b[:style.dataHeaderSize()], p, n)
	return true
}

// readReplySize returns the room that read needs for the reply to a read of n bytes.
func readReplySize(n int) int {
	return max(largestDataHeader+n+extendedChunkSize+holeSize, largestOutcome)
}

// readChunks is read for a client that understands holes. Nothing is sent before everything was read: so an error is the only chunk of its
// reply, and each other one is whole.
func (t *transmission) readChunks(b []byte, r *request) int {
	style := t.terms.replies
	var (
		end  int   // of the chunks that are complete
		last chunk // the one behind them; nothing at first
	)
	for off, stop := r.offset, r.offset+r.length; off < stop; {
		at := end + style.dataHeaderSize()
		if last.data {
			at += last.length
		} else if last.length > 0 {
			at += style.headerSize() + holeSize
		}
		p := b[at:][:stop-off]
		n, zero, err := t.backend.ReadExtent(p, int64(off))
		if err != nil || n == 0 {
			return style.putOutcome(b, r, failure(err))
		}
		hole := zero && (n >= smallestHole || last.length > 0 && !last.data)
		if zero && !hole {
			clear(p[:n])
		}
		if last.length > 0 && last.data != hole {
			last.length += n
		} else {
			end += last.put(b[end:], style, r, 0)
			last = chunk{data: !hole, off: off, length: n}
		}
		off += uint64(n)
	}
	return end + last.put(b[end:], style, r, chunkDone)
}

// chunk is a part of a reply to a READ. Its data is in place before it is put.
type chunk struct {
	data   bool // else a hole
	off    uint64
	length int
}

// put completes the chunk at the start of b and returns its length there.
func (c *chunk) put(b []byte, style replyStyle, r *request, flags uint16) int {
	switch {
	case c.length == 0:
		return 0
	case c.data:
		style.putData(b, r, flags, c.off, c.length)
		return style.dataHeaderSize() + c.length
	default:
		style.putHole(b, r, flags, c.off, c.length)
		return style.headerSize() + holeSize
	}
}
