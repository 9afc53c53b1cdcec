package nbdexport_test

import (
	"bytes"
	"context"
	"errors"
	"net"
	"slices"
	"testing"

	"github.com/qcow-csi/qcow-csi/nbdexport"
	"github.com/qcow-csi/qcow-csi/nbdexport/nbdtest"
)

// session is everything that a client of a style sends, and the length of it up to which a write is not whole.
func session(style nbdtest.Style) (sent []byte, writeEnds int) {
	option := func(number uint32, data []byte) []byte {
		return nbdtest.Message(uint64(nbdtest.OptionMagic), number, uint32(len(data)), data)
	}
	sent = nbdtest.Message(uint32(3), option(nbdtest.OptList, nil), option(nbdtest.OptInfo, nbdtest.InfoRequest("disk", 1, 2, 3)))
	if style != nbdtest.Simple {
		number := map[nbdtest.Style]uint32{nbdtest.Structured: nbdtest.OptStructuredReply, nbdtest.Extended: nbdtest.OptExtendedHeaders}[style]
		sent = slices.Concat(sent, option(number, nil), option(nbdtest.OptListMetaContext, nbdtest.ContextQuery("disk")),
			option(nbdtest.OptSetMetaContext, nbdtest.ContextQuery("disk", alloc)))
	}
	sent = append(sent, option(nbdtest.OptGo, nbdtest.InfoRequest("disk", nbdtest.InfoBlockSize))...)
	for i, r := range []nbdtest.Request{
		{Command: nbdtest.CmdRead, Length: 1024},
		{Command: nbdtest.CmdBlockStatus, Length: 1024},
		{Command: nbdtest.CmdWrite, Offset: 512, Length: 64, Payload: bytes.Repeat([]byte{1}, 64)},
		{Command: nbdtest.CmdWriteZeroes, Offset: 4096, Length: 512},
		{Command: nbdtest.CmdFlush},
		{Command: nbdtest.CmdDisc},
	} {
		r.Cookie = uint64(i)
		sent = append(sent, r.EncodeIn(style)...)
		if r.Command == nbdtest.CmdWrite {
			writeEnds = len(sent)
		}
	}
	return sent, writeEnds
}

// TestCutAnywhere cuts the connection after every byte that a client sends, and after every byte that it receives.
func TestCutAnywhere(t *testing.T) {
	forEachStyle(t, func(t *testing.T, style nbdtest.Style) {
		sent, writeEnds := session(style)
		written := bytes.Repeat([]byte{1}, 64)
		for n := range len(sent) + 1 {
			b, err := cut(t, sent[:n], -1)
			if want := map[bool][]byte{false: make([]byte, 64), true: written}[n >= writeEnds]; !bytes.Equal(b.Bytes()[512:][:64], want) {
				t.Errorf("after %d bytes sent: the write is there: %t", n, !(n >= writeEnds))
			}
			if n < len(sent) && !errors.Is(err, nbdexport.ErrDropped) || n == len(sent) && err != nil {
				t.Errorf("after %d bytes sent: %v", n, err)
			}
		}
		for n := range 600 { // the server may notice or not
			if _, err := cut(t, sent, n); err != nil && !errors.Is(err, nbdexport.ErrDropped) {
				t.Errorf("after %d bytes received: %v", n, err)
			}
		}
	})
}

// cut sends what a client sends and receives so many bytes, or all of them until the server is done, and closes the
// connection. It returns what ServeConn does.
func cut(t *testing.T, sent []byte, receive int) (*nbdtest.Memory, error) {
	t.Helper()
	b := nbdtest.NewMemory(nbdexport.Info{Size: 64 << 10, Contexts: []string{alloc}})
	server := newServer(t, nbdexport.Config{Exports: []nbdexport.Export{{Name: "disk", Description: "a disk", Backend: b}}})
	near, far := socketPair(t)
	ended := make(chan error, 1)
	go func() { ended <- server.ServeConn(context.Background(), near) }()
	if _, err := far.Write(sent); err != nil {
		t.Fatal(err)
	}
	client := nbdtest.NewClient(t, far)
	if receive >= 0 {
		client.Receive(min(receive, 500))
	} else if err := far.(*net.UnixConn).CloseWrite(); err != nil {
		t.Fatal(err)
	} else {
		for p := make([]byte, 4096); ; {
			if _, err := far.Read(p); err != nil {
				break
			}
		}
	}
	if err := far.Close(); err != nil {
		t.Fatal(err)
	}
	return b, <-ended
}
