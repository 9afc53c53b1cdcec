package nbdexport

import (
	"encoding/binary"
	"slices"
)

// maxDescriptors is how many extents one chunk describes at most. A client asks again for what is left.
const maxDescriptors = 16 << 10

// blockStatus carries a BLOCK_STATUS out: it sends a chunk for each metadata context.
func (t *transmission) blockStatus(w *worker) {
	r, style := &w.request, t.terms.replies
	n, contexts := r.length, t.terms.contexts
	if r.carries {
		var fault errno
		if n, contexts, fault = t.filter(r, w.buffer.payload(int(n))); fault != errnoNone {
			t.sendOutcome(w, fault)
			return
		}
	}
	kind := chunkBlockStatus
	if style == extendedReplies {
		kind = chunkBlockStatusExt
	}
	var b []byte
	for i := range contexts {
		var fault errno
		if b, fault = t.describe(b[:0], r, &contexts[i], int64(n)); fault != errnoNone {
			t.sendOutcome(w, fault)
			return
		}
		flags := uint16(0)
		if i == len(contexts)-1 {
			flags = chunkDone
		}
		style.putChunk(b, r, kind, flags, len(b)-style.headerSize())
		t.out.send(b)
	}
}

// filter takes apart the payload of a BLOCK_STATUS: the length of the range, and the identifiers of the contexts that the client wants to
// know of this time. Their chunks are sent in that order.
func (t *transmission) filter(r *request, payload []byte) (n uint64, contexts []metaContext, fault errno) {
	if len(payload) < 12 || len(payload)%4 != 0 {
		return 0, nil, errnoInval
	}
	n = binary.BigEndian.Uint64(payload)
	alignment := uint64(t.info.MinimumBlock - 1)
	if n == 0 || (n|r.offset)&alignment != 0 || !t.within(r.offset, n) {
		return 0, nil, errnoInval
	}
	for ids := payload[8:]; len(ids) > 0; ids = ids[4:] {
		has := func(c metaContext) bool { return c.id == binary.BigEndian.Uint32(ids) }
		i := slices.IndexFunc(t.terms.contexts, has)
		if i < 0 || slices.ContainsFunc(contexts, has) {
			return 0, nil, errnoInval
		}
		contexts = append(contexts, t.terms.contexts[i])
	}
	return n, contexts, errnoNone
}

// describe appends a chunk to b that describes the first of the n bytes which the request is about, by the context c. The chunk's header is not
// put yet.
func (t *transmission) describe(b []byte, r *request, c *metaContext, n int64) ([]byte, errno) {
	style := t.terms.replies
	limit := maxDescriptors
	if r.flags&commandReqOne != 0 {
		limit = 1
	}
	d := descriptors{b: b, extended: style == extendedReplies, limit: limit}
	d.b = append(d.b, make([]byte, style.headerSize())...)
	d.b = binary.BigEndian.AppendUint32(d.b, c.id)
	if d.extended {
		d.b = binary.BigEndian.AppendUint32(d.b, 0) // their number
	}
	count := len(d.b) - 4

	block := int64(t.info.MinimumBlock)
	var part Extent // what is known of the block that is described next, when its parts differ
	for e, err := range t.backend.Extents(c.name, int64(r.offset), n) {
		if err != nil {
			if d.number == 0 && d.last.Length == 0 {
				return nil, failure(err)
			}
			break // the client meets the error when it asks for what is behind
		}
		e.Length = min(e.Length, n) // of what the backend knows beyond, nothing is told
		if n -= e.Length; e.Length == 0 {
			break
		}
		if part.Length > 0 {
			k := min(e.Length, block-part.Length)
			part = Extent{Length: part.Length + k, Flags: c.combine(part.Flags, e.Flags)}
			if e.Length -= k; part.Length < block {
				continue
			}
			d.add(part)
		}
		part = Extent{Length: e.Length % block, Flags: e.Flags}
		e.Length -= part.Length
		if d.add(e); d.full() {
			break
		}
	}
	if d.finish(); d.number == 0 {
		return nil, errnoIO // the backend has said nothing
	}
	if d.extended {
		binary.BigEndian.PutUint32(d.b[count:], uint32(d.number))
	}
	return d.b, errnoNone
}

// descriptors are collected in b. Neighbours that are alike are joined.
type descriptors struct {
	b        []byte
	extended bool
	limit    int
	number   int    // in b
	last     Extent // not in b yet
}

func (d *descriptors) add(e Extent) {
	switch {
	case e.Length == 0:
	case d.last.Length > 0 && d.last.Flags == e.Flags:
		d.last.Length += e.Length
	default:
		d.finish()
		d.last = e
	}
}

// full says whether no more than the last one find a place.
func (d *descriptors) full() bool { return d.number == d.limit }

// finish puts the last one into b, if it still finds a place.
func (d *descriptors) finish() {
	if d.last.Length == 0 || d.full() {
		return
	}
	d.number++
	if d.extended {
		d.b = binary.BigEndian.AppendUint64(d.b, uint64(d.last.Length))
		d.b = binary.BigEndian.AppendUint64(d.b, d.last.Flags)
	} else { // lengths are at most that of the request, which has 32 bits
		d.b = binary.BigEndian.AppendUint32(d.b, uint32(d.last.Length))
		d.b = binary.BigEndian.AppendUint32(d.b, uint32(d.last.Flags))
	}
	d.last = Extent{}
}
