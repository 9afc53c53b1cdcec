package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"k8s.io/klog/v2"

	"github.com/qcow-csi/qcow-csi/nbdexport"
)

// export is what the flags of the export command say.
type export struct {
	image     exportedImage // IMAGE, and what the images of --export begin with
	more      []string      // --export
	listening listening
	clients   clients
	tls       tlsFlags
	fork      bool
	pidFile   string
}

// newExportCommand returns the command that serves images by NBD. Its flags are called as those of qemu-nbd where it
// has the same, and a letter means the same in both.
func newExportCommand() *cobra.Command {
	var e export
	cmd := &cobra.Command{
		Use:   "export [IMAGE] [--export name=NAME,file=IMAGE,...]...",
		Short: "Serve qcow2 images by NBD",
		Long: `Serve qcow2 images by NBD, on a unix socket or by TCP, until the last client has left. With --persistent,
until a signal.

The URIs that clients need are printed once they can connect. SIGTERM and SIGINT end the server in order: requests
that have arrived are answered, and the images are closed clean. They can't be opened elsewhere in the meantime.

Without --tls-certificates there is neither encryption nor authentication: whoever can connect can read and write
the images.

One server can have several exports. Each --export adds one: it takes options with commas between them, of which file is
the image and name the name of the export; the others are called as the flags that describe an image, whose values they
replace for this one. A comma in a value is doubled.

Sockets that systemd passes are served instead of what --socket, --bind and --port name, and systemd is told when
clients can connect (Type=notify). docs/export.md has units, and a table for those who know qemu-nbd.`,
		Example: `  qcow-csi export disk.qcow2 --socket /run/disk.sock --persistent
  qcow-csi export disk.qcow2 --read-only --port 10810
  qcow-csi export -k /run/disks.sock -t --export name=a,file=a.qcow2 --export name=b,file=b.qcow2,read-only=on
  qcow-csi export disk.qcow2 --bind :: --tls-certificates /etc/pki/nbd --persistent
  nbdinfo 'nbd+unix:///?socket=/run/disk.sock'`,
		Args: cobra.MaximumNArgs(1),
	}
	flags := cmd.Flags()
	e.image = newExportedImage()
	e.image.addFlags(flags)
	cmd.MarkFlagsMutuallyExclusive("cache", "nocache")
	flags.StringArrayVar(&e.more, "export", nil, "serve one more image: file=IMAGE,name=NAME and other options of images")
	e.listening.addFlags(cmd)
	e.clients.addFlags(flags)
	e.tls.addFlags(flags)
	flags.BoolVar(&e.fork, "fork", false, "serve in the background, and return once clients can connect")
	flags.StringVar(&e.pidFile, "pid-file", "", "file that holds the process id while clients can connect")
	flags.SetNormalizeFunc(canonicalFlag)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if e.fork && !forked() {
			return forkServer(cmd.Context(), cmd.OutOrStdout())
		}
		images, err := e.images(args)
		if err == nil {
			err = errors.Join(e.clients.check(), e.tls.check(cmd.Flags()))
		}
		if err != nil {
			return err
		}
		moreThreads()
		return e.run(cmd.Context(), images, cmd.OutOrStdout())
	}
	return cmd
}

// canonicalFlag returns the name of the flag that qemu-nbd knows by another one.
func canonicalFlag(_ *pflag.FlagSet, name string) pflag.NormalizedName {
	if name == "shared" {
		name = "max-clients"
	}
	return pflag.NormalizedName(name)
}

// images returns what is to be served.
func (e *export) images(args []string) ([]exportedImage, error) {
	var images []exportedImage
	switch {
	case len(args) > 0:
		e.image.file = args[0]
		images = append(images, e.image)
	case len(e.more) == 0:
		return nil, errors.New("there is nothing to serve: IMAGE or --export must name an image")
	case e.image.name != "" || e.image.description != "":
		return nil, errors.New("--export-name and --description are for IMAGE, which is missing; --export has its own")
	}
	for _, options := range e.more {
		i, err := e.image.with(options)
		if err != nil {
			return nil, fmt.Errorf("--export %s: %w", options, err)
		}
		images = append(images, i)
	}
	for i := range images {
		if err := images[i].check(); err != nil {
			return nil, fmt.Errorf("%s: %w", images[i].file, err)
		}
	}
	return images, nil
}

// run opens the images, serves them, and closes them.
func (e *export) run(ctx context.Context, images []exportedImage, stdout io.Writer) error {
	opened, err := openImages(ctx, images)
	if err != nil {
		return err
	}
	exports := make([]nbdexport.Export, len(images))
	for i := range images {
		exports[i] = nbdexport.Export{Name: images[i].name, Description: images[i].description, Backend: opened[i].backend}
	}
	err = e.serve(ctx, exports, func(addrs []net.Addr) error {
		var lines strings.Builder
		for i := range images {
			for _, addr := range addrs {
				uri, err := exportURI(addr, images[i].name, e.tls.enabled())
				if err != nil {
					return err
				}
				fmt.Fprintf(&lines, "%s: %s\n", images[i].file, uri)
			}
		}
		return announce(stdout, lines.String())
	})
	return errors.Join(err, opened.close())
}

// serve serves the exports until ctx is done or the last client has left. It calls ready with what it listens on once
// clients can connect. When it returns the exports are not used any more.
func (e *export) serve(ctx context.Context, exports []nbdexport.Export, ready func([]net.Addr) error) (err error) {
	ctx, leave := context.WithCancel(ctx)
	defer leave()
	config := nbdexport.Config{
		Exports: exports,
		Disconnected: func(d nbdexport.Disconnect) {
			e.clients.left(ctx, d, leave)
		},
	}
	e.clients.limit(&config)
	if config.TLS, err = e.tls.config(ctx); err != nil {
		return err
	}
	config.TLSOptional = e.tls.optional()
	server, err := nbdexport.NewServer(config)
	if err != nil {
		return err
	}
	listeners, err := e.listening.listen(ctx, e.tls.enabled())
	if err != nil {
		return err
	}
	served := make(chan error, len(listeners))
	for _, l := range listeners {
		go func() { served <- server.Serve(context.WithoutCancel(ctx), watched{l, klog.FromContext(ctx)}) }()
	}
	running := len(listeners)
	defer func() {
		notify(ctx, "STOPPING=1")
		err = errors.Join(err, e.clients.stop(ctx, server))
		for range running {
			err = errors.Join(err, <-served)
		}
	}()

	if e.pidFile != "" {
		if err := os.WriteFile(e.pidFile, fmt.Appendln(nil, os.Getpid()), 0o644); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, removed(e.pidFile)) }()
	}
	addrs := make([]net.Addr, len(listeners))
	for i, l := range listeners {
		addrs[i] = l.Addr()
	}
	if err := ready(addrs); err != nil {
		return err
	}
	notify(ctx, "READY=1")
	select {
	case <-ctx.Done():
		return nil
	case err := <-served: // nothing can connect there any more
		running--
		return err
	}
}

// removed removes the file at path, which somebody else may have removed already.
func removed(path string) error {
	if err := os.Remove(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
