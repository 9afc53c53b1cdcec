package nbdexport

import (
	"crypto/tls"
	"errors"
	"fmt"
)

// ErrInsecure: the client wanted an export without TLS, which the server insists on, in the way that leaves no other
// answer than hanging up.
var ErrInsecure = errors.New("TLS is required")

// security says whether clients can, or must, use TLS (section "TLS support" of the specification): without a config they
// can't (NOTLS), with an optional one they can (SELECTIVETLS), else they must (FORCEDTLS).
type security struct {
	config   *tls.Config
	optional bool
}

func (s security) mandatory() bool { return s.config != nil && !s.optional }

// insecure says whether the client has to initiate TLS before anything else.
func (h *handshake) insecure() bool { return h.security.mandatory() && !h.secure }

// insist answers an option of a client that has not initiated TLS, and must.
func (h *handshake) insist(opt option, data []byte) error {
	switch opt {
	case optStartTLS:
		return h.startTLS(data)
	case optAbort:
		return h.abort()
	case optExportName:
		return ErrInsecure
	default:
		h.fail(opt, repErrTLSRequired, "initiate TLS first")
		return h.send()
	}
}

// startTLS answers NBD_OPT_STARTTLS. Nothing that was agreed on before counts afterwards, and nothing that was received
// before is looked at: somebody between the client and the server may have said it.
func (h *handshake) startTLS(data []byte) error {
	switch {
	case len(data) != 0:
		h.fail(optStartTLS, repErrInvalid, "this option takes no data")
		return h.send()
	case h.security.config == nil:
		h.fail(optStartTLS, repErrUnsup, "this server has no TLS")
		return h.send()
	case h.secure:
		h.fail(optStartTLS, repErrInvalid, "TLS has been initiated already")
		return h.send()
	case h.in.Buffered() > 0:
		return fmt.Errorf("%w: data behind NBD_OPT_STARTTLS", ErrProtocol)
	}
	h.reply(optStartTLS, repAck, nil)
	if err := h.send(); err != nil {
		return err
	}
	conn := tls.Server(h.conn, h.security.config)
	if err := conn.Handshake(); err != nil {
		return fmt.Errorf("TLS: %w", dropped(err))
	}
	h.conn = conn
	h.in.Reset(conn)
	h.secure = true
	h.agreed, h.selected = terms{}, selection{}
	return nil
}
