package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/qcow-csi/qcow-csi/nbdexport/nbdtest"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// program returns a run of the program, in a process of its own. $$ in what is set of the environment is its id.
func program(t *testing.T, environment []string, args ...string) *exec.Cmd {
	t.Helper()
	executable, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	script := asProgram + "=1"
	for _, v := range environment {
		script += " " + v
	}
	return exec.CommandContext(t.Context(), "sh", append([]string{"-c", script + ` exec "$0" "$@"`, executable}, args...)...)
}

// notifications listens where sd_notify(3) sends to, and returns what was sent next.
func notifications(t *testing.T, socket string) (next func() string) {
	t.Helper()
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram", Name: socket})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return func() string {
		b := make([]byte, 1000)
		if err := conn.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		n, err := conn.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		return string(b[:n])
	}
}

// listenFile returns a listening socket as systemd passes it.
func listenFile(t *testing.T, network, address string) (*os.File, net.Addr) {
	t.Helper()
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	if u, ok := l.(*net.UnixListener); ok {
		u.SetUnlinkOnClose(false)
	}
	f, err := l.(interface{ File() (*os.File, error) }).File()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	l.Close()
	return f, l.Addr()
}

// TestExportActivated gives the program the sockets that it serves, as systemd does.
func TestExportActivated(t *testing.T) {
	image, dir := create(t), t.TempDir()
	socket := filepath.Join(dir, "nbd.sock")
	next := notifications(t, filepath.Join(dir, "notify"))
	unixFile, unixName := listenFile(t, "unix", socket)
	tcpFile, tcpName := listenFile(t, "tcp", "127.0.0.1:0")
	early := nbdtest.Dial(t, unixName) // systemd starts the program when somebody connects

	cmd := program(t, []string{"LISTEN_PID=$$", "LISTEN_FDS=2", "LISTEN_FDNAMES=a:b", "NOTIFY_SOCKET=" + filepath.Join(dir, "notify")},
		"export", image, "-t", "--pid-file", filepath.Join(dir, "pid"))
	cmd.ExtraFiles = []*os.File{unixFile, tcpFile}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewReader(stdout)
	for _, uri := range []string{"nbd+unix:///?socket=" + socket, "nbd://" + tcpName.String() + "/"} {
		if line, err := lines.ReadString('\n'); line != image+": "+uri+"\n" {
			t.Errorf("it says %q, %v, %s", line, err, &stderr)
		}
	}
	if got := next(); got != "READY=1" {
		t.Errorf("systemd hears %q", got)
	}
	if pid := strings.TrimSpace(string(read(t, filepath.Join(dir, "pid")))); pid != strconv.Itoa(cmd.Process.Pid) {
		t.Errorf("pid file %q", pid)
	}
	early.Go("")
	put(t, early, 0, "activated")
	other := nbdtest.Dial(t, tcpName)
	other.Go("")
	wantBytes(t, other, 0, "activated")
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if got := next(); got != "STOPPING=1" {
		t.Errorf("systemd hears %q", got)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v: %s", err, &stderr)
	}
	if _, err := os.Lstat(socket); err != nil {
		t.Errorf("the socket is systemd's, and gone: %v", err)
	}
	mustImage(t, "check", image)
}

// TestExportNotActivated: what is in the environment is for another process, or bad, or contradicts a flag.
func TestExportNotActivated(t *testing.T) {
	image, dir := create(t), t.TempDir()
	listening, _ := listenFile(t, "unix", filepath.Join(dir, "passed"))
	file, err := os.Open(image)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = file.Close() })
	ends, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	accepted, other := os.NewFile(uintptr(ends[0]), "accepted"), os.NewFile(uintptr(ends[1]), "other")
	t.Cleanup(func() { _ = errors.Join(accepted.Close(), other.Close()) })
	for name, c := range map[string]struct {
		environment []string
		passed      *os.File
		args        []string
		says        string
	}{
		"a flag":        {[]string{"LISTEN_PID=$$", "LISTEN_FDS=1"}, listening, []string{"--socket", filepath.Join(dir, "s")}, "have no place"},
		"a port":        {[]string{"LISTEN_PID=$$", "LISTEN_FDS=1"}, listening, []string{"--port", "0"}, "have no place"},
		"in background": {[]string{"LISTEN_PID=$$", "LISTEN_FDS=1"}, listening, []string{"--fork"}, "--fork does not go with sockets from systemd"},
		"no number":     {[]string{"LISTEN_PID=$$", "LISTEN_FDS=many"}, listening, nil, "no number of sockets"},
		"a file":        {[]string{"LISTEN_PID=$$", "LISTEN_FDS=1", "LISTEN_FDNAMES=disk"}, file, nil, "file descriptor 3 (disk), which systemd has passed: getsockopt"},
		"a connection":  {[]string{"LISTEN_PID=$$", "LISTEN_FDS=1"}, accepted, nil, "the socket's unit needs Accept=no"},
		"too few":       {[]string{"LISTEN_PID=$$", "LISTEN_FDS=9"}, listening, nil, "which systemd has passed"},
		"another's":     {[]string{"LISTEN_PID=1", "LISTEN_FDS=1"}, listening, []string{"--socket", filepath.Join(dir, "nowhere", "s")}, "nowhere"},
	} {
		cmd := program(t, c.environment, append([]string{"export", image}, c.args...)...)
		cmd.ExtraFiles = []*os.File{c.passed}
		out, err := cmd.CombinedOutput()
		if e := (*exec.ExitError)(nil); !errors.As(err, &e) || e.ExitCode() != 1 || !strings.Contains(string(out), c.says) {
			t.Errorf("%s: %v, %s; want %q", name, err, out, c.says)
		}
	}
	mustImage(t, "check", image)
}

// TestExportBySystemd has systemd's own tool pass the socket.
func TestExportBySystemd(t *testing.T) {
	require.Tool(t, "systemd-socket-activate")
	executable, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	image, socket := create(t), filepath.Join(t.TempDir(), "nbd.sock")
	cmd := exec.CommandContext(t.Context(), "systemd-socket-activate", "--listen="+socket, "--fdname=disk", "--setenv="+asProgram+"=1",
		executable, "export", image)
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(stderr).ReadString('\n') // when it listens
	if err != nil {
		t.Fatal(err, line)
	}
	go io.Copy(io.Discard, stderr) //nolint:errcheck // until it ends
	client := nbdtest.Dial(t, unixAddr(socket))
	client.Go("")
	client.Disconnect()
	if err := cmd.Wait(); err != nil {
		t.Errorf("the last client has left: %v", err)
	}
}

func TestNotifyNobody(t *testing.T) {
	said := captureLog(t)
	t.Setenv("NOTIFY_SOCKET", filepath.Join(t.TempDir(), "nothing"))
	notify(t.Context(), "READY=1")
	if !strings.Contains(said(), "Systemd was not told") {
		t.Errorf("it says %s", said())
	}
}

// TestExportFork: when the program returns clients can connect, to a process of another session that holds nothing of the first one's.
func TestExportFork(t *testing.T) {
	image, dir := create(t), t.TempDir()
	socket, pidFile := filepath.Join(dir, "nbd.sock"), filepath.Join(dir, "pid")
	cmd := program(t, nil, "export", image, "--fork", "-k", socket, "--pid-file", pidFile)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output() // which waits until nobody has the pipes of stdout and stderr open any more
	if want := image + ": nbd+unix:///?socket=" + socket + "\n"; err != nil || string(out) != want || stderr.Len() > 0 {
		t.Fatalf("%v: %q, want %q; %s", err, out, want, &stderr)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(read(t, pidFile))))
	if err != nil || pid == cmd.Process.Pid {
		t.Fatalf("process %d of %d, %v", pid, cmd.Process.Pid, err)
	}
	if session, err := syscall.Getpgid(pid); err != nil || session != pid {
		t.Errorf("it is in the group of process %d, %v", session, err)
	}
	for fd, want := range map[string]string{"0": os.DevNull, "1": os.DevNull, "2": os.DevNull} {
		if got, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", pid, fd)); err != nil || got != want {
			t.Errorf("file descriptor %s is %s, %v", fd, got, err)
		}
	}
	client := nbdtest.Dial(t, unixAddr(socket))
	client.Go("")
	put(t, client, 0, "from behind")
	client.Disconnect()
	awaitEnd(t, pid)
	if got := names(t, dir); len(got) != 0 {
		t.Errorf("left %q", got)
	}
	mustImage(t, "check", image)
}

// TestExportForkKeepsLog: standard error that is a file is where the server goes on logging.
func TestExportForkKeepsLog(t *testing.T) {
	image, dir := create(t), t.TempDir()
	socket, pidFile := filepath.Join(dir, "nbd.sock"), filepath.Join(dir, "pid")
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	cmd := program(t, nil, "export", image, "--fork", "-k", socket, "--pid-file", pidFile, "-v", "2", "-t")
	cmd.Stderr = log
	if err := errors.Join(cmd.Run(), log.Close()); err != nil {
		t.Fatalf("%v: %s", err, read(t, log.Name()))
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(read(t, pidFile))))
	if err != nil {
		t.Fatal(err)
	}
	client := nbdtest.Dial(t, unixAddr(socket))
	client.Go("")
	if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	awaitEnd(t, pid)
	if said := string(read(t, log.Name())); !strings.Contains(said, "Client connected") || !strings.Contains(said, "Client left") {
		t.Errorf("it says %s", said)
	}
}

// TestExportForkFails: what goes wrong before clients can connect is an error of the program.
func TestExportForkFails(t *testing.T) {
	cmd := program(t, nil, "export", filepath.Join(t.TempDir(), "nothing"), "--fork", "-k", filepath.Join(t.TempDir(), "s"))
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if e := (*exec.ExitError)(nil); !errors.As(err, &e) || e.ExitCode() != 1 || len(out) > 0 ||
		!strings.Contains(stderr.String(), "no such file") || !strings.Contains(stderr.String(), "in the background") {
		t.Errorf("%v: %q, %s", err, out, &stderr)
	}
}

// awaitEnd waits until a process is gone that is not a child of this one.
func awaitEnd(t *testing.T, pid int) {
	t.Helper()
	for range 6000 {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil || strings.Contains(string(stat), ") Z ") { // nobody has asked what became of it
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("process %d goes on", pid)
}
