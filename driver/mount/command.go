package mount

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"time"

	"k8s.io/klog/v2"
)

// commandError is a program that could not be started or did not exit with 0.
type commandError struct {
	argv     []string
	exitCode int    // -1 when it was killed or not started
	output   string // standard error; standard output where that is empty
	err      error
}

func (e *commandError) Error() string {
	message := fmt.Sprintf("%s: %v", strings.Join(e.argv, " "), e.err)
	if e.output != "" {
		message += ": " + e.output
	}
	return message
}

func (e *commandError) Unwrap() error { return e.err }

// says tells whether the program failed with text in its message.
func says(err error, text string) bool {
	var failed *commandError
	return errors.As(err, &failed) && strings.Contains(failed.output, text)
}

// exitCode is the exit code of the program that err speaks of, -1 when there is none.
func exitCode(err error) int {
	if failed, ok := errors.AsType[*commandError](err); ok {
		return failed.exitCode
	}
	return -1
}

// run runs a program to its end and returns its standard output. When ctx ends it kills the program and what that has
// started, and waits until the program is gone; the error then matches ctx's.
func run(ctx context.Context, argv ...string) (string, error) {
	// The kernel kills the child when the thread that started it ends, so this thread has to last as long as the child.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()

	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Env = []string{"LC_ALL=C", "PATH=" + os.Getenv("PATH")}
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	cmd.Cancel = func() error {
		if err := syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL); !errors.Is(err, syscall.ESRCH) {
			return err
		}
		return os.ErrProcessDone
	}
	cmd.WaitDelay = 10 * time.Second // for output that somebody outside the process group holds open

	klog.FromContext(ctx).V(4).Info("Running", "command", argv)
	err := cmd.Run()
	if err == nil {
		return stdout.String(), nil
	}
	if ctx.Err() != nil && !errors.Is(err, ctx.Err()) {
		err = fmt.Errorf("%w: %w", context.Cause(ctx), err)
	}
	output := strings.TrimSpace(stderr.String())
	if output == "" {
		output = strings.TrimSpace(stdout.String())
	}
	return "", &commandError{argv: argv, exitCode: cmd.ProcessState.ExitCode(), output: output, err: err}
}
