package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"
)

// activationVariables are what systemd says of the sockets that it passes (sd_listen_fds(3)).
var activationVariables = []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"}

// isActivated says whether systemd has passed sockets to this process.
func isActivated() bool {
	return os.Getenv("LISTEN_PID") == strconv.Itoa(os.Getpid()) && os.Getenv("LISTEN_FDS") != ""
}

// activated returns the sockets that systemd has passed, if any. It takes them: a second call returns none.
func activated() (listeners []net.Listener, err error) {
	if !isActivated() {
		return nil, nil
	}
	count, err := strconv.Atoi(os.Getenv("LISTEN_FDS"))
	if err != nil || count < 0 {
		return nil, fmt.Errorf("LISTEN_FDS is %q, which is no number of sockets", os.Getenv("LISTEN_FDS"))
	}
	names := strings.Split(os.Getenv("LISTEN_FDNAMES"), ":")
	for _, v := range activationVariables {
		if err := os.Unsetenv(v); err != nil {
			return nil, err
		}
	}
	defer func() {
		if err != nil {
			for _, l := range listeners {
				l.Close()
			}
			listeners = nil
		}
	}()
	const first = 3 // SD_LISTEN_FDS_START
	for i := range count {
		name := strconv.Itoa(first + i)
		if i < len(names) && names[i] != "" {
			name += " (" + names[i] + ")"
		}
		l, err := inherited(first+i, name)
		if err != nil {
			return listeners, fmt.Errorf("file descriptor %s, which systemd has passed: %w", name, err)
		}
		listeners = append(listeners, l)
	}
	return listeners, nil
}

// inherited returns the listener that fd is.
func inherited(fd int, name string) (net.Listener, error) {
	unix.CloseOnExec(fd)
	f := os.NewFile(uintptr(fd), name)
	defer f.Close() //nolint:errcheck // the listener has its own
	switch listens, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN); {
	case err != nil:
		return nil, os.NewSyscallError("getsockopt", err)
	case listens == 0:
		return nil, errors.New("it does not listen: the socket's unit needs Accept=no, and a stream")
	}
	return net.FileListener(f)
}

// notify tells systemd, or whoever else has started the server and wants to know, about its state (sd_notify(3)).
func notify(ctx context.Context, state string) {
	socket := os.Getenv("NOTIFY_SOCKET")
	if socket == "" {
		return
	}
	err := func() error {
		var dialer net.Dialer
		conn, err := dialer.DialContext(context.WithoutCancel(ctx), "unixgram", socket)
		if err != nil {
			return err
		}
		_, err = conn.Write([]byte(state))
		return errors.Join(err, conn.Close())
	}()
	if err != nil {
		klog.FromContext(ctx).Error(err, "Systemd was not told", "state", state)
	}
}
