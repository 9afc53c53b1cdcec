package nbdexport_test

import (
	"context"
	"errors"
	"syscall"
	"testing"
	"time"

	"github.com/qcow-csi/qcow-csi/nbdexport"
	"github.com/qcow-csi/qcow-csi/nbdexport/nbdtest"
)

// TestShutdownInEveryPhase shuts down a server whose client is somewhere on its way.
func TestShutdownInEveryPhase(t *testing.T) {
	authority := nbdtest.NewAuthority(t)
	secure := func(c *nbdtest.Client) {
		if err := c.StartTLS(authority.Client(0)); err != nil {
			t.Error(err)
		}
	}
	for name, advance := range map[string]func(*nbdtest.Client){
		"connected":                func(*nbdtest.Client) {},
		"greeted":                  func(c *nbdtest.Client) { c.Greet(3) },
		"in the client flags":      func(c *nbdtest.Client) { c.Receive(18); c.Send([]byte{0, 0}) },
		"in an option":             func(c *nbdtest.Client) { c.Greet(3); c.Send(uint64(nbdtest.OptionMagic)) },
		"in the data of an option": func(c *nbdtest.Client) { c.Greet(3); c.Send(uint64(nbdtest.OptionMagic), uint32(7), uint32(100), "a") },
		"after an option":          func(c *nbdtest.Client) { c.Greet(3); c.Agree(nbdtest.Structured) },
		"before TLS":               func(c *nbdtest.Client) { c.Greet(3); c.Ask(nbdtest.OptStartTLS) },
		"in TLS":                   func(c *nbdtest.Client) { c.Greet(3); secure(c) },
		"in transmission":          func(c *nbdtest.Client) { c.Go("") },
		"in a request":             func(c *nbdtest.Client) { c.Go(""); c.Send(uint32(nbdtest.RequestMagic)) },
		"in a payload": func(c *nbdtest.Client) {
			c.Go("")
			c.Send(nbdtest.Request{Command: nbdtest.CmdWrite, Length: 4096, Payload: make([]byte, 100)}.Encode())
		},
		"in a long payload": func(c *nbdtest.Client) {
			c.GoIn(nbdtest.Extended, "")
			c.Send(nbdtest.Request{Command: nbdtest.CmdWrite, Length: 1 << 20, Payload: make([]byte, 1<<19)}.EncodeIn(nbdtest.Extended))
		},
		"in transmission over TLS": func(c *nbdtest.Client) { c.Greet(3); secure(c); c.Choose("") },
		"in a request over TLS": func(c *nbdtest.Client) {
			c.Greet(3)
			secure(c)
			c.Choose("")
			c.Send(uint32(nbdtest.RequestMagic))
		},
	} {
		for _, network := range []string{"unix", "tcp"} {
			t.Run(name+"/"+network, func(t *testing.T) {
				b := newMemory(2 * mib)
				config := secured(authority, true)
				config.Exports = offer(b).Exports
				r := run(t, network, config)
				client := nbdtest.Dial(t, r.addr)
				advance(client)
				gone := make(chan struct{})
				go func() { // some answer may still come, and then the end
					defer close(gone)
					defer client.Close()
					for p := make([]byte, 4096); ; {
						if _, err := client.Read(p); err != nil {
							return
						}
					}
				}()
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
				defer cancel()
				if err := r.Shutdown(ctx); err != nil {
					t.Errorf("Shutdown: %v", err)
				}
				if err := <-r.served; err != nil {
					t.Errorf("Serve: %v", err)
				}
				<-gone
			})
		}
	}
}

// TestSizeChanges has an export that grows while clients of all styles use it, and one that is asked about again.
func TestSizeChanges(t *testing.T) {
	b := nbdtest.NewMemory(nbdexport.Info{Size: mib, Contexts: []string{alloc}})
	addr := nbdtest.Serve(t, "unix", offer(b))
	conns := make(map[nbdtest.Style]*nbdtest.Client)
	for _, style := range nbdtest.Styles {
		conns[style] = nbdtest.Dial(t, addr)
		var contexts []string
		if style != nbdtest.Simple {
			contexts = []string{alloc}
		}
		conns[style].GoIn(style, "", contexts...)
	}
	beyond := map[syscall.Errno][]nbdtest.Request{
		syscall.EINVAL: {
			{Command: nbdtest.CmdRead, Offset: mib, Length: 512},
			{Command: nbdtest.CmdTrim, Offset: mib - 512, Length: 1024},
			{Command: nbdtest.CmdCache, Offset: mib, Length: 512},
		},
		syscall.ENOSPC: {
			{Command: nbdtest.CmdWrite, Offset: mib, Length: 4, Payload: []byte("more")},
			{Command: nbdtest.CmdWriteZeroes, Offset: mib, Length: 512},
		},
	}
	each := func(check func(*nbdtest.Client, nbdtest.Request, syscall.Errno)) {
		for style, client := range conns {
			for number, requests := range beyond {
				for _, r := range requests {
					check(client, r, number)
				}
			}
			if style != nbdtest.Simple {
				check(client, nbdtest.Request{Command: nbdtest.CmdBlockStatus, Offset: mib - 512, Length: 1024}, syscall.EINVAL)
			}
		}
	}
	each(func(client *nbdtest.Client, r nbdtest.Request, number syscall.Errno) {
		if reply := client.Exchange(r); !errors.Is(reply.Err, number) {
			t.Errorf("%v: command %d past the end: %v", client.Style, r.Command, reply.Err)
		}
	})
	b.Grow(2 * mib)
	each(func(client *nbdtest.Client, r nbdtest.Request, _ syscall.Errno) {
		if reply := client.Exchange(r); reply.Err != nil {
			t.Errorf("%v: command %d after growing: %v", client.Style, r.Command, reply.Err)
		}
	})
	for _, client := range conns {
		if _, err := client.ReadBytes(2*mib-1, 2); !errors.Is(err, syscall.EINVAL) {
			t.Errorf("%v: read past the new end: %v", client.Style, err)
		}
	}
	if e := nbdtest.Dial(t, addr).Go(""); e.Size != 2*mib {
		t.Errorf("a new client is told of %d bytes", e.Size)
	}
}
