package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"
)

// listening says where clients connect.
type listening struct {
	socket string
	mode   socketMode
	bind   string
	port   uint16
	given  func(flag string) bool
}

func (l *listening) addFlags(cmd *cobra.Command) {
	l.mode = 0o600
	flags := cmd.Flags()
	flags.StringVarP(&l.socket, "socket", "k", "", "path of a unix socket to listen on, instead of TCP")
	flags.Var(&l.mode, "socket-mode", "who may connect to the unix socket: its permissions")
	flags.StringVarP(&l.bind, "bind", "b", "127.0.0.1", "address to listen on, of IPv4 or of IPv6; ::, all of both")
	flags.Uint16VarP(&l.port, "port", "p", 10809, "TCP port to listen on; 0 takes a free one")
	for _, other := range []string{"bind", "port"} {
		cmd.MarkFlagsMutuallyExclusive("socket", other)
		cmd.MarkFlagsMutuallyExclusive("socket-mode", other)
	}
	l.given = flags.Changed
}

// socketMode is the permissions of a unix socket, as a flag.
type socketMode fs.FileMode

func (m *socketMode) String() string { return fmt.Sprintf("%04o", uint32(*m)) }
func (m *socketMode) Type() string   { return "mode" }

// Set implements pflag.Value.
func (m *socketMode) Set(s string) error {
	n, err := strconv.ParseUint(s, 8, 32)
	if err != nil || n > 0o777 {
		return errors.New("must be an octal number from 0 to 0777")
	}
	*m = socketMode(n)
	return nil
}

// listen makes the socket that clients connect to, or takes those that systemd has made.
func (l *listening) listen(ctx context.Context, secure bool) ([]net.Listener, error) {
	listeners, err := activated()
	switch {
	case err != nil:
		return nil, err
	case len(listeners) > 0 && slices.ContainsFunc([]string{"socket", "socket-mode", "bind", "port"}, l.given):
		for _, l := range listeners {
			l.Close()
		}
		return nil, errors.New("systemd has passed sockets to serve: --socket, --socket-mode, --bind and --port have no place")
	case len(listeners) > 0:
		return listeners, nil
	}
	listener, err := l.make(ctx)
	if err != nil {
		return nil, err
	}
	if a, ok := listener.Addr().(*net.TCPAddr); ok && !a.IP.IsLoopback() && !secure {
		klog.FromContext(ctx).Info("Whoever reaches this address can connect: there is no TLS", "address", a)
	}
	return []net.Listener{listener}, nil
}

func (l *listening) make(ctx context.Context) (net.Listener, error) {
	if l.socket != "" {
		return listenUnix(ctx, l.socket, fs.FileMode(l.mode))
	}
	switch {
	case l.given("socket"):
		return nil, errors.New("--socket is empty")
	case l.given("socket-mode"):
		return nil, errors.New("--socket-mode needs --socket")
	case l.bind == "":
		return nil, errors.New("--bind is empty; :: is all addresses")
	}
	host := strings.TrimSuffix(strings.TrimPrefix(l.bind, "["), "]")
	network := "tcp"
	if a, err := netip.ParseAddr(host); err == nil && a.Is4() {
		network = "tcp4" // 0.0.0.0 would be all addresses of IPv6, too
	}
	var config net.ListenConfig
	return config.Listen(ctx, network, net.JoinHostPort(host, strconv.Itoa(int(l.port))))
}

// listenUnix listens at path. At no moment can anybody connect whom the mode shuts out.
func listenUnix(ctx context.Context, path string, mode fs.FileMode) (net.Listener, error) {
	if strings.HasPrefix(path, "@") {
		path = "./" + path // else it would be the name of a socket that is in no file system, which has no permissions
	}
	const longest = len(syscall.RawSockaddrUnix{}.Path) - 1
	if len(path) > longest {
		return nil, fmt.Errorf("%s: the path of a socket has at most %d bytes", path, longest)
	}
	if err := removeStale(ctx, path); err != nil {
		return nil, err
	}
	listener, err := restricted(mode).Listen(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, mode); err != nil { // what the umask took
		listener.Close()
		return nil, err
	}
	return listener, nil
}

// restricted returns how to listen with a mode less the umask: that of a socket becomes that of its file.
func restricted(mode fs.FileMode) *net.ListenConfig {
	return &net.ListenConfig{Control: func(_, _ string, conn syscall.RawConn) error {
		var chmodErr error
		err := conn.Control(func(fd uintptr) { chmodErr = unix.Fchmod(int(fd), uint32(mode)) })
		return errors.Join(err, chmodErr)
	}}
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
