package nbdtest

import (
	"crypto/tls"
	"encoding/binary"
)

// Ask sends an option with its data and returns the replies to it.
func (c *Client) Ask(option uint32, data ...any) []OptionReply {
	c.tb.Helper()
	c.SendOption(option, data...)
	return c.ReceiveOptionReplies(option)
}

// Agree makes the server use the style.
func (c *Client) Agree(s Style) {
	c.tb.Helper()
	if s == Simple {
		return
	}
	option := map[Style]uint32{Structured: OptStructuredReply, Extended: OptExtendedHeaders}[s]
	if replies := c.Ask(option); len(replies) != 1 || replies[0].Type != RepAck || len(replies[0].Data) != 0 {
		c.tb.Fatalf("replies to option %d: %+v", option, replies)
	}
	c.Style = s
}

// ContextQuery is the data of OptListMetaContext and OptSetMetaContext.
func ContextQuery(export string, queries ...string) []byte {
	b := Message(uint32(len(export)), export, uint32(len(queries)))
	for _, q := range queries {
		b = append(b, Message(uint32(len(q)), q)...)
	}
	return b
}

// SetContexts selects metadata contexts. It returns those that the server knows, with their identifiers, and the type of
// the final reply.
func (c *Client) SetContexts(export string, queries ...string) (map[string]uint32, uint32) {
	c.tb.Helper()
	found, final := c.contexts(OptSetMetaContext, export, queries)
	c.Contexts = nil
	if final == RepAck {
		for _, id := range found {
			c.Contexts = append(c.Contexts, id)
		}
	}
	return found, final
}

// ListContexts asks which metadata contexts there are.
func (c *Client) ListContexts(export string, queries ...string) (map[string]uint32, uint32) {
	c.tb.Helper()
	return c.contexts(OptListMetaContext, export, queries)
}

func (c *Client) contexts(option uint32, export string, queries []string) (map[string]uint32, uint32) {
	c.tb.Helper()
	replies := c.Ask(option, ContextQuery(export, queries...))
	final, found, ids := replies[len(replies)-1], make(map[string]uint32), make(map[uint32]bool)
	for _, r := range replies[:len(replies)-1] {
		if r.Type != RepMetaContext || len(r.Data) < 5 {
			c.tb.Fatalf("reply %+v to option %d", r, option)
		}
		name, id := string(r.Data[4:]), binary.BigEndian.Uint32(r.Data)
		if _, again := found[name]; again || option == OptSetMetaContext && ids[id] {
			c.tb.Fatalf("context %d, %q, comes twice", id, name)
		}
		found[name], ids[id] = id, true
	}
	return found, final.Type
}

// StartTLS makes the connection a TLS one. Everything negotiated before is forgotten on both sides. It returns what is
// wrong with the handshake of TLS.
func (c *Client) StartTLS(config *tls.Config) error {
	c.tb.Helper()
	if replies := c.Ask(OptStartTLS); len(replies) != 1 || replies[0].Type != RepAck || len(replies[0].Data) != 0 {
		c.tb.Fatalf("replies to STARTTLS: %+v", replies)
	}
	conn := tls.Client(c.Conn, config)
	if err := conn.Handshake(); err != nil {
		return err
	}
	c.Conn, c.Ledger = conn, Ledger{}
	return nil
}
