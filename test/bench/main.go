// Command bench compares qcow-csi export with qemu-nbd: the same images, the same client (fio with ioengine=nbd over
// a unix socket), one after the other in turns, so that what else the machine does hits both. It prints the machine,
// the command lines, and of each workload the medians of all rounds with their ratio, as a table or as JSON.
//
// It measures and never judges: how fast a machine is fails no build. The images are kept in memory, so that it
// compares the servers, not disks. The client is a part of every figure: no server can be faster than fio.
//
// It needs qemu-img, qemu-nbd and fio.
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
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := run(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) (err error) {
	rounds := flag.Int("rounds", 3, "measurements of which the median is taken, if --limit leaves time")
	runtime := flag.Duration("runtime", 2*time.Second, "of one measurement, in whole seconds")
	limit := flag.Duration("limit", 150*time.Second, "no round begins that would probably end later than this")
	only := flag.String("only", "", "measure only the workloads whose name contains this")
	asJSON := flag.Bool("json", false, "print JSON")
	dir := flag.String("dir", "", "directory for images, about 2 GiB; default: a temporary one")
	flag.Parse()
	if *rounds < 1 || *runtime < time.Second || flag.NArg() > 0 {
		return errors.New("see --help")
	}
	for _, tool := range []string{"fio", "qemu-img", "qemu-nbd"} {
		if _, err := exec.LookPath(tool); err != nil {
			return err
		}
	}
	work, err := os.MkdirTemp(*dir, "qcow-csi-bench")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(work)) }()

	binary := filepath.Join(work, "qcow-csi")
	if _, err := output(ctx, "go", "build", "-o", binary, "github.com/qcow-csi/qcow-csi/cmd/qcow-csi"); err != nil {
		return err
	}
	images, err := newImages(ctx, work)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, images.close()) }()

	socket := filepath.Join(work, "nbd.sock")
	r := report{
		Machine: describeMachine(ctx),
		Runtime: runtime.Seconds(),
		Servers: []server{
			{Name: "qcow-csi", Command: []string{binary, "export", "--socket", socket, "--persistent"}},
			{Name: "qemu-nbd", Command: []string{"qemu-nbd", "--format=qcow2", "--socket=" + socket, "--persistent"}},
		},
		Notes: images.notes,
	}
	for _, w := range workloads {
		if !strings.Contains(w.Name, *only) {
			continue
		}
		r.Rows = append(r.Rows, row{
			Workload: w,
			Command:  w.fio(socket, *runtime),
			Samples:  make([][]sample, len(r.Servers)),
		})
	}
	begin := time.Now()
	for round := range *rounds {
		if spent := time.Since(begin); round > 0 && spent+spent/time.Duration(round) > *limit {
			break
		}
		r.Rounds = round + 1
		for i := range r.Rows {
			row := &r.Rows[i]
			for turn := range r.Servers {
				which := (turn + round) % len(r.Servers) // who is first takes turns, too
				fmt.Fprintf(os.Stderr, "\rround %d of %d: %-24s %-10s", round+1, *rounds, row.Workload.Name, r.Servers[which].Name)
				s, err := measure(ctx, r.Servers[which], images, row, socket)
				if err != nil {
					return fmt.Errorf("%s, %s: %w", r.Servers[which].Name, row.Workload.Name, err)
				}
				row.Samples[which] = append(row.Samples[which], s)
			}
		}
	}
	fmt.Fprintln(os.Stderr)
	if *asJSON {
		return r.writeJSON(os.Stdout)
	}
	return r.writeTable(os.Stdout)
}

// output runs a program and returns what it writes; the error has what it writes to stderr.
func output(ctx context.Context, name string, args ...string) ([]byte, error) {
	out, err := exec.CommandContext(ctx, name, args...).Output()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		err = fmt.Errorf("%s: %w: %s", name, err, exit.Stderr)
	}
	return out, err
}
