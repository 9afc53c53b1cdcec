package main

import (
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/qcow-csi/qcow-csi/nbdexport/nbdtest"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// TestExportSocketMode: whatever the umask, the socket has the permissions that it is to have, and never more.
func TestExportSocketMode(t *testing.T) {
	for _, umask := range []int{0, 0o22, 0o77} {
		old := syscall.Umask(umask)
		t.Cleanup(func() { syscall.Umask(old) })
		for mode, args := range map[fs.FileMode][]string{0o600: nil, 0o660: {"--socket-mode", "660"}, 0o777: {"--socket-mode", "0777"}} {
			socket := filepath.Join(t.TempDir(), "nbd.sock")
			e := mustExport(t, create(t), append(args, "--socket", socket)...)
			if info, err := os.Stat(socket); err != nil || info.Mode() != fs.ModeSocket|mode {
				t.Errorf("umask %04o, %q: %v, %v", umask, args, info.Mode(), err)
			}
			client := nbdtest.Dial(t, unixAddr(socket))
			client.Go("")
			e.end(t, client)
		}
	}
}

// TestSocketModeFromTheStart looks at the socket before its permissions are set by name.
func TestSocketModeFromTheStart(t *testing.T) {
	old := syscall.Umask(0)
	t.Cleanup(func() { syscall.Umask(old) })
	socket := filepath.Join(t.TempDir(), "nbd.sock")
	l, err := restricted(0o640).Listen(t.Context(), "unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if info, err := os.Stat(socket); err != nil || info.Mode().Perm() != 0o640 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
}

// TestExportSocketIsAFile: a name that begins with @ is one of a file, which has permissions, here.
func TestExportSocketIsAFile(t *testing.T) {
	image := create(t)
	t.Chdir(t.TempDir())
	e := mustExport(t, image, "--socket", "@nbd")
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	if want := "nbd+unix:///?socket=" + dir + "/%40nbd"; e.uri != want {
		t.Errorf("URI %s, want %s", e.uri, want)
	}
	client := nbdtest.Dial(t, unixAddr("./@nbd"))
	client.Go("")
	e.end(t, client)
	if got := names(t, "."); len(got) != 0 {
		t.Errorf("left %q", got)
	}
}

func TestExportAddresses(t *testing.T) {
	v6, err := net.Listen("tcp", "[::1]:0")
	require.Feature(t, err == nil, "needs IPv6 on the loopback interface")
	v6.Close()
	for _, c := range []struct{ bind, uri, reached, notReached string }{
		{"127.0.0.1", "nbd://127.0.0.1:", "127.0.0.1", "::1"},
		{"::1", "nbd://[::1]:", "::1", "127.0.0.1"},
		{"[::1]", "nbd://[::1]:", "::1", "127.0.0.1"},
		{"localhost", "nbd://", "localhost", ""},
		{"0.0.0.0", "nbd://0.0.0.0:", "127.0.0.1", "::1"},
		{"::", "nbd://[::]:", "127.0.0.1", ""},
		{"::", "nbd://[::]:", "::1", ""},
	} {
		said := captureLog(t)
		e := mustExport(t, create(t), "--bind", c.bind, "--port", "0")
		port := strings.TrimSuffix(e.uri[strings.LastIndex(e.uri, ":")+1:], "/")
		if !strings.HasPrefix(e.uri, c.uri) {
			t.Errorf("--bind %s: URI %s", c.bind, e.uri)
		}
		if c.notReached != "" {
			var dialer net.Dialer
			if conn, err := dialer.DialContext(t.Context(), "tcp", net.JoinHostPort(c.notReached, port)); err == nil {
				conn.Close()
				t.Errorf("--bind %s: reached at %s", c.bind, c.notReached)
			}
		}
		addr, err := net.ResolveTCPAddr("tcp", net.JoinHostPort(c.reached, port))
		if err != nil {
			t.Fatal(err)
		}
		client := nbdtest.Dial(t, addr)
		client.Go("")
		e.end(t, client)
		if warned := strings.Contains(said(), "there is no TLS"); warned != (c.bind == "0.0.0.0" || c.bind == "::") {
			t.Errorf("--bind %s: %s", c.bind, said())
		}
	}
}

func TestExportRefusesPlaces(t *testing.T) {
	image := create(t)
	for _, c := range []struct {
		says string
		args []string
	}{
		{"none of the others can be", []string{"--socket", "s", "--bind", "::1"}},
		{"none of the others can be", []string{"--socket", "s", "--socket-mode", "600", "--port", "1"}},
		{"--socket-mode needs --socket", []string{"--socket-mode", "600"}},
		{"octal number", []string{"--socket", "s", "--socket-mode", "800"}},
		{"octal number", []string{"--socket", "s", "--socket-mode", "1777"}},
		{"--socket is empty", []string{"--socket", ""}},
		{"--bind is empty", []string{"--bind", ""}},
		{"invalid argument", []string{"--port", "65536"}},
	} {
		if _, err := startExport(t, image, c.args...); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%q: %v, which does not say %q", c.args, err, c.says)
		}
	}
}

func TestExportURI(t *testing.T) {
	for _, c := range []struct {
		addr   net.Addr
		export string
		secure bool
		want   string
	}{
		{&net.TCPAddr{IP: net.IPv6loopback, Port: 1}, "", false, "nbd://[::1]:1/"},
		{&net.TCPAddr{IP: net.ParseIP("fe80::1"), Zone: "eth0", Port: 1}, "x y/z", true, "nbds://[fe80::1%25eth0]:1/x%20y/z"},
		{unixAddr("/run/a b+c%.sock"), "?", true, "nbds+unix:///%3F?socket=/run/a%20b%2Bc%25.sock"},
		{unixAddr("@hidden"), "", false, "nbd+unix:///?socket=%40hidden"},
	} {
		if got, err := exportURI(c.addr, c.export, c.secure); err != nil || got != c.want {
			t.Errorf("%v, %q: %s, %v; want %s", c.addr, c.export, got, err, c.want)
		}
	}
}
