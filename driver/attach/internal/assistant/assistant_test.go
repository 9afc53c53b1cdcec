package assistant_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/qcow-csi/qcow-csi/driver/attach"
	"github.com/qcow-csi/qcow-csi/driver/attach/internal/assistant"
)

type job struct{ Text string }

var (
	echo = assistant.New("test-echo", func(_ context.Context, j job) (string, error) {
		return fmt.Sprintf("%s from %d", j.Text, os.Getppid()), nil
	})
	busy = assistant.New("test-busy", func(_ context.Context, j job) (string, error) {
		return "half done", fmt.Errorf("%s: %w: open elsewhere", j.Text, attach.ErrBusy)
	})
	broken = assistant.New("test-broken", func(context.Context, job) (string, error) {
		return "", errors.New("it is broken")
	})
	crash = assistant.New("test-crash", func(context.Context, job) (string, error) { panic("crash") })
	hang  = assistant.New("test-hang", func(context.Context, job) (string, error) {
		if _, err := unix.Write(assistant.FirstFile, []byte("hanging")); err != nil {
			return "", err
		}
		select {}
	})
)

func TestRun(t *testing.T) {
	want := fmt.Sprintf("hello from %d", os.Getpid())
	if got, err := echo.Run(t.Context(), job{"hello"}); got != want || err != nil {
		t.Errorf("%q, %v; want %q", got, err, want)
	}
	got, err := busy.Run(t.Context(), job{"/dev/x"})
	if !errors.Is(err, attach.ErrBusy) || err.Error() != "/dev/x: device is busy: open elsewhere" || got != "half done" {
		t.Errorf("%q, %v", got, err)
	}
	if _, err := broken.Run(t.Context(), job{}); err == nil || errors.Is(err, attach.ErrBusy) || err.Error() != "it is broken" {
		t.Errorf("broken: %v", err)
	}
	if _, err := crash.Run(t.Context(), job{}); err == nil {
		t.Error("a crash went unnoticed")
	}
}

func TestCancel(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		if _, err := r.Read(make([]byte, 7)); err != nil {
			t.Errorf("the assistant did not begin: %v", err)
		}
		cancel()
	}()
	if _, err := hang.Run(ctx, job{}, w); !errors.Is(err, context.Canceled) {
		t.Errorf("%v, want %v", err, context.Canceled)
	}
	// The assistant is dead: nobody holds the pipe.
	if err := w.Close(); err != nil {
		t.Error(err)
	}
	if n, err := r.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("read %d bytes, %v; want %v", n, err, io.EOF)
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
}
