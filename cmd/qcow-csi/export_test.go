package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/qcow-csi/qcow-csi/nbdexport/nbdtest"
	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// exporting is a running export command.
type exporting struct {
	uri    string             // of the first export
	said   []string           // one line for each export
	signal context.CancelFunc // as SIGTERM does
	ended  chan error
}

// startExport runs the export command until it says where it listens, or ends.
func startExport(t *testing.T, image string, args ...string) (*exporting, error) {
	t.Helper()
	e, err := startExports(t, append([]string{image}, args...)...)
	if err != nil {
		return nil, err
	}
	uri, ok := strings.CutPrefix(e.said[0], image+": ")
	if !ok {
		t.Fatalf("export says %q", e.said)
	}
	e.uri = uri
	return e, nil
}

// startExports is startExport without an image that comes first.
func startExports(t *testing.T, args ...string) (*exporting, error) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(cancel)
	out, stdout := io.Pipe()
	cmd := newExportCommand()
	cmd.SilenceErrors, cmd.SilenceUsage = true, true // as the root command does
	cmd.SetOut(stdout)
	cmd.SetArgs(args)
	e := &exporting{signal: cancel, ended: make(chan error, 1)}
	go func() {
		err := cmd.ExecuteContext(ctx)
		e.ended <- err
		_ = stdout.CloseWithError(err) // never fails
	}()
	said := make([]byte, 64<<10)
	n, err := out.Read(said)
	if err != nil {
		return nil, <-e.ended
	}
	e.said = strings.Split(strings.TrimSuffix(string(said[:n]), "\n"), "\n")
	return e, nil
}

func mustExport(t *testing.T, image string, args ...string) *exporting {
	t.Helper()
	e, err := startExport(t, image, args...)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// wantEnd waits for the command to end well.
func (e *exporting) wantEnd(t *testing.T) {
	t.Helper()
	if err := <-e.ended; err != nil {
		t.Errorf("export: %v", err)
	}
}

func unixAddr(path string) net.Addr { return &net.UnixAddr{Net: "unix", Name: path} }

func TestExportUntilLastClientLeaves(t *testing.T) {
	image, socket := create(t), filepath.Join(t.TempDir(), "a b&c.sock")
	e := mustExport(t, image, "--socket", socket, "--export-name", "my disk", "-D", "for tests")
	if want := "nbd+unix:///my%20disk?socket=" + strings.NewReplacer(" ", "%20", "&", "%26").Replace(socket); e.uri != want {
		t.Errorf("URI %s, want %s", e.uri, want)
	}
	curious, first, second := nbdtest.Dial(t, unixAddr(socket)), nbdtest.Dial(t, unixAddr(socket)), nbdtest.Dial(t, unixAddr(socket))
	curious.Greet(3)
	curious.SendOption(nbdtest.OptAbort) // who never chooses an export does not count
	curious.ReceiveOptionReplies(nbdtest.OptAbort)
	curious.ReceiveEnd()
	if x := first.Go("my disk"); x.Size != 10<<20 {
		t.Errorf("size %d", x.Size)
	}
	second.Go("")
	first.Disconnect()
	if err := second.WriteBytes(1000, []byte("kept")); err != nil {
		t.Error(err)
	}
	second.Disconnect()
	e.wantEnd(t)
	if _, err := os.Lstat(socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}
	mustImage(t, "check", image)

	e = mustExport(t, image, "--socket", socket)
	client := nbdtest.Dial(t, unixAddr(socket))
	client.Go("")
	if got, err := client.ReadBytes(1000, 4); err != nil || string(got) != "kept" {
		t.Errorf("read %q, %v", got, err)
	}
	client.Disconnect()
	e.wantEnd(t)
}

func TestExportPersistentUntilSignal(t *testing.T) {
	image, pidFile := create(t), filepath.Join(t.TempDir(), "pid")
	e := mustExport(t, image, "--port", "0", "--persistent", "--pid-file", pidFile)
	address, ok := strings.CutPrefix(e.uri, "nbd://")
	if !ok || !strings.HasPrefix(address, "127.0.0.1:") {
		t.Fatalf("URI %s", e.uri)
	}
	addr, err := net.ResolveTCPAddr("tcp", strings.TrimSuffix(address, "/"))
	if err != nil {
		t.Fatal(err)
	}
	if pid, err := os.ReadFile(pidFile); err != nil || string(pid) != fmt.Sprintln(os.Getpid()) {
		t.Errorf("pid file: %q, %v", pid, err)
	}
	for range 2 {
		client := nbdtest.Dial(t, addr)
		client.Go("")
		client.Disconnect()
	}
	client := nbdtest.Dial(t, addr)
	client.Go("")
	e.signal()
	e.wantEnd(t)
	client.ReceiveEnd()
	if _, err := os.Lstat(pidFile); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the pid file is still there: %v", err)
	}
	mustImage(t, "check", image)
}

func TestExportReadOnly(t *testing.T) {
	image, socket := create(t), filepath.Join(t.TempDir(), "nbd.sock")
	e := mustExport(t, image, "--socket", socket, "--read-only", "--persistent")
	client := nbdtest.Dial(t, unixAddr(socket))
	if x := client.Go(""); x.Flags&2 == 0 {
		t.Errorf("flags %#x do not say read-only", x.Flags)
	}
	if err := client.WriteBytes(0, []byte("x")); err == nil {
		t.Error("wrote")
	}
	mustImage(t, "info", image) // other readers are welcome
	e.signal()
	e.wantEnd(t)
}

func TestExportRefuses(t *testing.T) {
	image, dir := create(t), t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	alive := filepath.Join(dir, "alive.sock")
	listener, err := net.Listen("unix", alive)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })

	for name, args := range map[string][]string{
		"no image":                 {filepath.Join(dir, "nothing"), "--socket", filepath.Join(dir, "s")},
		"not an image":             {file, "--socket", filepath.Join(dir, "s")},
		"a file at the socket":     {image, "--socket", file},
		"a server at the socket":   {image, "--socket", alive},
		"a directory that is not":  {image, "--socket", filepath.Join(dir, "nowhere", "s")},
		"a long path":              {image, "--socket", filepath.Join(dir, strings.Repeat("x", 108))},
		"socket and port":          {image, "--socket", filepath.Join(dir, "s"), "--port", "1"},
		"an address that is not":   {image, "--bind", "192.0.2.1", "--port", "0"},
		"fewer clients than none":  {image, "--max-clients", "-1"},
		"a bad name":               {image, "--socket", filepath.Join(dir, "s"), "--export-name", "\xff"},
		"a pid file without place": {image, "--socket", filepath.Join(dir, "s"), "--pid-file", filepath.Join(dir, "nowhere", "pid")},
	} {
		if _, err := startExport(t, args[0], args[1:]...); err == nil {
			t.Errorf("%s: no error", name)
		}
		if _, err := os.Lstat(filepath.Join(dir, "s")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: left a socket behind: %v", name, err)
		}
	}
	if got, err := os.ReadFile(file); err != nil || string(got) != "precious" {
		t.Errorf("the file is %q, %v", got, err)
	}
	if conn, err := net.Dial("unix", alive); err != nil {
		t.Errorf("the other server is gone: %v", err)
	} else {
		conn.Close()
	}
	mustImage(t, "check", image)
}

func TestExportReplacesStaleSocket(t *testing.T) {
	image, socket := create(t), filepath.Join(t.TempDir(), "nbd.sock")
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: socket})
	if err != nil {
		t.Fatal(err)
	}
	dead.SetUnlinkOnClose(false)
	dead.Close()
	e := mustExport(t, image, "--socket", socket)
	client := nbdtest.Dial(t, unixAddr(socket))
	client.Go("")
	client.Disconnect()
	e.wantEnd(t)
}

// TestExportTwice exports one image twice: the second gets neither the image nor the socket.
func TestExportTwice(t *testing.T) {
	image, socket := create(t), filepath.Join(t.TempDir(), "nbd.sock")
	e := mustExport(t, image, "--socket", socket)
	if _, err := startExport(t, image, "--socket", socket); !errors.Is(err, qcow.ErrBusy) {
		t.Errorf("second export: %v", err)
	}
	client := nbdtest.Dial(t, unixAddr(socket))
	client.Go("")
	client.Disconnect()
	e.wantEnd(t)
}

// TestExportToQEMU uses the URI as it is printed.
func TestExportToQEMU(t *testing.T) {
	require.Tool(t, "qemu-img", "qemu-io")
	image, socket := create(t), filepath.Join(t.TempDir(), "with space.sock")
	e := mustExport(t, image, "--socket", socket, "-x", "disk/1", "-t")
	runQEMU(t, "qemu-io", "-f", "raw", "-c", "write -P 7 5M 100k", "-c", "read -P 7 5M 100k", e.uri)
	e.signal()
	e.wantEnd(t)
	runQEMU(t, "qemu-img", "check", image)
	runQEMU(t, "qemu-io", "-f", "qcow2", "-r", "-c", "read -P 7 5M 100k", image)
}

func runQEMU(t *testing.T, name string, args ...string) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput()
	if err != nil || strings.Contains(string(out), "failed") {
		t.Errorf("%s %q: %v: %s", name, args, err, out)
	}
}
