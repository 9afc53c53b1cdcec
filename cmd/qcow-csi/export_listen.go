package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strconv"
	"syscall"
)

// listen makes the socket that clients connect to.
func (e *export) listen(ctx context.Context) (net.Listener, error) {
	var config net.ListenConfig
	if e.socket == "" {
		return config.Listen(ctx, "tcp", net.JoinHostPort(e.bind, strconv.Itoa(int(e.port))))
	}
	const longest = len(syscall.RawSockaddrUnix{}.Path) - 1
	if len(e.socket) > longest {
		return nil, fmt.Errorf("%s: the path of a socket has at most %d bytes", e.socket, longest)
	}
	if err := removeStale(ctx, e.socket); err != nil {
		return nil, err
	}
	return config.Listen(ctx, "unix", e.socket)
}

// removeStale removes the socket that a server which did not end in order has left at path. Anything else that is
// there, and a socket at which somebody listens, stays, and is an error.
func removeStale(ctx context.Context, path string) error {
	switch info, err := os.Lstat(path); {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case info.Mode().Type() != fs.ModeSocket:
		return fmt.Errorf("%s: exists, and is not a socket", path)
	}
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, "unix", path)
	switch {
	case err == nil:
		conn.Close()
		return fmt.Errorf("%s: another server listens there", path)
	case errors.Is(err, syscall.ECONNREFUSED):
		return os.Remove(path)
	default:
		return err
	}
}
