// Command demo drives the built program through the whole life of two volumes, over CSI as kubelet and the sidecars
// would: create, stage, publish, write, grow under load, unpublish, unstage, stage again, verify, delete. It needs
// root. Where qemu-img is installed, it has the last word on the images.
//
//	make demo
//
// The filesystem is ext4; where this process may not grow one, for lack of CAP_SYS_RESOURCE, it is xfs, and the demo
// says so.
//
// It prints each step with the time it took, ends with status 1 at the first failure, and leaves nothing behind either
// way.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"
)

func main() {
	program := flag.String("program", "bin/qcow-csi", "the program to drive")
	attacher := flag.String("attacher", "auto", "how images become block devices: auto, nbd or fuse")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, *program, *attacher)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo failed:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, program, attacher string) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("it mounts filesystems, so it has to run as root")
	}
	begun := time.Now()
	d, err := newDemo(ctx, program, attacher)
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, d.cleanUp())
		if err == nil {
			fmt.Printf("%-72s %8.2fs\n", "everything worked", time.Since(begun).Seconds())
		}
	}()
	for _, part := range []func(ctx context.Context) error{d.start, d.filesystem, d.block, d.judge, d.end} {
		if err := part(ctx); err != nil {
			if log := d.log.String(); log != "" {
				fmt.Fprintf(os.Stderr, "log of the program:\n%s", log)
			}
			return err
		}
	}
	return nil
}

// step does one step, and prints it with its time and what it has to say.
func (d *demo) step(name string, do func() (says string, err error)) error {
	begun := time.Now()
	says, err := do()
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if says != "" {
		name += ": " + says
	}
	fmt.Printf("%-72s %8.2fs\n", name, time.Since(begun).Seconds())
	return nil
}
