package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// server is the driver as a child process, and the connection to it.
type server struct {
	csi.IdentityClient
	csi.ControllerClient
	csi.NodeClient

	log  log
	cmd  *exec.Cmd
	done chan error // the end of the process
	conn *grpc.ClientConn
}

// log is what the program has written.
type log struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// start starts the program and waits until it answers.
func (s *server) start(ctx context.Context, program, socket, storage, attacher string) error {
	cmd := exec.Command(program, "all", "--endpoint", "unix://"+socket, "--storage-dir", storage,
		"--run-dir", filepath.Dir(socket), "--node-id", "demo", "--attacher", attacher, "-v", "4")
	cmd.Stderr = &s.log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C ends the demo, which needs the driver to clean up
	if err := cmd.Start(); err != nil {
		return err
	}
	s.cmd, s.done = cmd, make(chan error, 1)
	go func() { s.done <- cmd.Wait() }()
	if err := s.await(ctx, socket); err != nil {
		return err
	}
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	s.conn = conn
	s.IdentityClient = csi.NewIdentityClient(conn)
	s.ControllerClient = csi.NewControllerClient(conn)
	s.NodeClient = csi.NewNodeClient(conn)
	return nil
}

// await waits until the program has made its socket.
func (s *server) await(ctx context.Context, socket string) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for {
		if _, err := os.Stat(socket); err == nil {
			return nil
		}
		select {
		case err := <-s.done:
			s.cmd = nil
			return fmt.Errorf("the program ended: %w", err)
		case <-ctx.Done():
			return fmt.Errorf("the program does not serve: %w", ctx.Err())
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// stop ends the program in good order; stopped already is fine.
func (s *server) stop() error {
	if s.conn != nil {
		s.conn.Close()
		s.conn = nil
	}
	if s.cmd == nil {
		return nil
	}
	cmd := s.cmd
	s.cmd = nil
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	select {
	case err := <-s.done:
		return err
	case <-time.After(30 * time.Second):
		return errors.Join(errors.New("the program does not end"), cmd.Process.Kill())
	}
}
