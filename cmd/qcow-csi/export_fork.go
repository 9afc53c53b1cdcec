package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	// forkedVariable in the environment says that this is the process which serves in the background.
	forkedVariable = "QCOW_CSI_FORKED"
	// readyFD is where that process says that clients can connect: it writes what is to be printed, and closes it.
	readyFD = 3
)

func forked() bool { return os.Getenv(forkedVariable) != "" }

// forkServer starts this program again, in a session of its own, and returns when it serves, or has ended. A process of Go can't simply go
// on in a child: its threads would not be there.
func forkServer(ctx context.Context, stdout io.Writer) (err error) {
	if isActivated() {
		return errors.New("--fork does not go with sockets from systemd, which needs none: see Type=notify")
	}
	ready, write, err := os.Pipe()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, ready.Close()) }()
	server := exec.Cmd{
		Path:        "/proc/self/exe",
		Args:        os.Args,
		Env:         append(os.Environ(), forkedVariable+"=1"),
		Stderr:      os.Stderr,
		ExtraFiles:  []*os.File{write}, // readyFD
		SysProcAttr: &syscall.SysProcAttr{Setsid: true},
	}
	if err := errors.Join(server.Start(), write.Close()); err != nil {
		return err
	}
	interrupt := context.AfterFunc(ctx, func() { _ = server.Process.Signal(syscall.SIGTERM) }) // it may have ended
	says, err := io.ReadAll(ready)
	if interrupt() && len(says) > 0 {
		_, err := stdout.Write(says)
		return err
	}
	if err := errors.Join(err, server.Wait()); err != nil {
		return fmt.Errorf("the server in the background: %w", err)
	}
	return ctx.Err()
}

// announce prints what users are to know when clients can connect; in the background it lets the process that has
// started this one do so.
func announce(stdout io.Writer, text string) error {
	if !forked() {
		_, err := io.WriteString(stdout, text)
		return err
	}
	if err := leaveTerminal(); err != nil {
		return err
	}
	ready := os.NewFile(readyFD, "ready")
	_, err := io.WriteString(ready, text)
	return errors.Join(err, ready.Close())
}

// leaveTerminal gives standard error up, unless it is a file: whoever reads from it would wait for the end of the server. The rest was
// given up at the start.
func leaveTerminal() error {
	unix.CloseOnExec(readyFD)
	info, err := os.Stderr.Stat()
	if err != nil || info.Mode().IsRegular() {
		return err
	}
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	return errors.Join(unix.Dup3(int(null.Fd()), int(os.Stderr.Fd()), 0), null.Close())
}
