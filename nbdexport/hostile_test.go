package nbdexport_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/qcow-csi/qcow-csi/nbdexport"
	"github.com/qcow-csi/qcow-csi/nbdexport/nbdtest"
)

// works makes sure that a new client of addr is served, and soon.
func works(t *testing.T, addr net.Addr) {
	t.Helper()
	client := nbdtest.Dial(t, addr)
	if err := client.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	client.GoIn(nbdtest.Extended, "")
	if err := client.WriteBytes(4096, []byte("works")); err != nil {
		t.Error(err)
	}
	if got, err := client.ReadBytes(4096, 5); err != nil || string(got) != "works" {
		t.Errorf("read %q, %v", got, err)
	}
	client.Disconnect()
}

// TestSlowLoris has many clients that are slow in the handshake. Others are served meanwhile, as long as there are
// connections left, and as soon as the deadline has ended the slow ones where there are not.
func TestSlowLoris(t *testing.T) {
	const slow = 40
	for name, limit := range map[string]int{"connections left": slow + 1, "none left": slow / 2} {
		t.Run(name, func(t *testing.T) {
			config := offer(newMemory(mib))
			config.MaxConnections, config.HandshakeTimeout = limit, time.Second
			var ended atomic.Int32
			config.Disconnected = func(d nbdexport.Disconnect) {
				if errors.Is(d.Err, os.ErrDeadlineExceeded) {
					ended.Add(1)
				}
			}
			addr := nbdtest.Serve(t, "unix", config)
			flood := nbdtest.Message(uint32(3), bytes.Repeat(nbdtest.Message(uint64(nbdtest.OptionMagic), uint32(99), uint32(0)), 4))
			for i := range slow {
				conn, err := net.Dial(addr.Network(), addr.String())
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				go func() { // a byte now and then
					for _, b := range flood[:i] {
						if _, err := conn.Write([]byte{b}); err != nil {
							return
						}
						time.Sleep(50 * time.Millisecond)
					}
				}()
			}
			begin := time.Now()
			works(t, addr)
			if d := time.Since(begin); limit > slow && d > 900*time.Millisecond {
				t.Errorf("another client was served after %v", d)
			}
			for deadline := time.Now().Add(10 * time.Second); ended.Load() < slow; time.Sleep(10 * time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatalf("%d of %d slow clients were ended", ended.Load(), slow)
				}
			}
		})
	}
}

// heap is the memory in use, in bytes.
func heap() int64 {
	runtime.GC()
	runtime.GC() // the second empties the pools
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// TestClientsNeverRead has clients that send requests and take no reply. Each may hold what the documentation of the
// package says, 40 MiB.
func TestClientsNeverRead(t *testing.T) {
	const clients, bound = 3, nbdexport.MaxPayload + 8*mib
	b := nbdtest.NewMemory(nbdexport.Info{Size: nbdexport.MaxPayload, Contexts: []string{alloc}})
	for off := int64(0); off < 16*mib; off += 1024 { // many extents
		if _, err := b.WriteAt([]byte{1}, off); err != nil {
			t.Fatal(err)
		}
	}
	for name, r := range map[string]nbdtest.Request{
		"small reads":       {Command: nbdtest.CmdRead, Length: 4096},
		"long reads":        {Command: nbdtest.CmdRead, Length: mib},
		"reads of odd size": {Command: nbdtest.CmdRead, Length: 2*mib + 512},
		"whole reads":       {Command: nbdtest.CmdRead, Flags: nbdtest.FlagDF, Length: 8 * mib},
		"largest reads":     {Command: nbdtest.CmdRead, Length: nbdexport.MaxPayload},
		"writes":            {Command: nbdtest.CmdWrite, Length: 4096, Payload: make([]byte, 4096)},
		"flushes":           {Command: nbdtest.CmdFlush},
		"cache":             {Command: nbdtest.CmdCache, Offset: 16 * mib, Length: 64 << 10},
		"wrong requests":    {Command: 77},
		"block status":      {Command: nbdtest.CmdBlockStatus, Length: 16 * mib},
	} {
		t.Run(name, func(t *testing.T) {
			forEachStyle(t, func(t *testing.T, style nbdtest.Style) {
				addr := nbdtest.Serve(t, "unix", offer(b))
				var contexts []string
				if style != nbdtest.Simple {
					contexts = []string{alloc}
				}
				before := heap()
				requests := bytes.Repeat(r.EncodeIn(style), max(1, 16<<10/max(len(r.Payload), 1)))
				var sent atomic.Int64
				for range clients {
					client := nbdtest.Dial(t, addr)
					client.GoIn(style, "", contexts...)
					defer client.Close()
					go func() {
						for {
							n, err := client.Write(requests)
							sent.Add(int64(n))
							if err != nil {
								return
							}
						}
					}()
				}
				for last := int64(-1); last != sent.Load(); { // until nobody can send any more
					last = sent.Load()
					time.Sleep(100 * time.Millisecond)
				}
				if used := heap() - before; used > clients*bound {
					t.Errorf("%d MiB for %d clients, want at most %d MiB", used/mib, clients, clients*int64(bound)/mib)
				} else {
					t.Logf("%d MiB for %d clients", used/mib, clients)
				}
				works(t, addr)
			})
		})
	}
}

// TestGarbage has clients that send noise, or what somebody else's protocol begins with.
func TestGarbage(t *testing.T) {
	addr := nbdtest.Serve(t, "unix", contextual())
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	noise := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16)})
	for range 200 {
		p := make([]byte, 4096)
		if _, err := noise.Read(p); err != nil {
			t.Fatal(err)
		}
		for _, start := range [][]byte{
			nil,
			{0, 0, 0, 3},
			nbdtest.Message(uint32(3), uint64(nbdtest.OptionMagic)),
			nbdtest.Message(uint32(3), uint64(nbdtest.OptionMagic), uint32(nbdtest.OptSetMetaContext), uint32(4000)),
		} {
			conn, err := net.Dial(addr.Network(), addr.String())
			if err != nil {
				t.Fatal(err)
			}
			_, _ = conn.Write(slices.Concat(start, p)) // the server may be gone already
			_ = conn.(*net.UnixConn).CloseWrite()
			_, _ = io.Copy(io.Discard, conn)
			conn.Close()
		}
	}
	works(t, addr)
}

// TestLongNames has names of 64 KiB wherever there are names.
func TestLongNames(t *testing.T) {
	const long = 64 << 10
	name := string(bytes.Repeat([]byte("x"), long))
	addr := nbdtest.Serve(t, "unix", contextual())
	for what, test := range map[string]struct {
		option uint32
		data   []byte
		want   uint32
	}{
		"info":               {nbdtest.OptInfo, nbdtest.InfoRequest(name), nbdtest.RepErrTooBig},
		"go":                 {nbdtest.OptGo, nbdtest.InfoRequest(name), nbdtest.RepErrTooBig},
		"go, 4097":           {nbdtest.OptGo, nbdtest.InfoRequest(name[:4097]), nbdtest.RepErrInvalid},
		"go, 4096":           {nbdtest.OptGo, nbdtest.InfoRequest(name[:4096]), nbdtest.RepErrUnknown},
		"go, many items":     {nbdtest.OptGo, nbdtest.InfoRequest("disk", make([]uint16, 1<<16-1)...), nbdtest.RepErrTooBig},
		"list contexts":      {nbdtest.OptListMetaContext, nbdtest.ContextQuery(name), nbdtest.RepErrTooBig},
		"set contexts":       {nbdtest.OptSetMetaContext, nbdtest.ContextQuery("disk", "base:"+name), nbdtest.RepErrTooBig},
		"set contexts, 4097": {nbdtest.OptSetMetaContext, nbdtest.ContextQuery(name[:4097]), nbdtest.RepErrInvalid},
		"set contexts, 4096": {nbdtest.OptSetMetaContext, nbdtest.ContextQuery(name[:4096]), nbdtest.RepErrUnknown},
	} {
		client := nbdtest.Dial(t, addr)
		client.Greet(3)
		client.Agree(nbdtest.Structured)
		if replies := client.Ask(test.option, test.data); len(replies) != 1 || replies[0].Type != test.want || len(replies[0].Data) > 4096 {
			t.Errorf("%s: %+v, want %#x", what, replies, test.want)
		}
		client.Choose("disk")
		client.Disconnect()
	}
	client := nbdtest.Dial(t, addr)
	client.Greet(3)
	client.SendOption(nbdtest.OptExportName, name)
	client.ReceiveEnd()
	works(t, addr)
}

// TestHalfClosed has clients that end their sending side and wait for the replies to what they have sent.
func TestHalfClosed(t *testing.T) {
	for _, network := range []string{"unix", "tcp"} {
		forEachStyle(t, func(t *testing.T, style nbdtest.Style) {
			client := nbdtest.Dial(t, nbdtest.Serve(t, network, offer(newMemory(2*mib))))
			client.GoIn(style, "")
			for i := range uint64(100) {
				client.Post(nbdtest.Request{Command: nbdtest.CmdRead, Cookie: i, Length: 4096 << (i % 8)})
			}
			if err := client.Conn.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
				t.Fatal(err)
			}
			for range 100 {
				if reply := client.Await(); reply.Err != nil {
					t.Error(reply.Err)
				}
			}
			client.ReceiveEnd()
		})
	}
}

// TestPayloadNeverComes has writes whose payload does not follow. They hold up their own connection only, and change nothing.
func TestPayloadNeverComes(t *testing.T) {
	b := newMemory(nbdexport.MaxPayload)
	addr := nbdtest.Serve(t, "unix", offer(b))
	before := b.Bytes()
	before[4096], before[4097], before[4098], before[4099], before[4100] = 'w', 'o', 'r', 'k', 's'
	for _, style := range nbdtest.Styles {
		for _, n := range []uint64{512, 64 << 10, nbdexport.MaxPayload} {
			client := nbdtest.Dial(t, addr)
			client.GoIn(style, "")
			client.Send(nbdtest.Request{Command: nbdtest.CmdWrite, Length: n, Payload: bytes.Repeat([]byte{1}, int(n)-1)}.EncodeIn(style))
			works(t, addr)
			client.Close()
		}
	}
	if !bytes.Equal(b.Bytes(), before) {
		t.Error("a write without its payload changed something")
	}
}

// TestDescriptorsExhausted takes all file descriptors from the server, and gives them back.
func TestDescriptorsExhausted(t *testing.T) {
	addr := nbdtest.Serve(t, "unix", offer(newMemory(mib)))
	old := nbdtest.Dial(t, addr)
	old.GoIn(nbdtest.Structured, "")

	const clients = 4
	var sockets [clients]int
	highest := 0
	for i := range sockets {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		sockets[i], highest = fd, max(highest, fd)
	}
	var fillers []int // of gaps below the highest number
	for {
		fd, err := unix.Dup(sockets[0])
		if err != nil {
			t.Fatal(err)
		}
		if fillers = append(fillers, fd); fd > highest {
			break
		}
	}
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	low := limit
	low.Cur = uint64(fillers[len(fillers)-1]) + 1
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &low); err != nil {
		t.Fatal(err)
	}
	restored := false
	restore := func() {
		if !restored {
			restored = true
			if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
				t.Error(err)
			}
			for _, fd := range fillers {
				_ = unix.Close(fd)
			}
		}
	}
	defer restore()
	for _, fd := range sockets {
		if err := unix.Connect(fd, &unix.SockaddrUnix{Name: addr.String()}); err != nil {
			t.Fatal(err)
		}
	}
	time.Sleep(200 * time.Millisecond) // the server tries in vain
	if err := old.WriteBytes(0, []byte("still here")); err != nil {
		t.Error(err)
	}
	restore()
	for _, fd := range sockets {
		f := os.NewFile(uintptr(fd), "socket")
		conn, err := net.FileConn(f)
		if err := errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
		client := nbdtest.NewClient(t, conn)
		client.Go("")
		client.Disconnect()
	}
	old.Disconnect()
}

// TestHandshakeRepliesAreNotRead has clients that ask for long lists, again and again, and take none of them.
func TestHandshakeRepliesAreNotRead(t *testing.T) {
	const clients = 8
	config := nbdexport.Config{HandshakeTimeout: time.Second}
	for i := range 400 {
		config.Exports = append(config.Exports, nbdexport.Export{
			Name: fmt.Sprint(i), Description: strings.Repeat("x", 4000), Backend: &hollow{info: nbdexport.Info{Size: mib}},
		})
	}
	config.Exports[0].Backend = newMemory(mib)
	ended := make(chan error, clients+1)
	config.Disconnected = func(d nbdexport.Disconnect) { ended <- d.Err }
	addr := nbdtest.Serve(t, "unix", config)
	before := heap()
	for range clients {
		client := nbdtest.Dial(t, addr)
		client.Greet(3)
		client.Send(bytes.Repeat(option(nbdtest.OptList), 63))
	}
	works(t, addr)
	if err := <-ended; err != nil { // of the one that works
		t.Error(err)
	}
	if used := heap() - before; used > clients*8*mib {
		t.Errorf("%d MiB for %d clients", used/mib, clients)
	}
	for range clients {
		if err := <-ended; !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("ended with %v", err)
		}
	}
}
