package nbdexport_test

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/qcow-csi/qcow-csi/nbdexport"
	"github.com/qcow-csi/qcow-csi/nbdexport/nbdtest"
)

// socketPair returns both ends of a connection as the kernel client has it.
func socketPair(t *testing.T) (server, client net.Conn) {
	t.Helper()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socket")
		if ends[i], err = net.FileConn(f); err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
	return ends[0], ends[1]
}

// transmission is a running ServeTransmission.
type transmission struct {
	*nbdtest.Client
	cancel context.CancelFunc
	server net.Conn
	ended  chan error
}

func transmit(t *testing.T, b nbdexport.Backend) *transmission {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	server, client := socketPair(t)
	tr := &transmission{nbdtest.NewClient(t, client), cancel, server, make(chan error, 1)}
	go func() { tr.ended <- nbdexport.ServeTransmission(ctx, server, b) }()
	t.Cleanup(cancel)
	return tr
}

func (tr *transmission) wantEnd(t *testing.T, want error) {
	t.Helper()
	if err := <-tr.ended; !errors.Is(err, want) {
		t.Errorf("ServeTransmission: %v, want %v", err, want)
	}
	if _, err := tr.server.Write([]byte{0}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("the connection is not closed: %v", err)
	}
}

func TestEndOfTransmission(t *testing.T) {
	half := nbdtest.Request{Command: nbdtest.CmdWrite, Length: 4096, Payload: make([]byte, 2048)}.Encode()
	for name, test := range map[string]struct {
		send  []byte
		close bool
		want  error
	}{
		"goodbye":             {nbdtest.Request{Command: nbdtest.CmdDisc}.Encode(), false, nil},
		"goodbye with flags":  {nbdtest.Request{Command: nbdtest.CmdDisc, Flags: 0xffff, Length: 5}.Encode(), false, nil},
		"drop":                {nil, true, nbdexport.ErrDropped},
		"drop in a header":    {half[:27], true, nbdexport.ErrDropped},
		"drop after a header": {half[:28], true, nbdexport.ErrDropped},
		"drop in a payload":   {half, true, nbdexport.ErrDropped},
		"wrong magic":         {nbdtest.Request{Magic: 0x25609514, Length: 512}.Encode(), false, nbdexport.ErrProtocol},
		"noise":               {bytes.Repeat([]byte("noise"), 10), false, nbdexport.ErrProtocol},
	} {
		t.Run(name, func(t *testing.T) {
			tr := transmit(t, newMemory(mib))
			if err := tr.WriteBytes(0, []byte("before")); err != nil {
				t.Error(err)
			}
			tr.Send(test.send)
			if test.close {
				tr.Close()
			}
			tr.wantEnd(t, test.want)
		})
	}
}

func TestServeTransmissionRefusesBackend(t *testing.T) {
	tr := transmit(t, describedAs{newMemory(mib), nbdexport.Info{MinimumBlock: 3}})
	if err := <-tr.ended; err == nil {
		t.Error("served an export with blocks of 3 bytes")
	}
	tr.ReceiveEnd()
}

// TestPartialWriteIsNotApplied cuts writes of several sizes off at many places.
func TestPartialWriteIsNotApplied(t *testing.T) {
	b := newMemory(mib)
	before := bytes.Repeat([]byte{0x11}, mib)
	if _, err := b.WriteAt(before, 0); err != nil {
		t.Fatal(err)
	}
	for _, size := range []int{512, 4096, 64 << 10, 256 << 10} {
		r := nbdtest.Request{
			Command: nbdtest.CmdWrite, Flags: nbdtest.FlagFUA, Offset: 512, Length: uint64(size),
			Payload: bytes.Repeat([]byte{0x22}, size),
		}
		for _, flags := range []uint16{0, nbdtest.FlagFUA} {
			r.Flags = flags
			whole := r.Encode()
			for _, missing := range []int{1, size / 2, size - 1, size, size + 1} {
				tr := transmit(t, b)
				tr.Send(whole[:len(whole)-missing])
				tr.Close()
				tr.wantEnd(t, nbdexport.ErrDropped)
				if !bytes.Equal(b.Bytes(), before) {
					t.Fatalf("%d of %d bytes were applied", size-missing, size)
				}
			}
		}
	}
}

// TestNothingAtWorkAfterReturn has clients that go away, in every way there is, while requests are at work.
func TestNothingAtWorkAfterReturn(t *testing.T) {
	for name, leave := range map[string]func(*transmission){
		"goodbye":     func(tr *transmission) { tr.Send(nbdtest.Request{Command: nbdtest.CmdDisc}.Encode()) },
		"drop":        func(tr *transmission) { tr.Close() },
		"wrong magic": func(tr *transmission) { tr.Send(make([]byte, 28)) },
		"context":     func(tr *transmission) { tr.cancel() },
	} {
		t.Run(name, func(t *testing.T) {
			const requests = 12
			var atWork, done atomic.Int32
			arrived, proceed := make(chan struct{}, requests), make(chan struct{})
			b := newMemory(mib)
			b.Before = func(nbdtest.Operation) error {
				atWork.Add(1)
				arrived <- struct{}{}
				<-proceed
				atWork.Add(-1)
				done.Add(1)
				return nil
			}
			tr := transmit(t, b)
			for i := range requests {
				tr.Send(nbdtest.Request{Command: nbdtest.CmdTrim, Cookie: uint64(i), Length: 512}.Encode())
			}
			for range requests {
				<-arrived
			}
			leave(tr)
			select {
			case err := <-tr.ended:
				t.Fatalf("returned (%v) while %d requests were at work", err, atWork.Load())
			case <-time.After(20 * time.Millisecond): // a chance to be wrong, no proof of being right
			}
			close(proceed)
			if err := <-tr.ended; name == "goodbye" && err != nil {
				t.Errorf("ServeTransmission: %v", err)
			}
			if n := atWork.Load(); n != 0 {
				t.Errorf("%d requests at work after the return", n)
			}
			if n := done.Load(); n != requests {
				t.Errorf("%d requests carried out, want %d", n, requests)
			}
		})
	}
}

// TestContextEndsInOrder ends the context of a transmission with requests at work and others waiting in the socket:
// what was sent before is answered.
func TestContextEndsInOrder(t *testing.T) {
	const requests = 100
	begun, proceed := make(chan struct{}), make(chan struct{})
	b := newMemory(mib)
	var first atomic.Bool
	b.Before = func(op nbdtest.Operation) error {
		if first.CompareAndSwap(false, true) {
			close(begun)
			<-proceed
		}
		return nil
	}
	tr := transmit(t, b)
	payload := bytes.Repeat([]byte{7}, 512)
	for i := range requests {
		tr.Post(nbdtest.Request{
			Command: nbdtest.CmdWrite, Cookie: uint64(i), Offset: uint64(i) * 512, Length: 512, Payload: payload,
		})
	}
	<-begun
	tr.cancel()
	close(proceed)
	for range requests {
		if reply := tr.Await(); reply.Err != nil {
			t.Errorf("request %d: %v", reply.Cookie, reply.Err)
		}
	}
	tr.ReceiveEnd()
	tr.wantEnd(t, context.Canceled)
	if !bytes.Equal(b.Bytes()[:requests*512], bytes.Repeat(payload, requests)) {
		t.Error("what was acknowledged is not there")
	}
}

// TestContextEndsIdle ends the context of a connection on which nothing happens.
func TestContextEndsIdle(t *testing.T) {
	tr := transmit(t, newMemory(mib))
	tr.cancel()
	tr.ReceiveEnd()
	tr.wantEnd(t, context.Canceled)
}

// TestClientDoesNotRead has a client that sends reads and takes no reply. What the server holds for it stays
// bounded, and ends when the client goes away.
func TestClientDoesNotRead(t *testing.T) {
	const length = 8 << 20
	var begun atomic.Int64
	b := newMemory(length)
	b.Before = func(nbdtest.Operation) error { begun.Add(1); return nil }
	tr := transmit(t, b)
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		r := nbdtest.Request{Command: nbdtest.CmdRead, Length: length}.Encode()
		for range 10_000 {
			if _, err := tr.Write(r); err != nil {
				return
			}
		}
	}()
	for begun.Load() < 4 { // 32 MiB
		time.Sleep(time.Millisecond)
	}
	tr.Close()
	if err := <-tr.ended; err == nil {
		t.Error("no error")
	}
	<-sent
	if n := begun.Load(); n > 5 {
		t.Errorf("%d reads of 8 MiB were carried out for a client that took no reply", n)
	}
}

// TestSlowHandshakeEnds has clients that are slower than the handshake may be.
func TestSlowHandshakeEnds(t *testing.T) {
	for name, send := range map[string]string{
		"silent":            "",
		"flags only":        "\x00\x00\x00\x03",
		"part of an option": "\x00\x00\x00\x03IHAVE",
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				server := newServer(t, nbdexport.Config{Exports: []nbdexport.Export{{Backend: newMemory(mib)}}})
				near, far := net.Pipe()
				ended := make(chan error, 1)
				begin := time.Now()
				go func() { ended <- server.ServeConn(t.Context(), far) }()
				client := nbdtest.NewClient(t, near)
				client.Receive(18)
				client.Send(send)
				if err := <-ended; !errors.Is(err, os.ErrDeadlineExceeded) {
					t.Errorf("ServeConn: %v", err)
				}
				if d := time.Since(begin); d != 10*time.Second {
					t.Errorf("ended after %v", d)
				}
			})
		})
	}
}

// TestDripHandshakeEnds has a client that sends a byte every second, and so is never silent for long.
func TestDripHandshakeEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := newServer(t, nbdexport.Config{
			Exports:          []nbdexport.Export{{Backend: newMemory(mib)}},
			HandshakeTimeout: 5 * time.Second,
		})
		near, far := net.Pipe()
		ended := make(chan error, 1)
		go func() { ended <- server.ServeConn(t.Context(), far) }()
		client := nbdtest.NewClient(t, near)
		client.Receive(18)
		option := nbdtest.Message(uint32(3), uint64(nbdtest.OptionMagic), uint32(nbdtest.OptList), uint32(0))
		for i, b := range option {
			if _, err := client.Write([]byte{b}); err != nil {
				if i < 4 || i > 6 {
					t.Errorf("the server hung up after %d seconds", i)
				}
				break
			}
			time.Sleep(time.Second)
		}
		if err := <-ended; !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("ServeConn: %v", err)
		}
	})
}

// TestNoDeadlineAfterHandshake has a client that sleeps for a day between two requests.
func TestNoDeadlineAfterHandshake(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := newServer(t, nbdexport.Config{Exports: []nbdexport.Export{{Backend: newMemory(mib)}}})
		near, far := net.Pipe()
		ended := make(chan error, 1)
		go func() { ended <- server.ServeConn(t.Context(), far) }()
		client := nbdtest.NewClient(t, near)
		client.Go("")
		for range 2 {
			if _, err := client.ReadBytes(0, 512); err != nil {
				t.Error(err)
			}
			time.Sleep(24 * time.Hour)
		}
		client.Disconnect()
		if err := <-ended; err != nil {
			t.Errorf("ServeConn: %v", err)
		}
	})
}
