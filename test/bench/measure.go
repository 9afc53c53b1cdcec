package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// server is one of those compared.
type server struct {
	Name    string   `json:"name"`
	Command []string `json:"command"` // the image comes last
}

// sample is the outcome of one measurement.
type sample struct {
	Value float64 `json:"value"` // in the unit of the workload
	CPU   float64 `json:"cpu"`   // of the server, in microseconds for one I/O
}

// measure serves an image, lets the client work, and ends the server in order.
func measure(ctx context.Context, s server, images *images, r *row, socket string) (_ sample, err error) {
	image, done, err := images.open(ctx, r.Workload.image, s.Name)
	if err != nil {
		return sample{}, err
	}
	defer func() { err = errors.Join(err, done()) }()

	serving, err := start(ctx, append(slices.Clip(s.Command), image), socket)
	if err != nil {
		return sample{}, err
	}
	out, err := output(ctx, r.Command[0], r.Command[1:]...)
	if err := errors.Join(err, serving.stop()); err != nil {
		return sample{}, err
	}
	f, err := parseFio(out)
	if err != nil {
		return sample{}, err
	}
	return sample{Value: r.Workload.value(f), CPU: float64(serving.cpu().Microseconds()) / float64(f.ios)}, nil
}

// serving is a running server.
type serving struct {
	cmd    *exec.Cmd
	stderr strings.Builder
	ended  chan error
}

// start runs a server and waits until it listens.
func start(ctx context.Context, command []string, socket string) (*serving, error) {
	s := &serving{cmd: exec.CommandContext(ctx, command[0], command[1:]...), ended: make(chan error, 1)}
	s.cmd.Stderr = &s.stderr
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	go func() { s.ended <- s.cmd.Wait() }()
	for deadline := time.Now().Add(10 * time.Second); ; {
		conn, err := net.Dial("unix", socket)
		if err == nil {
			conn.Close()
			return s, nil
		}
		select {
		case err := <-s.ended:
			return nil, fmt.Errorf("%s ended: %w: %s", command[0], err, s.stderr.String())
		case <-time.After(10 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			return nil, errors.Join(fmt.Errorf("%s does not listen: %w", command[0], err), s.stop())
		}
	}
}

// stop ends the server in order.
func (s *serving) stop() error {
	if err := s.cmd.Process.Signal(unix.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	if err := <-s.ended; err != nil {
		return fmt.Errorf("server: %w: %s", err, s.stderr.String())
	}
	return nil
}

// cpu is the processor time that the server has taken, once it has ended.
func (s *serving) cpu() time.Duration {
	return s.cmd.ProcessState.UserTime() + s.cmd.ProcessState.SystemTime()
}
