package nbdexport_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/qcow-csi/qcow-csi/nbdexport"
	"github.com/qcow-csi/qcow-csi/nbdexport/nbdtest"
)

// running is a server with its listener.
type running struct {
	*nbdexport.Server
	addr   net.Addr
	cancel context.CancelFunc
	served chan error
}

func run(t *testing.T, network string, config nbdexport.Config) *running {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	listener := nbdtest.Listen(t, network)
	r := &running{newServer(t, config), listener.Addr(), cancel, make(chan error, 1)}
	go func() { r.served <- r.Serve(ctx, listener) }()
	return r
}

// TestShutdown shuts a server down under clients that write as fast as they can. Every write that
// reached the backend was either acknowledged or is among those that the client was still waiting for, and nothing
// comes later.
func TestShutdown(t *testing.T) {
	for _, network := range []string{"unix", "tcp"} {
		t.Run(network, func(t *testing.T) {
			var flushes atomic.Int32
			b := newMemory(mib)
			b.Before = func(op nbdtest.Operation) error {
				if op.Kind == nbdtest.Flush {
					flushes.Add(1)
				}
				return nil
			}
			r := run(t, network, offer(b))
			const clients = 4
			var acknowledged [clients]atomic.Uint32
			var gone sync.WaitGroup
			for i := range clients {
				client := nbdtest.Dial(t, r.addr)
				client.Go("")
				gone.Go(func() { // one request at a time, until the connection ends
					defer client.Close()
					for n := uint32(1); ; n++ {
						w := nbdtest.Request{
							Command: nbdtest.CmdWrite, Offset: uint64(i) * 512, Length: 512,
							Payload: append(nbdtest.Message(n), make([]byte, 508)...),
						}
						if _, err := client.Write(w.Encode()); err != nil {
							return
						}
						var reply [16]byte
						if got, err := client.Read(reply[:]); err != nil || got != len(reply) {
							return
						}
						acknowledged[i].Store(n)
					}
				})
			}
			for i := range clients {
				for acknowledged[i].Load() == 0 {
					time.Sleep(time.Millisecond)
				}
			}
			if err := r.Shutdown(t.Context()); err != nil {
				t.Errorf("Shutdown: %v", err)
			}
			if err := <-r.served; err != nil {
				t.Errorf("Serve: %v", err)
			}
			contents := b.Bytes()
			gone.Wait()
			if !bytes.Equal(contents, b.Bytes()) {
				t.Error("the backend changed after Shutdown")
			}
			for i := range clients {
				last := acknowledged[i].Load()
				// What was carried out last was answered too, in order: the client waits for one at a time.
				if want := nbdtest.Message(last); !bytes.Equal(contents[i*512:][:4], want) {
					t.Errorf("client %d has % x, and the backend % x", i, want, contents[i*512:][:4])
				}
			}
			if flushes.Load() == 0 {
				t.Error("Shutdown did not flush")
			}
			if conn, err := net.Dial(r.addr.Network(), r.addr.String()); err == nil {
				conn.Close()
				t.Error("the server still listens")
			}
		})
	}
}

func TestShutdownReportsFlush(t *testing.T) {
	b := newMemory(mib)
	b.Before = func(nbdtest.Operation) error { return syscall.EIO }
	if err := run(t, "unix", offer(b)).Shutdown(t.Context()); !errors.Is(err, syscall.EIO) {
		t.Errorf("Shutdown: %v, want EIO", err)
	}
}

// TestShutdownGivesUp has a request that does not end.
func TestShutdownGivesUp(t *testing.T) {
	begun, proceed := make(chan struct{}), make(chan struct{})
	b := newMemory(mib)
	b.Before = func(nbdtest.Operation) error {
		close(begun)
		<-proceed
		return nil
	}
	r := run(t, "unix", offer(b))
	client := nbdtest.Dial(t, r.addr)
	client.Go("")
	client.Send(nbdtest.Request{Command: nbdtest.CmdTrim, Length: 512}.Encode())
	<-begun
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := r.Shutdown(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("Shutdown: %v", err)
	}
	client.ReceiveEnd()
	select {
	case err := <-r.served:
		t.Errorf("Serve returned (%v) while a request is at work", err)
	default:
	}
	close(proceed)
	if err := <-r.served; err != nil {
		t.Errorf("Serve: %v", err)
	}
}

func TestClose(t *testing.T) {
	r := run(t, "unix", offer(newMemory(mib)))
	client, greeted := nbdtest.Dial(t, r.addr), nbdtest.Dial(t, r.addr)
	client.Go("")
	greeted.Greet(3)
	if err := r.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
	client.ReceiveEnd()
	greeted.ReceiveEnd()
	if err := <-r.served; err != nil {
		t.Errorf("Serve: %v", err)
	}
	// Nothing can be served any more, and what is passed in is closed.
	near, far := net.Pipe()
	if err := r.ServeConn(t.Context(), far); !errors.Is(err, nbdexport.ErrServerClosed) {
		t.Errorf("ServeConn: %v", err)
	}
	nbdtest.NewClient(t, near).ReceiveEnd()
	listener := nbdtest.Listen(t, "unix")
	if err := r.Serve(t.Context(), listener); err != nil {
		t.Errorf("Serve: %v", err)
	}
	if _, err := listener.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("the listener is open: %v", err)
	}
}

func TestContextEndsServe(t *testing.T) {
	r := run(t, "tcp", offer(newMemory(mib)))
	client, greeted := nbdtest.Dial(t, r.addr), nbdtest.Dial(t, r.addr)
	client.Go("")
	greeted.Greet(3)
	r.cancel()
	client.ReceiveEnd()
	client.Close()
	greeted.ReceiveEnd()
	if err := <-r.served; err != nil {
		t.Errorf("Serve: %v", err)
	}
	// The server itself goes on.
	near, far := net.Pipe()
	go func() { r.served <- r.ServeConn(context.Background(), far) }()
	other := nbdtest.NewClient(t, near)
	other.Go("")
	other.Disconnect()
	if err := <-r.served; err != nil {
		t.Errorf("ServeConn: %v", err)
	}
}

func TestServeReportsAccept(t *testing.T) {
	listener := nbdtest.Listen(t, "unix")
	listener.Close()
	if err := newServer(t, offer(newMemory(mib))).Serve(t.Context(), listener); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Serve: %v", err)
	}
}

// TestAcceptTriesAgain has a machine that has no file descriptors left for a moment.
func TestAcceptTriesAgain(t *testing.T) {
	listener := &shortOfFiles{Listener: nbdtest.Listen(t, "unix")}
	server := newServer(t, offer(newMemory(mib)))
	served := make(chan error, 1)
	go func() { served <- server.Serve(t.Context(), listener) }()
	client := nbdtest.Dial(t, listener.Addr())
	client.Go("")
	client.Disconnect()
	if err := server.Shutdown(t.Context()); err != nil {
		t.Errorf("Shutdown: %v", err)
	}
	if err := <-served; err != nil {
		t.Errorf("Serve: %v", err)
	}
}

type shortOfFiles struct {
	net.Listener
	failed atomic.Int32
}

func (l *shortOfFiles) Accept() (net.Conn, error) {
	if l.failed.Add(1) <= 2 {
		return nil, &net.OpError{Op: "accept", Err: syscall.EMFILE}
	}
	return l.Listener.Accept()
}

func TestMaxConnections(t *testing.T) {
	config := offer(newMemory(mib))
	config.MaxConnections = 2
	addr := nbdtest.Serve(t, "unix", config)
	first, second := nbdtest.Dial(t, addr), nbdtest.Dial(t, addr)
	first.Go("")
	second.Go("")
	third := nbdtest.Dial(t, addr)
	if err := third.SetReadDeadline(time.Now().Add(20 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if n, err := third.Read(make([]byte, 1)); n != 0 {
		t.Errorf("a third client was served (%v)", err)
	}
	if err := third.SetReadDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
	first.Disconnect()
	third.Go("")
	third.Disconnect()
	second.Disconnect()
}

func TestDisconnected(t *testing.T) {
	events := make(chan nbdexport.Disconnect)
	config := twoExports()
	config.Disconnected = func(d nbdexport.Disconnect) { events <- d }
	addr := nbdtest.Serve(t, "tcp", config)
	polite, rude, curious := nbdtest.Dial(t, addr), nbdtest.Dial(t, addr), nbdtest.Dial(t, addr)
	polite.Go("größer")
	rude.Go("")
	curious.Greet(3)
	for i, test := range []struct {
		client *nbdtest.Client
		leave  func()
		want   nbdexport.Disconnect
	}{
		{curious, func() { curious.SendOption(nbdtest.OptAbort) }, nbdexport.Disconnect{Remaining: 2}},
		{
			rude, func() { rude.Close() },
			nbdexport.Disconnect{Chosen: true, Export: "disk", Remaining: 1, Err: nbdexport.ErrDropped},
		},
		{polite, func() { polite.Disconnect() }, nbdexport.Disconnect{Chosen: true, Export: "größer"}},
	} {
		test.leave()
		got := <-events
		if got.Peer.String() != test.client.LocalAddr().String() || !errors.Is(got.Err, test.want.Err) ||
			got.Chosen != test.want.Chosen || got.Export != test.want.Export || got.Remaining != test.want.Remaining {
			t.Errorf("event %d: %+v, want %+v", i, got, test.want)
		}
	}
}

// TestManyConnections has many clients that each fill and check a part of one export, with random sizes.
func TestManyConnections(t *testing.T) {
	const clients, part = 32, 256 << 10
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	b := nbdtest.NewMemory(nbdexport.Info{Size: clients * part, MultiConn: true})
	addr := nbdtest.Serve(t, "unix", offer(b))
	var all sync.WaitGroup
	for i := range clients {
		client := nbdtest.Dial(t, addr)
		all.Go(func() {
			rng := rand.New(rand.NewPCG(seed, uint64(i)))
			model := make([]byte, part)
			client.GoIn(nbdtest.Styles[i%3], "")
			for n := range 100 {
				length := 1 + rng.IntN(part)
				if n%4 != 0 {
					length = 1 + rng.IntN(8192)
				}
				off := rng.IntN(part - length + 1)
				at, p := uint64(i*part+off), model[off:][:length]
				switch rng.IntN(4) {
				case 0, 1:
					for k := range p {
						p[k] = byte(rng.Uint32())
					}
					if err := client.WriteBytes(at, p); err != nil {
						t.Error(err)
					}
				case 2:
					clear(p)
					r := nbdtest.Request{Command: nbdtest.CmdWriteZeroes, Offset: at, Length: uint64(length)}
					if _, err := client.Do(r); err != nil {
						t.Error(err)
					}
				case 3:
					if got, err := client.ReadBytes(at, length); err != nil || !bytes.Equal(got, p) {
						t.Errorf("client %d: %d bytes at %d: %v, or other data", i, length, off, err)
					}
				}
			}
			client.Disconnect()
			if !bytes.Equal(b.Bytes()[i*part:][:part], model) {
				t.Errorf("client %d: the contents differ", i)
			}
		})
	}
	all.Wait()
}

// TestStuckClientsDoNotHoldUpTheEnd stops a server whose clients send requests and take no replies: at once, and in order but
// with a limit of time.
func TestStuckClientsDoNotHoldUpTheEnd(t *testing.T) {
	authority := nbdtest.NewAuthority(t)
	for _, way := range []string{"unix", "tcp", "TLS"} {
		for name, end := range map[string]func(*running) error{
			"Close": func(r *running) error { return r.Close() },
			"Shutdown": func(r *running) error {
				ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
				defer cancel()
				if err := r.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) {
					return fmt.Errorf("Shutdown: %w", err)
				}
				return nil
			},
		} {
			t.Run(name+"/"+way, func(t *testing.T) {
				config, network := secured(authority, true), way
				config.Exports = offer(newMemory(8 * mib)).Exports
				if way == "TLS" {
					network = "tcp"
				}
				r := run(t, network, config)
				for _, style := range nbdtest.Styles {
					client := nbdtest.Dial(t, r.addr)
					client.Greet(3)
					if way == "TLS" {
						if err := client.StartTLS(authority.Client(0)); err != nil {
							t.Fatal(err)
						}
					}
					client.Agree(style)
					client.Choose("")
					read := nbdtest.Request{Command: nbdtest.CmdRead, Flags: map[bool]uint16{true: nbdtest.FlagDF}[style != nbdtest.Simple], Length: 8 * mib}
					client.Send(bytes.Repeat(read.EncodeIn(style), 16))
				}
				time.Sleep(50 * time.Millisecond) // the replies fill the sockets
				begin := time.Now()
				if err := end(r); err != nil {
					t.Error(err)
				}
				if err := <-r.served; err != nil {
					t.Errorf("Serve: %v", err)
				}
				if d := time.Since(begin); d > 3*time.Second {
					t.Errorf("the end took %v", d)
				}
			})
		}
	}
}
