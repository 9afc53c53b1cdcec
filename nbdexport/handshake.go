package nbdexport

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
)

// Limits on what a client may send before it has chosen an export.
const (
	maxOptions       = 64       // options in one handshake
	maxOptionData    = 32 << 10 // bytes of an option's data that are looked at: room for a name of maxString and much else
	maxOptionDiscard = 1 << 20  // bytes of an option's data that are skipped, to answer that they are too many
)

// errAborted ends a handshake in which the client says that it wants no export.
var errAborted = errors.New("client aborted the handshake")

// handshake is the negotiation phase of one connection: fixed newstyle.
type handshake struct {
	conn     net.Conn // TLS over it once that is initiated
	in       *bufio.Reader
	exports  exports
	security security
	secure   bool // TLS has been initiated
	noZeroes bool // the client does without the reserved zeroes
	agreed   terms
	selected selection
	out      []byte // the replies to the option at hand
}

// terms are what client and server have agreed on for the transmission phase.
type terms struct {
	replies  replyStyle
	contexts []metaContext // that the client wants to know of
}

// selection is the outcome of NBD_OPT_SET_META_CONTEXT.
type selection struct {
	export   string // its own name, whatever the client calls it
	contexts []metaContext
}

// choice is the outcome of a negotiation.
type choice struct {
	export Export
	info   Info
	terms  terms
}

// negotiate answers options until the client has chosen an export. It returns errAborted when the client wants none.
func (h *handshake) negotiate() (*choice, error) {
	if err := h.greet(); err != nil {
		return nil, err
	}
	for range maxOptions {
		chosen, err := h.option()
		if err != nil || chosen != nil {
			return chosen, err
		}
	}
	return nil, fmt.Errorf("%w: more than %d options", ErrProtocol, maxOptions)
}

// greet exchanges the flags of both sides.
func (h *handshake) greet() error {
	h.out = binary.BigEndian.AppendUint64(h.out, magicServer)
	h.out = binary.BigEndian.AppendUint64(h.out, magicOption)
	h.out = binary.BigEndian.AppendUint16(h.out, handshakeFixedNewstyle|handshakeNoZeroes)
	if err := h.send(); err != nil {
		return err
	}
	b, err := h.receive(4)
	if err != nil {
		return err
	}
	flags := binary.BigEndian.Uint32(b)
	if flags&^(clientFixedNewstyle|clientNoZeroes) != 0 {
		return fmt.Errorf("%w: client flags %#x", ErrProtocol, flags)
	}
	if flags&clientFixedNewstyle == 0 {
		if h.security.mandatory() {
			return fmt.Errorf("%w: no TLS without fixed newstyle negotiation", ErrProtocol)
		}
		h.security = security{}
	}
	h.noZeroes = flags&clientNoZeroes != 0
	return nil
}

// option receives one option and answers it. It returns an export once the client has chosen one.
func (h *handshake) option() (*choice, error) {
	header, err := h.receive(optionHeaderSize)
	if err != nil {
		return nil, err
	}
	magic := binary.BigEndian.Uint64(header)
	opt := option(binary.BigEndian.Uint32(header[8:]))
	length := binary.BigEndian.Uint32(header[12:])
	switch {
	case magic != magicOption:
		return nil, fmt.Errorf("%w: option magic %#x", ErrProtocol, magic)
	case length > maxOptionDiscard:
		return nil, fmt.Errorf("%w: option %d with %d bytes", ErrProtocol, opt, length)
	case length > maxOptionData:
		if _, err := h.in.Discard(int(length)); err != nil {
			return nil, dropped(err)
		}
		return nil, h.refuseLong(opt)
	}
	data, err := h.receive(int(length))
	if err != nil {
		return nil, err
	}
	if h.insecure() {
		return nil, h.insist(opt, data)
	}

	var chosen *choice
	switch opt {
	case optExportName:
		return h.exportName(string(data))
	case optAbort:
		return nil, h.abort()
	case optList:
		h.list(data)
	case optStartTLS:
		return nil, h.startTLS(data)
	case optInfo:
		_, err = h.describe(opt, data)
	case optGo:
		chosen, err = h.describe(opt, data)
	case optStructuredReply, optExtendedHeaders:
		h.upgrade(opt, data)
	case optListMetaContext, optSetMetaContext:
		h.contexts(opt, data)
	default:
		h.fail(opt, repErrUnsup, "unknown option")
	}
	if err != nil {
		return nil, err
	}
	return chosen, h.send()
}

// refuseLong answers an option whose data was too long to look at.
func (h *handshake) refuseLong(opt option) error {
	if h.insecure() && opt != optStartTLS {
		return h.insist(opt, nil)
	}
	switch opt {
	case optExportName:
		return fmt.Errorf("%w: the name of an export is too long", ErrProtocol)
	case optAbort:
		return h.abort()
	case optList, optStartTLS, optStructuredReply, optExtendedHeaders:
		h.fail(opt, repErrInvalid, "this option takes no data")
	case optSetMetaContext:
		h.selected = selection{} // also when the option fails
		h.fail(opt, repErrTooBig, "too much data")
	case optInfo, optGo, optListMetaContext:
		h.fail(opt, repErrTooBig, "too much data")
	default:
		h.fail(opt, repErrUnsup, "unknown option")
	}
	return h.send()
}

// exportName answers NBD_OPT_EXPORT_NAME, which knows no way to say no but to hang up.
func (h *handshake) exportName(name string) (*choice, error) {
	if h.agreed.replies == extendedReplies {
		return nil, fmt.Errorf("%w: NBD_OPT_EXPORT_NAME after extended headers", ErrProtocol)
	}
	export, ok := h.exports.find(name)
	if !ok {
		return nil, fmt.Errorf("%w: %.*q", ErrUnknownExport, maxString, name)
	}
	chosen, err := h.choose(export)
	if err != nil {
		return nil, err
	}
	h.out = appendExport(h.out, chosen)
	if !h.noZeroes {
		h.out = append(h.out, make([]byte, reservedZeroes)...)
	}
	return chosen, h.send()
}

// choose returns what the transmission phase with the export would be.
func (h *handshake) choose(export Export) (*choice, error) {
	info, err := inspect(export.Backend)
	if err != nil {
		return nil, err
	}
	chosen := &choice{export: export, info: info, terms: h.agreed}
	if h.selected.export == export.Name {
		chosen.terms.contexts = h.selected.contexts
	}
	return chosen, nil
}

// abort acknowledges NBD_OPT_ABORT to a client that may be gone already.
func (h *handshake) abort() error {
	h.reply(optAbort, repAck, nil)
	if err := h.send(); err != nil && !errors.Is(err, ErrDropped) {
		return err
	}
	return errAborted
}

// list answers NBD_OPT_LIST.
func (h *handshake) list(data []byte) {
	if len(data) != 0 {
		h.fail(optList, repErrInvalid, "this option takes no data")
		return
	}
	for _, e := range h.exports {
		entry := binary.BigEndian.AppendUint32(nil, uint32(len(e.Name)))
		entry = append(append(entry, e.Name...), e.Description...)
		h.reply(optList, repServer, entry)
	}
	h.reply(optList, repAck, nil)
}

// upgrade answers NBD_OPT_STRUCTURED_REPLY and NBD_OPT_EXTENDED_HEADERS.
func (h *handshake) upgrade(opt option, data []byte) {
	switch {
	case len(data) != 0:
		h.fail(opt, repErrInvalid, "this option takes no data")
	case opt == optExtendedHeaders:
		h.agreed.replies = extendedReplies
		h.reply(opt, repAck, nil)
	case h.agreed.replies == extendedReplies:
		h.fail(opt, repErrExtHeaderRequired, "extended headers are agreed on already")
	default:
		h.agreed.replies = structuredReplies
		h.reply(opt, repAck, nil)
	}
}

// contexts answers NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT.
func (h *handshake) contexts(opt option, data []byte) {
	if opt == optSetMetaContext {
		h.selected = selection{} // also when the option fails
	}
	if h.agreed.replies == simpleReplies {
		h.fail(opt, repErrInvalid, "agree on structured replies or extended headers first")
		return
	}
	query, ok := parseContextQuery(data)
	if !ok {
		h.fail(opt, repErrInvalid, "lengths do not add up, or a query names no namespace")
		return
	}
	export, ok := h.exports.find(query.export)
	if !ok {
		h.fail(opt, repErrUnknown, "no such export")
		return
	}
	known := export.Backend.Info().Contexts
	if opt == optListMetaContext {
		for _, name := range query.list(known) {
			h.context(opt, metaContext{name: name})
		}
	} else {
		h.selected = selection{export: export.Name, contexts: query.selected(known)}
		for _, c := range h.selected.contexts {
			h.context(opt, c)
		}
	}
	h.reply(opt, repAck, nil)
}

func (h *handshake) context(opt option, c metaContext) {
	h.reply(opt, repMetaContext, append(binary.BigEndian.AppendUint32(nil, c.id), c.name...))
}

// describe answers NBD_OPT_INFO and NBD_OPT_GO. The choice is nil where the answer is an error.
func (h *handshake) describe(opt option, data []byte) (*choice, error) {
	name, wanted, ok := parseInfoRequest(data)
	if !ok {
		h.fail(opt, repErrInvalid, "lengths do not add up")
		return nil, nil
	}
	export, ok := h.exports.find(name)
	if !ok {
		h.fail(opt, repErrUnknown, "no such export")
		return nil, nil
	}
	chosen, err := h.choose(export)
	if err != nil {
		return nil, err
	}

	h.inform(opt, infoExport, appendExport(nil, chosen))
	// Sent unasked, too: a client that asks for nothing should still learn which requests will fail.
	sizes := binary.BigEndian.AppendUint32(nil, chosen.info.MinimumBlock)
	sizes = binary.BigEndian.AppendUint32(sizes, chosen.info.PreferredBlock)
	h.inform(opt, infoBlockSize, binary.BigEndian.AppendUint32(sizes, MaxPayload))
	if wanted.name {
		h.inform(opt, infoName, []byte(export.Name))
	}
	if wanted.description && export.Description != "" {
		h.inform(opt, infoDescription, []byte(export.Description))
	}
	h.reply(opt, repAck, nil)
	return chosen, nil
}

// wantedInfo is what a client asks for beyond what it is told anyway.
type wantedInfo struct{ name, description bool }

// parseInfoRequest takes apart the data of NBD_OPT_INFO and NBD_OPT_GO: a length, a name, a count, as many item types.
func parseInfoRequest(data []byte) (name string, wanted wantedInfo, ok bool) {
	if len(data) < 4 {
		return "", wantedInfo{}, false
	}
	length, data := binary.BigEndian.Uint32(data), data[4:]
	if length > maxString || uint64(len(data)) < uint64(length)+2 {
		return "", wantedInfo{}, false
	}
	name, data = string(data[:length]), data[length:]
	count, data := binary.BigEndian.Uint16(data), data[2:]
	if len(data) != 2*int(count) {
		return "", wantedInfo{}, false
	}
	for ; len(data) > 0; data = data[2:] {
		switch binary.BigEndian.Uint16(data) {
		case infoName:
			wanted.name = true
		case infoDescription:
			wanted.description = true
		}
	}
	return name, wanted, true
}

// appendExport appends size and transmission flags, the form that all ways of choosing an export share.
func appendExport(b []byte, c *choice) []byte {
	flags := TransmissionFlags(c.info)
	if c.terms.replies != simpleReplies {
		flags |= FlagSendDF
	}
	if c.terms.replies == extendedReplies && len(c.terms.contexts) > 0 {
		flags |= FlagBlockStatusPayload
	}
	b = binary.BigEndian.AppendUint64(b, uint64(c.info.Size))
	return binary.BigEndian.AppendUint16(b, flags)
}

// inform adds one item of information to the replies.
func (h *handshake) inform(opt option, item uint16, payload []byte) {
	h.reply(opt, repInfo, append(binary.BigEndian.AppendUint16(nil, item), payload...))
}

// fail adds an error to the replies, with a text for the client's user.
func (h *handshake) fail(opt option, a answer, text string) { h.reply(opt, a, []byte(text)) }

func (h *handshake) reply(opt option, a answer, data []byte) {
	h.out = binary.BigEndian.AppendUint64(h.out, magicOptionReply)
	h.out = binary.BigEndian.AppendUint32(h.out, uint32(opt))
	h.out = binary.BigEndian.AppendUint32(h.out, uint32(a))
	h.out = binary.BigEndian.AppendUint32(h.out, uint32(len(data)))
	h.out = append(h.out, data...)
}

// send sends the collected replies.
func (h *handshake) send() error {
	_, err := h.conn.Write(h.out)
	h.out = h.out[:0]
	return dropped(err)
}

// receive returns the next n bytes, at most the size of the buffer. They are good until the next receive.
func (h *handshake) receive(n int) ([]byte, error) {
	b, err := h.in.Peek(n)
	if err != nil {
		return nil, dropped(err)
	}
	_, err = h.in.Discard(n)
	return b, err
}
