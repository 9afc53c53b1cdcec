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
	"strings"
	"syscall"

	"github.com/qcow-csi/qcow-csi/test/qemucrash/judge"
	"github.com/qcow-csi/qcow-csi/test/qemucrash/recording"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "qemucrash:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) (err error) {
	states := flag.Int("states", 200, "states to judge of each operation and shape, if there are so many")
	seed := flag.Uint64("seed", 1, "of all that is random")
	only := flag.String("operation", "", "only operations whose name contains this")
	onlyShape := flag.String("shape", "", "only shapes whose name contains this")
	asJSON := flag.Bool("json", false, "print JSON")
	dir := flag.String("dir", "", "directory for images; default: a temporary one")
	keep := flag.String("keep", "", "directory for the first bad state of each kind, to look at")
	flag.Parse()
	if *states < 1 || flag.NArg() > 0 {
		return errors.New("see --help")
	}
	for _, name := range []string{"qemu-img", "qemu-io", "gcc"} {
		if _, err := exec.LookPath(name); err != nil {
			return err
		}
	}
	work, err := os.MkdirTemp(*dir, "qcow-csi-qemucrash")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(work)) }()

	shim, err := recording.Build(ctx, work)
	if err != nil {
		return err
	}
	version, err := output(ctx, work, "qemu-img", "--version")
	if err != nil {
		return err
	}
	r := report{Seed: *seed, States: *states}
	r.QEMU, _, _ = strings.Cut(string(version), "\n")
	for _, o := range operations {
		for _, s := range shapes {
			if !strings.Contains(o.name, *only) || !strings.Contains(s.name, *onlyShape) {
				continue
			}
			fmt.Fprintf(os.Stderr, "%s, %s\n", o.name, s.name)
			result, err := one(ctx, o, s, shim, judge.Options{States: *states, Seed: *seed, Dir: work, Keep: *keep})
			if err != nil {
				return fmt.Errorf("%s, %s: %w", o.name, s.name, err)
			}
			r.Results = append(r.Results, result)
		}
	}
	if *asJSON {
		return r.writeJSON(os.Stdout)
	}
	return r.writeTable(os.Stdout)
}

// one records and judges one operation.
func one(ctx context.Context, o *operation, s *shape, shim *recording.Shim, options judge.Options) (*judge.Result, error) {
	st := &stage{dir: filepath.Join(options.Dir, o.name+"-"+s.name), shape: s, shim: shim, seed: options.Seed}
	if err := os.Mkdir(st.dir, 0o700); err != nil {
		return nil, err
	}
	trial, err := o.record(ctx, st)
	if err != nil {
		return nil, err
	}
	return judge.Judge(ctx, trial, options)
}

// output runs a program in a directory and returns what it prints; the error has what it prints to stderr.
func output(ctx context.Context, dir, name string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	return finish(cmd)
}

// finish does so with a prepared command.
func finish(cmd *exec.Cmd) ([]byte, error) {
	out, err := cmd.Output()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		err = fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, exit.Stderr)
	}
	return out, err
}
