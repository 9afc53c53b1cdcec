package driver

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc"
	"k8s.io/klog/v2"
)

// Listen makes the unix socket that endpoint names, "unix:///run/csi.sock" or "unix:/run/csi.sock". The socket of a
// process that is gone is replaced; one that somebody answers on is not.
func Listen(ctx context.Context, endpoint string) (net.Listener, error) {
	path, ok := strings.CutPrefix(endpoint, "unix:")
	path = strings.TrimPrefix(path, "//")
	if !ok || !strings.HasPrefix(path, "/") {
		return nil, fmt.Errorf("endpoint %q is not unix:///path/of/a/socket", endpoint)
	}
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
	case err != nil:
		return nil, fmt.Errorf("endpoint: %w", err)
	case info.Mode()&os.ModeSocket == 0:
		return nil, fmt.Errorf("endpoint: %s exists and is no socket", path)
	default:
		dialer := net.Dialer{Timeout: time.Second}
		if conn, err := dialer.DialContext(ctx, "unix", path); err == nil {
			conn.Close()
			return nil, fmt.Errorf("endpoint: another process serves %s", path)
		}
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("endpoint: %w", err)
		}
	}
	var lc net.ListenConfig
	listener, err := lc.Listen(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("endpoint: %w", err)
	}
	return listener, nil
}

// Serve answers calls on listener, which it closes, until ctx ends. Then it takes no more calls and waits for those
// that are running, at most for grace; it cancels what takes longer.
func (d *Driver) Serve(ctx context.Context, listener net.Listener, grace time.Duration) error {
	server := grpc.NewServer(grpc.UnaryInterceptor((&calls{logger: klog.FromContext(ctx)}).intercept))
	d.Register(server)
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(listener) }()
	select {
	case err := <-failed:
		return fmt.Errorf("serve %s: %w", listener.Addr(), err)
	case <-ctx.Done():
	}
	timer := time.AfterFunc(grace, server.Stop)
	defer timer.Stop()
	server.GracefulStop()
	if err := <-failed; err != nil && !errors.Is(err, grpc.ErrServerStopped) { // said when ctx was over at the start
		return fmt.Errorf("serve %s: %w", listener.Addr(), err)
	}
	return nil
}
