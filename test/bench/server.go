package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/qcow-csi/qcow-csi/test/load/generator"
)

// Placeholders in command lines.
const (
	imagePlace  = "IMAGE"
	socketPlace = "SOCKET"
	aioPlace    = "AIO" // of QEMU: see row.aio
)

// family tells what a server is compared as.
type family string

const (
	ours       family = "ours"
	qemu       family = "qemu"        // the peers, with the same format
	nbdkitFile family = "nbdkit file" // raw files: what a mature server costs without a format
	nbdkitNull family = "nbdkit null" // no files: what the protocol costs
	limit      family = "raw"         // no server: pread and pwrite
)

// server is one of those compared.
type server struct {
	Name    string   `json:"name"`
	Family  family   `json:"family"`
	Command []string `json:"command"` // with imagePlace and socketPlace for paths; empty for limit
	extra   bool     // measured only when asked for by name
}

// largeCache, in bytes, holds every L2 table of all images here; the default grows to 32 MiB.
const largeCache = "134217728"

// newServers lists what can be compared. The extra servers are QEMU's with one aio mode in all rows, to find out which
// is the best.
func newServers(size int64) []server {
	qemuNBD := func(name, aio, cache string) server {
		return server{Name: name, Family: qemu, extra: aio != aioPlace, Command: []string{
			"qemu-nbd", "--persistent", "--shared=16", "--socket=" + socketPlace, "--aio=" + aio, "--cache=" + cache,
			"--format=qcow2", imagePlace,
		}}
	}
	daemon := func(name, aio, options string) server {
		return server{Name: name, Family: qemu, extra: aio != aioPlace, Command: []string{
			"qemu-storage-daemon",
			"--blockdev", "driver=file,node-name=file,filename=" + imagePlace + ",aio=" + aio,
			"--blockdev", "driver=qcow2,node-name=disk,file=file" + options,
			"--nbd-server", "addr.type=unix,addr.path=" + socketPlace + ",max-connections=16",
			"--export", "type=nbd,id=export,node-name=disk,name=,writable=on",
		}}
	}
	return []server{
		{Name: "qcow-csi", Family: ours, Command: []string{
			"qcow-csi", "export", "--persistent", "--max-clients", "64", "--socket", socketPlace, imagePlace,
		}},
		qemuNBD("qemu-nbd", aioPlace, "writeback"),
		{Name: "qemu-nbd, large l2-cache", Family: qemu, Command: []string{
			"qemu-nbd", "--persistent", "--shared=16", "--socket=" + socketPlace, "--image-opts",
			"driver=qcow2,l2-cache-size=" + largeCache + ",file.driver=file,file.aio=" + aioPlace + ",file.filename=" + imagePlace,
		}},
		daemon("qemu-storage-daemon", aioPlace, ""),
		daemon("qemu-storage-daemon, large l2-cache", aioPlace, ",l2-cache-size="+largeCache),
		{Name: "nbdkit file", Family: nbdkitFile, Command: []string{
			"nbdkit", "--foreground", "--unix", socketPlace, "file", imagePlace,
		}},
		{Name: "nbdkit null", Family: nbdkitNull, Command: []string{
			"nbdkit", "--foreground", "--unix", socketPlace, "null", fmt.Sprint(size),
		}},
		{Name: "raw", Family: limit},
		qemuNBD("qemu-nbd, aio=io_uring", "io_uring", "writeback"),
		qemuNBD("qemu-nbd, aio=threads", "threads", "writeback"),
		qemuNBD("qemu-nbd, aio=native", "native", "none"),
		daemon("qemu-storage-daemon, aio=io_uring", "io_uring", ""),
		daemon("qemu-storage-daemon, aio=threads", "threads", ""),
	}
}

// program is what runs the server; variants of one program share it.
func (s server) program() string {
	if len(s.Command) == 0 {
		return s.Name
	}
	return s.Command[0]
}

// format is that of the images which the server serves, "" if it needs none.
func (s server) format() string {
	switch s.Family {
	case ours, qemu:
		return "qcow2"
	case nbdkitFile, limit:
		return "raw"
	case nbdkitNull:
	}
	return ""
}

// can tells whether the server has a part in a workload.
func (s server) can(w workload) bool {
	switch w.Image {
	case onBacking:
		return s.format() == "qcow2"
	case full:
		return true
	default:
		return s.Family != nbdkitNull // which stores nothing
	}
}

// serving is a running server.
type serving struct {
	cmd    *exec.Cmd
	stderr strings.Builder
	ended  chan error
}

// start runs a server and waits until a client has been served on the socket.
func start(ctx context.Context, command []string, socket string) (*serving, error) {
	if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) { // nbdkit leaves it behind
		return nil, err
	}
	s := &serving{cmd: exec.CommandContext(ctx, command[0], command[1:]...), ended: make(chan error, 1)}
	s.cmd.Stderr = &s.stderr
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	go func() { s.ended <- s.cmd.Wait() }()
	for deadline := time.Now().Add(10 * time.Second); ; {
		client, err := generator.Hold("nbd+unix:///?socket=" + socket)
		if err == nil {
			return s, client.Close()
		}
		select {
		case err := <-s.ended:
			return nil, fmt.Errorf("%s ended: %w: %s", command[0], err, s.stderr.String())
		case <-time.After(5 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			return nil, errors.Join(fmt.Errorf("%s does not serve: %w", command[0], err), s.stop())
		}
	}
}

// stop ends the server in order, or, if that takes too long, at once.
func (s *serving) stop() error {
	if err := s.cmd.Process.Signal(unix.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	hang := time.AfterFunc(time.Minute, func() { _ = s.cmd.Process.Kill() })
	defer hang.Stop()
	if err := <-s.ended; err != nil {
		return fmt.Errorf("server: %w: %s", err, s.stderr.String())
	}
	return nil
}

// kill ends the server at once: in order, it would first write to the disk what is about to be removed.
func (s *serving) kill() error {
	err := s.cmd.Process.Kill() // fails when the server has ended by itself, which it must not
	if ended := <-s.ended; err != nil {
		return fmt.Errorf("server: %w: %w: %s", err, ended, s.stderr.String())
	}
	return nil
}

// cpu is the processor time that the server has taken up to now.
func (s *serving) cpu() (time.Duration, error) {
	// The clock of another process, as clock_getcpuclockid makes it.
	clock := ^int32(s.cmd.Process.Pid)<<3 | 2
	var t unix.Timespec
	err := unix.ClockGettime(clock, &t)
	return time.Duration(t.Nano()), err
}

// aio is the mode in which QEMU is fastest on files in the page cache, as measured with the extra servers:
// docs/benchmarks.md says why.
func (r row) aio() string {
	if r.Workload.Image == empty && r.Depth*r.Connections > 1 {
		return "threads"
	}
	return "io_uring"
}
