package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"

	"github.com/qcow-csi/qcow-csi/nbdexport"
	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// hostCommand is the first argument that makes this program a host of exports.
const hostCommand = "host-exports"

// withHost runs do while another process exports the images, each on a socket beside it.
func withHost(ctx context.Context, images []string, do func(pid int) error) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, self, append([]string{hostCommand}, images...)...)
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	_, err = bufio.NewReader(stdout).ReadString('\n')
	if err == nil {
		err = do(cmd.Process.Pid)
	}
	return errors.Join(err, stdin.Close(), cmd.Wait())
}

// host exports the images until the standard input ends.
func host(images []string) (err error) {
	var hosted closers
	defer func() { err = errors.Join(err, hosted.Close()) }()
	for _, path := range images {
		h, err := newHosted(path)
		if err != nil {
			return err
		}
		hosted = append(hosted, h)
	}
	if _, err := fmt.Println("ready"); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

// hosted is an image with its server.
type hosted struct {
	image  *qcow.Image
	server *nbdexport.Server
	served chan error
}

func newHosted(path string) (*hosted, error) {
	f, err := storage.Open(path, storage.ReadWrite)
	if err != nil {
		return nil, err
	}
	image, err := qcow.Open(f, qcow.Options{})
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	server, err := nbdexport.NewServer(nbdexport.Config{Exports: []nbdexport.Export{{Backend: nbdexport.NewImageBackend(image, nbdexport.ImageOptions{})}}})
	if err != nil {
		return nil, errors.Join(err, image.Close())
	}
	listener, err := net.Listen("unix", path+".sock")
	if err != nil {
		return nil, errors.Join(err, image.Close())
	}
	h := &hosted{image, server, make(chan error, 1)}
	go func() { h.served <- server.Serve(context.Background(), listener) }()
	return h, nil
}

// Close implements io.Closer.
func (h *hosted) Close() error {
	return errors.Join(h.server.Shutdown(context.Background()), <-h.served, h.image.Close())
}

// closers are closed together.
type closers []io.Closer

// Close implements io.Closer.
func (cs closers) Close() error {
	errs := make([]error, len(cs))
	for i, c := range cs {
		errs[i] = c.Close()
	}
	return errors.Join(errs...)
}
