package nbdexport_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
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
	b := nbdtest.NewMemory(nbdexport.Info{Size: fuzzSize, MinimumBlock: 512})
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

func FuzzHandshake(f *testing.F) {
	option := func(opt uint32, data ...any) []byte {
		d := nbdtest.Message(data...)
		return nbdtest.Message(uint64(nbdtest.OptionMagic), opt, uint32(len(d)), d)
	}
	for _, seed := range [][]byte{
		{},
		nbdtest.Message(uint32(3), option(nbdtest.OptList), option(nbdtest.OptAbort)),
		nbdtest.Message(uint32(1), option(nbdtest.OptExportName, "disk"), nbdtest.Request{Length: 512}.Encode()),
		nbdtest.Message(uint32(3), option(nbdtest.OptInfo, nbdtest.InfoRequest("disk", 0, 1, 2, 3)),
			option(nbdtest.OptGo, nbdtest.InfoRequest("")), nbdtest.Request{Command: nbdtest.CmdDisc}.Encode()),
		nbdtest.Message(uint32(3), option(77, "what?"), option(nbdtest.OptGo, uint32(1<<31), uint16(1))),
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		server := newServer(t, nbdexport.Config{
			Exports: []nbdexport.Export{{Name: "disk", Description: "a disk", Backend: strict(t)}},
		})
		conn := &recorded{in: bytes.NewReader(in)}
		err := server.ServeConn(context.Background(), conn)
		if err != nil && !errors.Is(err, nbdexport.ErrDropped) && !errors.Is(err, nbdexport.ErrProtocol) &&
			!errors.Is(err, nbdexport.ErrUnknownExport) {
			t.Errorf("ServeConn: %v", err)
		}
		out := conn.out.Bytes()
		if !bytes.HasPrefix(out, []byte("NBDMAGICIHAVEOPT\x00\x03")) {
			t.Errorf("greeting % x", out)
		}
		// 64 options, each answered in less than 512 bytes, before a transmission whose reads are as small as the
		// export.
		if limit := 64*512 + len(in)/28*(16+fuzzSize); len(out) > limit {
			t.Errorf("%d bytes in, %d bytes out", len(in), len(out))
		}
	})
}

func FuzzTransmission(f *testing.F) {
	type request = nbdtest.Request
	for _, seed := range [][]request{
		{},
		{{Length: 512}, {Command: nbdtest.CmdWrite, Length: 512, Payload: make([]byte, 512)}, {Command: nbdtest.CmdDisc}},
		{{Command: nbdtest.CmdWrite, Length: 1000, Payload: make([]byte, 1000)}, {Command: nbdtest.CmdFlush}},
		{{Command: nbdtest.CmdTrim, Flags: 1, Length: fuzzSize}, {Command: nbdtest.CmdWriteZeroes, Flags: 2, Length: 512}},
		{{Offset: fuzzSize - 512, Length: 1024}, {Offset: 1<<64 - 1, Length: 1<<32 - 1}, {Command: 9}},
		{{Command: nbdtest.CmdWrite, Length: 1 << 30}},
		{{Magic: 1}},
	} {
		var b []byte
		for _, r := range seed {
			b = append(b, r.Encode()...)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		requests := number(in)
		conn := &recorded{in: bytes.NewReader(in)}
		err := nbdexport.ServeTransmission(context.Background(), conn, strict(t))
		if err != nil && !errors.Is(err, nbdexport.ErrDropped) && !errors.Is(err, nbdexport.ErrProtocol) {
			t.Errorf("ServeTransmission: %v", err)
		}
		if err := checkReplies(conn.out.Bytes(), requests); err != nil {
			t.Error(err)
		}
	})
}

// number finds the requests in a stream, as the specification divides it, and gives them their number as cookie. It
// returns those to which a reply is due.
func number(stream []byte) (requests []nbdtest.Request) {
	for len(stream) >= 28 && binary.BigEndian.Uint32(stream) == nbdtest.RequestMagic {
		r := nbdtest.Request{Command: binary.BigEndian.Uint16(stream[6:]), Length: binary.BigEndian.Uint32(stream[24:])}
		binary.BigEndian.PutUint64(stream[8:], uint64(len(requests)))
		stream = stream[28:]
		if r.Command == nbdtest.CmdDisc {
			break
		}
		if r.Command == nbdtest.CmdWrite {
			if uint64(len(stream)) < uint64(r.Length) {
				break
			}
			stream = stream[r.Length:]
		}
		requests = append(requests, r)
	}
	return requests
}

// checkReplies divides the replies to requests as a client would, and wants each exactly once.
func checkReplies(replies []byte, requests []nbdtest.Request) error {
	in := bytes.NewReader(replies)
	answered := make([]bool, len(requests))
	for range requests {
		var header struct {
			Magic, Error uint32
			Cookie       uint64
		}
		if err := binary.Read(in, binary.BigEndian, &header); err != nil {
			return fmt.Errorf("replies to %d requests: %w", len(requests), err)
		}
		if header.Magic != 0x67446698 || header.Cookie >= uint64(len(requests)) || answered[header.Cookie] {
			return fmt.Errorf("reply header %+v", header)
		}
		answered[header.Cookie] = true
		switch header.Error {
		case 0:
			if r := requests[header.Cookie]; r.Command == nbdtest.CmdRead {
				if n, err := io.CopyN(io.Discard, in, int64(r.Length)); err != nil {
					return fmt.Errorf("%d of %d bytes of data", n, r.Length)
				}
			}
		case 22, 28: // EINVAL, ENOSPC: the backend itself does not fail
		default:
			return fmt.Errorf("error %d", header.Error)
		}
	}
	if in.Len() != 0 {
		return fmt.Errorf("%d bytes after the replies", in.Len())
	}
	return nil
}
