package mount

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// A program may have started others: when the context ends, all of them are killed.
func TestRunKillsWhatItStarted(t *testing.T) {
	pipe := newPipe(t)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() {
		_, err := run(ctx, "sh", "-c", `sleep 1000 & echo $! > "$0"; wait`, pipe)
		done <- err
	}()
	child := openProcess(t, pipe)
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	waitForEnd(t, child)
}

// orphanPipe in the environment makes TestRunDiesWithUs the plugin that is killed.
const orphanPipe = "QCOW_CSI_TEST_ORPHAN_PIPE"

// A plugin that is killed leaves no program behind.
func TestRunDiesWithUs(t *testing.T) {
	if pipe := os.Getenv(orphanPipe); pipe != "" {
		_, err := run(t.Context(), "sh", "-c", `echo $$ > "$0"; exec sleep 1000`, pipe)
		t.Fatal(err)
	}
	pipe := newPipe(t)
	plugin := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestRunDiesWithUs$")
	plugin.Env = append(os.Environ(), orphanPipe+"="+pipe)
	if err := plugin.Start(); err != nil {
		t.Fatal(err)
	}
	child := openProcess(t, pipe)
	if err := plugin.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := plugin.Wait(); err == nil {
		t.Error("the plugin was not killed")
	}
	waitForEnd(t, child)
}

func newPipe(t *testing.T) string {
	t.Helper()
	pipe := filepath.Join(t.TempDir(), "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	return pipe
}

// openProcess waits for a process to write its id to the pipe and returns a descriptor of it.
func openProcess(t *testing.T, pipe string) (pidfd int) {
	t.Helper()
	line, err := os.ReadFile(pipe)
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(line)))
	if err != nil {
		t.Fatal(err)
	}
	pidfd, err = unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Close(pidfd); err != nil {
			t.Error(err)
		}
	})
	return pidfd
}

// waitForEnd fails the test when the process does not end.
func waitForEnd(t *testing.T, pidfd int) {
	t.Helper()
	ended := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	n, err := unix.Poll(ended, 60_000)
	for errors.Is(err, unix.EINTR) {
		n, err = unix.Poll(ended, 60_000)
	}
	if n != 1 || err != nil {
		t.Errorf("the process still runs: %v", err)
	}
}

func TestRunReportsWhatTheProgramSays(t *testing.T) {
	_, err := run(t.Context(), "sh", "-c", "echo progress; echo 'no such luck' >&2; exit 7")
	if exitCode(err) != 7 || !says(err, "no such luck") {
		t.Errorf("error %v", err)
	}
	if !strings.Contains(err.Error(), "no such luck") || !strings.Contains(err.Error(), "exit status 7") {
		t.Errorf("message %q", err)
	}
	_, err = run(t.Context(), "sh", "-c", "echo 'on the wrong stream'; exit 1")
	if !says(err, "wrong stream") {
		t.Errorf("error %v", err)
	}
	_, err = run(t.Context(), "no-such-program-anywhere")
	if !errors.Is(err, exec.ErrNotFound) || exitCode(err) != -1 {
		t.Errorf("error %v, exit code %d", err, exitCode(err))
	}
}

func TestRunKeepsTheEnvironmentOut(t *testing.T) {
	t.Setenv("LC_ALL", "de_DE.UTF-8")
	t.Setenv("MKE2FS_CONFIG", "/elsewhere")
	output, err := run(t.Context(), "env")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(output, "LC_ALL=C\n") || strings.Contains(output, "MKE2FS_CONFIG") {
		t.Errorf("environment:\n%s", output)
	}
}
