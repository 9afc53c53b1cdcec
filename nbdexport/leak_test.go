package nbdexport_test

import (
	"context"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/qcow-csi/qcow-csi/nbdexport"
	"github.com/qcow-csi/qcow-csi/nbdexport/nbdtest"
)

// descriptors is how many file descriptors this process has.
func descriptors(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// TestNothingLeaks has connections that end in every way, many times. No goroutine and no file descriptor is left of them.
func TestNothingLeaks(t *testing.T) {
	authority := nbdtest.NewAuthority(t)
	config := secured(authority, true)
	config.Exports = []nbdexport.Export{{Backend: newMemory(mib)}}
	for _, network := range []string{"unix", "tcp"} {
		t.Run(network, func(t *testing.T) {
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			listener, served := nbdtest.Listen(t, network), make(chan error, 1)
			server := newServer(t, config)
			go func() { served <- server.Serve(ctx, listener) }()
			time.Sleep(10 * time.Millisecond) // until it accepts
			goroutines, files := runtime.NumGoroutine(), descriptors(t)
			for range 30 {
				for _, end := range []func(*nbdtest.Client){
					func(*nbdtest.Client) {},
					func(c *nbdtest.Client) { c.Greet(3) },
					func(c *nbdtest.Client) { c.Greet(4) },
					func(c *nbdtest.Client) { c.Greet(3); c.Ask(nbdtest.OptAbort) },
					func(c *nbdtest.Client) { c.Greet(3); c.Ask(nbdtest.OptStartTLS); c.Send("no TLS") },
					func(c *nbdtest.Client) {
						c.Greet(3)
						if err := c.StartTLS(authority.Client(0)); err != nil {
							t.Error(err)
						}
						c.Choose("")
					},
					func(c *nbdtest.Client) { c.GoIn(nbdtest.Extended, ""); c.Disconnect() },
					func(c *nbdtest.Client) {
						c.Go("")
						c.Post(nbdtest.Request{Command: nbdtest.CmdRead, Length: mib}, nbdtest.Request{Command: nbdtest.CmdFlush})
					},
				} {
					client := nbdtest.Dial(t, listener.Addr())
					end(client)
					client.Close()
				}
			}
			deadline := time.Now().Add(10 * time.Second)
			const idle = 2 * 32 // ends of pipes that are kept for the next reply
			for runtime.NumGoroutine() > goroutines || descriptors(t) > files+idle {
				if time.Now().After(deadline) {
					t.Fatalf("%d goroutines, before %d; %d file descriptors, before %d", runtime.NumGoroutine(), goroutines, descriptors(t), files)
				}
				time.Sleep(10 * time.Millisecond)
			}
			cancel()
			if err := <-served; err != nil {
				t.Error(err)
			}
		})
	}
}
