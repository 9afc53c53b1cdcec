package nbdexport_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"net"
	"runtime/debug"
	"slices"
	"testing"
	"time"

	"github.com/qcow-csi/qcow-csi/nbdexport"
	"github.com/qcow-csi/qcow-csi/nbdexport/nbdtest"
)

// recorded is a connection whose other end has sent everything already, and keeps what it receives.
type recorded struct {
	in  *bytes.Reader
	out bytes.Buffer
}

func (r *recorded) Read(p []byte) (int, error)       { return r.in.Read(p) }
func (r *recorded) Write(p []byte) (int, error)      { return r.out.Write(p) }
func (r *recorded) Close() error                     { return nil }
func (r *recorded) LocalAddr() net.Addr              { return &net.UnixAddr{} }
func (r *recorded) RemoteAddr() net.Addr             { return &net.UnixAddr{} }
func (r *recorded) SetDeadline(time.Time) error      { return nil }
func (r *recorded) SetReadDeadline(time.Time) error  { return nil }
func (r *recorded) SetWriteDeadline(time.Time) error { return nil }

// fuzzSize is small, so that chance finds its end.
const fuzzSize = 8 << 10

// strict is a backend that refuses to be called in a way that the server must not call it.
func strict(t *testing.T) *nbdtest.Memory {
	b := nbdtest.NewMemory(nbdexport.Info{Size: fuzzSize, MinimumBlock: 512, FastZero: true, Contexts: []string{alloc, dirty}})
	b.Before = func(op nbdtest.Operation) error {
		end := op.Offset + op.Length
		if op.Offset < 0 || op.Length < 0 || end > fuzzSize || (op.Offset|op.Length)%512 != 0 {
			t.Errorf("backend called with %+v", op)
		}
		if op.Length == 0 && op.Kind != nbdtest.Flush {
			t.Errorf("backend called for nothing: %+v", op)
		}
		return nil
	}
	return b
}

// strictly serves a strict backend to a client that has sent everything already, and checks the whole dialogue.
func strictly(t *testing.T, secure *tls.Config, in []byte) {
	t.Helper()
	server := newServer(t, nbdexport.Config{
		Exports: []nbdexport.Export{
			{Name: "disk", Description: "a disk", Backend: strict(t)}, {Name: "other", Backend: strict(t)},
		},
		TLS: secure, TLSOptional: true,
	})
	conn := &recorded{in: bytes.NewReader(in)}
	err := server.ServeConn(context.Background(), conn)
	d := dialogue{in: in, out: conn.out.Bytes()}
	if fault := d.check(); fault != nil {
		t.Error(fault)
	}
	if secure == nil && !isProtocolEnd(err) { // crypto/tls has errors of its own
		t.Errorf("ServeConn: %v", err)
	}
}

func option(opt uint32, data ...any) []byte {
	d := nbdtest.Message(data...)
	return nbdtest.Message(uint64(nbdtest.OptionMagic), opt, uint32(len(d)), d)
}

// opening is what a client sends up to the transmission phase.
func opening(style nbdtest.Style, contexts ...string) []byte {
	b := nbdtest.Message(uint32(3))
	if style != nbdtest.Simple {
		number := map[nbdtest.Style]uint32{nbdtest.Structured: nbdtest.OptStructuredReply, nbdtest.Extended: nbdtest.OptExtendedHeaders}[style]
		b = slices.Concat(b, option(number), option(nbdtest.OptSetMetaContext, nbdtest.ContextQuery("disk", contexts...)))
	}
	return append(b, option(nbdtest.OptGo, nbdtest.InfoRequest("disk", nbdtest.InfoBlockSize))...)
}

// sparingly keeps the memory of a fuzzer low: buffers of connections would pile up until they are collected.
func sparingly(f *testing.F) {
	f.Helper()
	before := debug.SetMemoryLimit(64 << 20)
	f.Cleanup(func() { debug.SetMemoryLimit(before) })
}

func FuzzHandshake(f *testing.F) {
	sparingly(f)
	secure := &tls.Config{Certificates: []tls.Certificate{nbdtest.NewAuthority(f).Server}}
	for _, seed := range [][]byte{
		{},
		nbdtest.Message(uint32(3), option(nbdtest.OptList), option(nbdtest.OptAbort)),
		nbdtest.Message(uint32(1), option(nbdtest.OptExportName, "disk"), nbdtest.Request{Length: 512}.Encode()),
		nbdtest.Message(uint32(3), option(nbdtest.OptInfo, nbdtest.InfoRequest("disk", 0, 1, 2, 3)),
			option(nbdtest.OptGo, nbdtest.InfoRequest("")), nbdtest.Request{Command: nbdtest.CmdDisc}.Encode()),
		nbdtest.Message(uint32(3), option(77, "what?"), option(nbdtest.OptGo, uint32(1<<31), uint16(1))),
		nbdtest.Message(uint32(3), option(nbdtest.OptStructuredReply),
			option(nbdtest.OptListMetaContext, nbdtest.ContextQuery("disk")), option(nbdtest.OptSetMetaContext, nbdtest.ContextQuery("", alloc, dirty)),
			option(nbdtest.OptGo, nbdtest.InfoRequest("disk")), nbdtest.Request{Command: nbdtest.CmdBlockStatus, Length: 4096}.Encode()),
		append(opening(nbdtest.Extended, alloc), nbdtest.Request{Command: nbdtest.CmdRead, Length: 4096}.EncodeIn(nbdtest.Extended)...),
		nbdtest.Message(uint32(3), option(nbdtest.OptStartTLS, "x"), option(nbdtest.OptStartTLS)),
		nbdtest.Message(uint32(3), option(nbdtest.OptExtendedHeaders), option(nbdtest.OptStructuredReply), option(nbdtest.OptExportName, "disk")),
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, in []byte) { strictly(t, secure, in) })
}

func FuzzTransmission(f *testing.F) {
	sparingly(f)
	type request = nbdtest.Request
	for _, seed := range [][]request{
		{},
		{{Length: 512}, {Command: nbdtest.CmdWrite, Length: 512, Payload: make([]byte, 512)}, {Command: nbdtest.CmdDisc}},
		{{Command: nbdtest.CmdWrite, Length: 1000, Payload: make([]byte, 1000)}, {Command: nbdtest.CmdFlush}},
		{{Command: nbdtest.CmdTrim, Flags: 1, Length: fuzzSize}, {Command: nbdtest.CmdWriteZeroes, Flags: 2, Length: 512}},
		{{Offset: fuzzSize - 512, Length: 1024}, {Offset: 1<<64 - 1, Length: 1<<32 - 1}, {Command: 9}},
		{{Command: nbdtest.CmdWrite, Offset: 1024, Length: 512, Payload: make([]byte, 512)}, {Length: fuzzSize}, {Flags: nbdtest.FlagDF, Length: 4096}},
		{{Command: nbdtest.CmdBlockStatus, Length: fuzzSize}, {Command: nbdtest.CmdBlockStatus, Flags: nbdtest.FlagReqOne, Length: 512}},
		{{Command: nbdtest.CmdBlockStatus, Flags: nbdtest.FlagPayloadLen, Length: 12, Payload: nbdtest.Message(uint64(1024), uint32(1))}},
		{{Command: nbdtest.CmdCache, Length: fuzzSize}, {Command: nbdtest.CmdWriteZeroes, Flags: nbdtest.FlagFastZero, Length: 1024}},
		{{Command: nbdtest.CmdWrite, Length: 1 << 30}},
		{{Magic: 1}},
	} {
		for _, style := range nbdtest.Styles {
			var b []byte
			for _, r := range seed {
				b = append(b, r.EncodeIn(style)...)
			}
			f.Add(uint8(style), b)
		}
	}
	f.Fuzz(func(t *testing.T, number uint8, in []byte) {
		style := nbdtest.Style(number % 3)
		in = bytes.Clone(in)
		requestsIn(in, style, true)
		strictly(t, nil, append(opening(style, alloc, dirty), in...))
	})
}
