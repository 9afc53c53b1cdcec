package nbdtest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"syscall"
	"unicode/utf8"

	"github.com/qcow-csi/qcow-csi/nbdexport"
)

// Ledger knows to which requests a reply is due. It divides what a server sends into replies, and checks everything that
// the specification demands of them. It is stricter in two points: in the style Structured it takes no simple replies, and no
// status has more than 32 bits.
type Ledger struct {
	Style    Style
	Contexts []uint32 // the identifiers of the metadata contexts that were selected
	Block    uint64   // the minimum block of the export; 0 stands for 1
	due      map[uint64]*exchange
}

// Reply is a whole reply.
type Reply struct {
	Cookie uint64
	Err    error         // a syscall.Errno, or nil
	Data   []byte        // of a CmdRead that succeeded, put together
	Chunks []Chunk       // in the order in which they came, but in the style Simple
	Status []BlockStatus // of a CmdBlockStatus, in the order in which they came
}

// Errno is the number of the error, or 0.
func (r *Reply) Errno() syscall.Errno {
	var number syscall.Errno
	errors.As(r.Err, &number)
	return number
}

// Chunk is one chunk of a reply.
type Chunk struct {
	Type           uint16
	Offset, Length uint64 // of content
	Text           string // of an error
}

// BlockStatus is what one metadata context says.
type BlockStatus struct {
	Context uint32
	Extents []nbdexport.Extent
}

// exchange is a request with what has come of its reply.
type exchange struct {
	Request
	effect   uint64   // bytes of the export that it is about
	contexts []uint32 // that have to describe it
	reply    Reply
	covered  uint64 // bytes of content
}

// Expect notes that a reply to r is due.
func (l *Ledger) Expect(r Request) {
	e := &exchange{Request: r, effect: r.Length, contexts: l.Contexts, reply: Reply{Cookie: r.Cookie}}
	if r.Command == CmdBlockStatus && l.Style == Extended && r.Flags&FlagPayloadLen != 0 && len(r.Payload) >= 8 {
		e.effect, e.contexts = binary.BigEndian.Uint64(r.Payload), nil
		for ids := r.Payload[8:]; len(ids) >= 4; ids = ids[4:] {
			e.contexts = append(e.contexts, binary.BigEndian.Uint32(ids))
		}
	}
	if l.due == nil {
		l.due = make(map[uint64]*exchange)
	}
	l.due[r.Cookie] = e
}

// Due is the number of replies that have not come yet.
func (l *Ledger) Due() int { return len(l.due) }

// Await reads until a reply is whole.
func (l *Ledger) Await(in io.Reader) (*Reply, error) {
	for {
		e, done, err := l.receive(in)
		if err != nil {
			return nil, err
		}
		if done {
			delete(l.due, e.Cookie)
			return &e.reply, nil
		}
	}
}

// receive reads one message. It says whether the reply that it belongs to is complete.
func (l *Ledger) receive(in io.Reader) (*exchange, bool, error) {
	magic := [...]uint32{SimpleReplyMagic, StructuredReplyMagic, ExtendedReplyMagic}[l.Style]
	header := make([]byte, [...]int{16, 20, 32}[l.Style])
	if _, err := io.ReadFull(in, header); err != nil {
		return nil, false, fmt.Errorf("header of a reply: %w", err)
	}
	e := l.due[binary.BigEndian.Uint64(header[8:])]
	switch {
	case binary.BigEndian.Uint32(header) != magic:
		return nil, false, fmt.Errorf("header of a reply: magic in % x", header)
	case e == nil:
		return nil, false, fmt.Errorf("no reply is due to % x", header)
	}
	if l.Style == Simple {
		return e, true, e.simple(syscall.Errno(binary.BigEndian.Uint32(header[4:])), in)
	}
	flags, kind := binary.BigEndian.Uint16(header[4:]), binary.BigEndian.Uint16(header[6:])
	length := uint64(binary.BigEndian.Uint32(header[16:]))
	if l.Style == Extended {
		length = binary.BigEndian.Uint64(header[24:])
		if off := binary.BigEndian.Uint64(header[16:]); off != e.Offset {
			return nil, false, fmt.Errorf("the request is about offset %d, the reply about %d", e.Offset, off)
		}
	}
	if flags > 1 || length > nbdexport.MaxPayload+8 {
		return nil, false, fmt.Errorf("chunk of type %d with flags %#x and %d bytes", kind, flags, length)
	}
	payload := make([]byte, length)
	if _, err := io.ReadFull(in, payload); err != nil {
		return nil, false, fmt.Errorf("chunk of type %d: payload: %w", kind, err)
	}
	done := flags == 1
	err := l.chunk(e, kind, payload)
	if err == nil && done {
		err = e.complete()
	}
	if err == nil && kind == ChunkNone && !done {
		err = errors.New("there is more")
	}
	if err != nil {
		return nil, false, fmt.Errorf("chunk of type %d with %d bytes in the reply to %+v: %w", kind, length, e.Request.head(), err)
	}
	return e, done, nil
}

// head is the request without its payload.
func (r Request) head() Request {
	r.Payload = nil
	return r
}

func (e *exchange) simple(number syscall.Errno, in io.Reader) error {
	if number != 0 {
		e.reply.Err = number
		return known(number)
	}
	if e.Command != CmdRead {
		return nil
	}
	e.reply.Data = make([]byte, e.Length)
	if _, err := io.ReadFull(in, e.reply.Data); err != nil {
		return fmt.Errorf("data: %w", err)
	}
	return nil
}

// known refuses numbers that the specification does not have.
func known(number syscall.Errno) error {
	if !slices.Contains([]syscall.Errno{1, 5, 12, 22, 28, 75, 95, 108}, number) {
		return fmt.Errorf("unknown error: %w", number)
	}
	return nil
}

func (l *Ledger) chunk(e *exchange, kind uint16, payload []byte) error {
	c := Chunk{Type: kind}
	var err error
	switch {
	case kind == ChunkNone && len(payload) == 0:
	case kind == ChunkData && len(payload) >= 9:
		c.Offset, c.Length = binary.BigEndian.Uint64(payload), uint64(len(payload)-8)
		err = e.content(c, payload[8:])
	case kind == ChunkHole && len(payload) == 12:
		c.Offset, c.Length = binary.BigEndian.Uint64(payload), uint64(binary.BigEndian.Uint32(payload[8:]))
		err = e.content(c, make([]byte, c.Length))
	case kind == ChunkBlockStatus && l.Style == Structured && len(payload) >= 12 && len(payload)%8 == 4,
		kind == ChunkBlockStatusExt && l.Style == Extended && len(payload) >= 24 && len(payload)%16 == 8:
		err = l.status(e, payload)
	case kind == ChunkError && len(payload) >= 6, kind == ChunkErrorOffset && len(payload) >= 14:
		c.Text, err = e.failure(kind, payload)
	default:
		err = errors.New("it has no place here")
	}
	e.reply.Chunks = append(e.reply.Chunks, c)
	return err
}

// content takes a chunk of data, or a hole.
func (e *exchange) content(c Chunk, data []byte) error {
	if e.Command != CmdRead || c.Length == 0 || c.Offset < e.Offset || c.Offset-e.Offset > e.effect ||
		c.Length > e.effect-(c.Offset-e.Offset) {
		return fmt.Errorf("content of %d bytes at %d", c.Length, c.Offset)
	}
	for _, other := range e.reply.Chunks {
		switch {
		case other.Type != ChunkData && other.Type != ChunkHole:
		case e.Flags&FlagDF != 0:
			return errors.New("the reply is fragmented")
		case c.Offset < other.Offset+other.Length && other.Offset < c.Offset+c.Length:
			return fmt.Errorf("%+v and %+v overlap", c, other)
		}
	}
	if e.reply.Data == nil {
		e.reply.Data = make([]byte, e.effect)
	}
	copy(e.reply.Data[c.Offset-e.Offset:], data)
	e.covered += c.Length
	return nil
}

// failure takes an error.
func (e *exchange) failure(kind uint16, payload []byte) (text string, err error) {
	number, length := syscall.Errno(binary.BigEndian.Uint32(payload)), int(binary.BigEndian.Uint16(payload[4:]))
	rest := len(payload) - 6 - length
	if number == 0 || rest < 0 || length > 4096 || kind == ChunkErrorOffset && rest < 8 {
		return "", fmt.Errorf("error (%w) with a text of %d bytes", number, length)
	}
	if text = string(payload[6:][:length]); !utf8.ValidString(text) {
		return "", fmt.Errorf("text %q", text)
	}
	e.reply.Err = number
	if kind == ChunkErrorOffset {
		if at := binary.BigEndian.Uint64(payload[6+length:]); at < e.Offset || at-e.Offset >= e.effect {
			return text, fmt.Errorf("error at %d", at)
		}
	}
	return text, known(number)
}

// status takes what one context says.
func (l *Ledger) status(e *exchange, payload []byte) error {
	s := BlockStatus{Context: binary.BigEndian.Uint32(payload)}
	if e.Command != CmdBlockStatus || !slices.Contains(e.contexts, s.Context) ||
		slices.ContainsFunc(e.reply.Status, func(other BlockStatus) bool { return other.Context == s.Context }) {
		return fmt.Errorf("nobody asked for context %d", s.Context)
	}
	if l.Style == Structured {
		for b := payload[4:]; len(b) > 0; b = b[8:] {
			s.add(uint64(binary.BigEndian.Uint32(b)), uint64(binary.BigEndian.Uint32(b[4:])))
		}
	} else {
		for b := payload[8:]; len(b) > 0; b = b[16:] {
			s.add(binary.BigEndian.Uint64(b), binary.BigEndian.Uint64(b[8:]))
		}
		if count := binary.BigEndian.Uint32(payload[4:]); count != uint32(len(s.Extents)) {
			return fmt.Errorf("%d extents are said to be %d", len(s.Extents), count)
		}
	}
	var sum uint64
	for i, x := range s.Extents {
		switch length := uint64(x.Length); {
		case length == 0, length >= 1<<63, length%max(l.Block, 1) != 0, x.Flags>>32 != 0:
			return fmt.Errorf("extent %d: %+v", i, x)
		case sum >= e.effect:
			return fmt.Errorf("extent %d is behind the end of the request", i)
		case e.Flags&FlagReqOne != 0 && (i > 0 || length > e.effect):
			return fmt.Errorf("one extent was wanted: %+v", s.Extents)
		default:
			sum += length
		}
	}
	e.reply.Status = append(e.reply.Status, s)
	return nil
}

func (s *BlockStatus) add(length, flags uint64) {
	s.Extents = append(s.Extents, nbdexport.Extent{Length: int64(length), Flags: flags})
}

// complete checks a reply that has ended.
func (e *exchange) complete() error {
	switch {
	case e.reply.Err != nil:
		e.reply.Data = nil
	case e.Command == CmdRead && e.covered != e.effect:
		return fmt.Errorf("%d of %d bytes", e.covered, e.effect)
	case e.Command == CmdBlockStatus && (len(e.reply.Status) != len(e.contexts) || len(e.contexts) == 0):
		return fmt.Errorf("%d contexts of %d", len(e.reply.Status), len(e.contexts))
	}
	return nil
}
