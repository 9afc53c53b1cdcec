package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"k8s.io/klog/v2"

	"github.com/qcow-csi/qcow-csi/nbdexport"
	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// shutdownGrace is how long clients may take to receive their last replies after a signal.
const shutdownGrace = 10 * time.Second

// export is what the flags of the export command say.
type export struct {
	socket      string
	bind        string
	port        uint16
	readOnly    bool
	name        string
	description string
	maxClients  int
	persistent  bool
	pidFile     string
}

// newExportCommand returns the command that serves one image by NBD. Its flags are called as those of qemu-nbd where it
// has the same, and a letter means the same in both.
func newExportCommand() *cobra.Command {
	var e export
	cmd := &cobra.Command{
		Use:   "export IMAGE",
		Short: "Serve one qcow2 image by NBD",
		Long: `Serve one qcow2 image by NBD, on a unix socket or by TCP, until the last client has left. With --persistent,
until a signal.

The URI that clients need is printed once they can connect. SIGTERM and SIGINT end the server in order: requests
that have arrived are answered, and the image is closed clean. The image can't be opened elsewhere in the meantime.

There is neither encryption nor authentication: whoever can connect can read and write the image.`,
		Example: `  qcow-csi export disk.qcow2 --socket /run/disk.sock --persistent
  qcow-csi export disk.qcow2 --read-only --port 10810
  nbdinfo 'nbd+unix:///?socket=/run/disk.sock'`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if e.maxClients < 1 {
				return errors.New("--max-clients must be 1 or more")
			}
			return e.run(cmd.Context(), args[0], cmd.OutOrStdout())
		},
	}
	flags := cmd.Flags()
	flags.StringVarP(&e.socket, "socket", "k", "", "path of a unix socket to listen on, instead of TCP")
	flags.StringVarP(&e.bind, "bind", "b", "127.0.0.1", "address to listen on")
	flags.Uint16VarP(&e.port, "port", "p", 10809, "TCP port to listen on; 0 takes a free one")
	flags.BoolVarP(&e.readOnly, "read-only", "r", false, "refuse writes, and let other readers open the image")
	flags.StringVarP(&e.name, "export-name", "x", "", "name of the export; clients that ask for none get it, too")
	flags.StringVarP(&e.description, "description", "D", "", "description of the export, for people")
	flags.IntVarP(&e.maxClients, "max-clients", "e", 16, "clients that are served at a time; others wait")
	flags.BoolVarP(&e.persistent, "persistent", "t", false, "keep serving when the last client has left")
	flags.StringVar(&e.pidFile, "pid-file", "", "file that holds the process id while clients can connect")
	cmd.MarkFlagsMutuallyExclusive("socket", "bind")
	cmd.MarkFlagsMutuallyExclusive("socket", "port")
	return cmd
}

func (e *export) run(ctx context.Context, image string, stdout io.Writer) error {
	mode := storage.ReadWrite
	if e.readOnly {
		mode = storage.ReadOnly
	}
	return withImage(image, mode, func(_ *storage.OSFile, img *qcow.Image) error {
		return e.serve(ctx, nbdexport.NewImageBackend(img), func(uri string) error {
			_, err := fmt.Fprintf(stdout, "%s: %s\n", image, uri)
			return err
		})
	})
}

// serve serves b until ctx is done or the last client has left. It calls announce with the URI once clients can
// connect. When it returns b is not used any more.
func (e *export) serve(ctx context.Context, b nbdexport.Backend, announce func(uri string) error) (err error) {
	ctx, leave := context.WithCancel(ctx)
	defer leave()
	server, err := nbdexport.NewServer(nbdexport.Config{
		Exports:        []nbdexport.Export{{Name: e.name, Description: e.description, Backend: b}},
		MaxConnections: e.maxClients,
		Disconnected: func(d nbdexport.Disconnect) {
			klog.FromContext(ctx).V(2).Info("Client left", "peer", d.Peer, "remaining", d.Remaining, "reason", d.Err)
			if d.Chosen && d.Remaining == 0 && !e.persistent {
				leave()
			}
		},
	})
	if err != nil {
		return err
	}
	listener, err := e.listen(ctx)
	if err != nil {
		return err
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(context.WithoutCancel(ctx), listener) }()
	defer func() { err = errors.Join(err, stop(ctx, server), <-served) }()

	if e.pidFile != "" {
		if err := os.WriteFile(e.pidFile, fmt.Appendln(nil, os.Getpid()), 0o644); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, os.Remove(e.pidFile)) }()
	}
	uri, err := e.uri(listener.Addr())
	if err != nil {
		return err
	}
	if err := announce(uri); err != nil {
		return err
	}
	select {
	case <-ctx.Done():
		return nil
	case err := <-served: // nothing can connect any more
		served <- nil
		return err
	}
}

// stop ends the server in order, or, when a client does not take its last replies, without that client.
func stop(ctx context.Context, server *nbdexport.Server) error {
	grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownGrace)
	defer cancel()
	err := server.Shutdown(grace)
	if errors.Is(err, context.DeadlineExceeded) {
		klog.FromContext(ctx).Info("A client did not take its last replies", "grace", shutdownGrace)
		return nil
	}
	return err
}

// uri returns the URI that clients need, in the form of the NBD URI specification.
func (e *export) uri(addr net.Addr) (string, error) {
	u := url.URL{Scheme: "nbd", Host: addr.String(), Path: "/" + e.name}
	if e.socket != "" {
		path, err := filepath.Abs(e.socket)
		if err != nil {
			return "", err
		}
		u.Scheme, u.Host = "nbd+unix", ""
		u.RawQuery = "socket=" + strings.NewReplacer("%2F", "/", "+", "%20").Replace(url.QueryEscape(path))
	}
	return u.String(), nil
}
