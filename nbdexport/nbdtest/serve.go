package nbdtest

import (
	"context"
	"net"
	"path/filepath"
	"testing"
	"time"

	"github.com/qcow-csi/qcow-csi/nbdexport"
)

// Listen returns a listener of the network: "unix", in a folder of the test, or "tcp", on loopback.
func Listen(tb testing.TB, network string) net.Listener {
	tb.Helper()
	address := "127.0.0.1:0"
	if network == "unix" {
		address = filepath.Join(tb.TempDir(), "nbd.sock")
	}
	listener, err := net.Listen(network, address)
	if err != nil {
		tb.Fatal(err)
	}
	return listener
}

// Serve serves what config says at a socket of the network until the end of the test, which then makes sure that the
// server ends in order. What the test is to do afterwards, such as closing an image, it says (Cleanup) before.
func Serve(tb testing.TB, network string, config nbdexport.Config) net.Addr {
	tb.Helper()
	server, err := nbdexport.NewServer(config)
	if err != nil {
		tb.Fatal(err)
	}
	listener := Listen(tb, network)
	served := make(chan error, 1)
	go func() { served <- server.Serve(context.Background(), listener) }()
	tb.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := server.Shutdown(ctx); err != nil {
			tb.Errorf("Shutdown: %v", err)
		}
		if err := <-served; err != nil {
			tb.Errorf("Serve: %v", err)
		}
	})
	return listener.Addr()
}
