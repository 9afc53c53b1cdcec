// Command bench compares qcow-csi export with the NBD servers of QEMU and nbdkit, and with no server at all: the same images,
// the same clients over a unix socket, one after the other in turns, so that what else the machine does hits all of them.
// docs/benchmarks.md says what is measured, why, and how to read it.
//
// It measures and never judges: how fast a machine is fails no build. What does not work at all fails it.
//
// It needs qemu-img, and leaves out servers and clients whose programs are not there.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	err := run(ctx, os.Args[1:])
	stop()
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) > 0 && args[0] == hostCommand {
		return host(args[1:])
	}
	o, err := parseOptions(args)
	if err != nil {
		return err
	}
	var r *report
	if o.from != "" {
		r, err = readReport(o.from)
	} else {
		r, err = take(ctx, o)
	}
	if err != nil {
		return err
	}
	return present(r, o)
}

// present writes the report in every form that was asked for.
func present(r *report, o *options) error {
	var errs []error
	if o.json == "-" {
		errs = append(errs, r.writeJSON(os.Stdout))
	} else {
		errs = append(errs, r.writeText(os.Stdout))
	}
	if o.svg != "" {
		errs = append(errs, os.WriteFile(o.svg, []byte(r.chart()), 0o644))
	}
	if o.markdown != "" {
		errs = append(errs, r.writeMarkdown(o.markdown))
	}
	if failures := r.failures(); len(failures) > 0 && o.from == "" {
		errs = append(errs, fmt.Errorf("%d measurements were not possible, the first: %s", len(failures), failures[0]))
	}
	return errors.Join(errs...)
}

// take measures.
func take(ctx context.Context, o *options) (_ *report, err error) {
	work, err := os.MkdirTemp(o.dir, "qcow-csi-bench")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(work)) }()

	r := &report{
		Date: time.Now().UTC().Format(time.DateOnly), Machine: describeMachine(ctx),
		Runtime: o.runtime.Seconds(), Copied: o.copySize,
	}
	r.choose(o)
	if len(r.Servers) == 0 || len(r.Rows) == 0 {
		return nil, errors.New("there is nothing to measure: see --help")
	}
	l := &laboratory{options: o, socket: filepath.Join(work, "nbd.sock"), programs: map[string]string{}}
	for program, source := range map[string]string{"qcow-csi": "cmd/qcow-csi", "load": "test/load"} {
		l.programs[program] = filepath.Join(work, program)
		_, err := output(ctx, "go", "build", "-o", l.programs[program], "github.com/qcow-csi/qcow-csi/"+source)
		if err != nil {
			return nil, err
		}
	}
	if o.idle > 0 {
		if r.Idle, err = measureIdle(ctx, o.idle, work); err != nil {
			return nil, fmt.Errorf("idle exports: %w", err)
		}
	}
	progress("making images")
	copyDir, remove, err := chooseCopyDir(o, work)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, remove()) }()
	l.images, err = newImages(ctx, o, work, copyDir, r.Servers, r.Rows)
	defer func() { err = errors.Join(err, l.images.close()) }()
	if err != nil {
		return nil, err
	}
	r.Notes = append(r.Notes, l.images.notes...)
	return r, r.measureAll(ctx, l)
}

// choose decides what is measured: what the options ask for, without that for which a program is missing.
func (r *report) choose(o *options) {
	there := func(program string) bool {
		_, err := exec.LookPath(program)
		return err == nil
	}
	for _, s := range newServers(o.imageSize) {
		switch {
		case !o.chosen(s):
		case s.Family != ours && s.Family != limit && !there(s.program()):
			r.Notes = append(r.Notes, "no "+s.Name+": there is no program "+s.program())
		default:
			r.Servers = append(r.Servers, s)
		}
	}
	missing := map[string]bool{"fio": !there("fio"), "nbdcopy": !there("nbdcopy")}
	noted := map[string]bool{}
	for _, row := range newRows(o, r.Servers) {
		if !missing[row.Client] {
			r.Rows = append(r.Rows, row)
		} else if !noted[row.Client] {
			noted[row.Client] = true
			r.Notes = append(r.Notes, "no rows of "+row.Client+": there is no such program")
		}
	}
}

// chooseCopyDir returns the folder for what nbdcopy reads and writes: the memory, if that has room for the source in both formats
// and for a copy besides all other images.
func chooseCopyDir(o *options, work string) (dir string, remove func() error, err error) {
	const memoryDir = "/dev/shm"
	const spareMemory = 2 << 30 // bytes, for fresh images and everything else
	parent := o.copyDir
	if parent == "" {
		parent = work
		if info, err := os.Stat(memoryDir); err == nil && info.IsDir() && availableMemory() > 2*o.copySize+8*o.imageSize+spareMemory {
			parent = memoryDir
		}
	}
	dir, err = os.MkdirTemp(parent, "qcow-csi-bench")
	return dir, func() error { return os.RemoveAll(dir) }, err
}
