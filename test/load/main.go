// Command load puts load on an NBD server, or on a file, and reports how fast it was:
//
//	go run ./test/load -uri 'nbd+unix:///?socket=/run/disk.sock' -rw randread -depth 16 -connections 4
//	go run ./test/load -file disk.raw -rw randwrite -bs 64k -verify
//
// Package generator says how it works. The exit status is 1 when a request failed or, with -verify, when something else
// was read than what was written.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"time"

	"golang.org/x/sys/unix"

	"github.com/qcow-csi/qcow-csi/test/load/generator"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "load:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout io.Writer) error {
	var j generator.Job
	flags := flag.NewFlagSet("load", flag.ContinueOnError)
	flags.StringVar(&j.URI, "uri", "", "server, as nbd+unix:///export?socket=path")
	flags.StringVar(&j.File, "file", "", "file to read and write itself, instead of a server")
	flags.StringVar(&j.RW, "rw", "randread", "read, write, randread, randwrite or randrw")
	flags.IntVar(&j.Mix, "mix", 70, "percentage of reads, of randrw")
	flags.Var(sizeFlag{&j.Block, "4k"}, "bs", "bytes of a request")
	flags.Var(sizeFlag{&j.Align, ""}, "align", "offsets are multiples of so many bytes; default: those of a request")
	flags.Var(sizeFlag{&j.Size, ""}, "size", "bytes of the disk that are used; default: all")
	flags.BoolVar(&j.Distinct, "distinct", false, "use no place twice; end early when all have been used")
	flags.Uint64Var(&j.Seed, "seed", 1, "of the random offsets")
	flags.IntVar(&j.Depth, "depth", 1, "requests in flight on each connection; on a file, threads")
	flags.IntVar(&j.Connections, "connections", 1, "connections, each with a thread of its own")
	flags.DurationVar(&j.Runtime, "runtime", 2*time.Second, "after which no request is made")
	flags.BoolVar(&j.Structured, "structured", false, "ask for structured replies")
	flags.BoolVar(&j.Verify, "verify", false, "check that what is read is what was written; slow")
	asJSON := flags.Bool("json", false, "print JSON")
	if err := errors.Join(flags.Set("bs", "4k"), flags.Parse(args)); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", flags.Arg(0))
	}
	// A processor for each worker, so that none has to hand its own to another, and nothing to collect on the way.
	runtime.GOMAXPROCS(max(runtime.NumCPU(), j.Connections, generator.MaxThreads) + 2)
	debug.SetGCPercent(-1)

	r, err := j.Run(ctx)
	if err != nil {
		return err
	}
	if *asJSON {
		e := json.NewEncoder(stdout)
		e.SetIndent("", "  ")
		err = e.Encode(r)
	} else {
		_, err = fmt.Fprintf(stdout, "%.0f IOPS, %.1f MB/s, latency in µs: mean %.1f, median %.1f, 99 %% %.1f, most %.1f; %.2f µs of CPU for one request\n",
			r.IOPS, r.MBs, r.Latency.Mean, r.Latency.P50, r.Latency.P99, r.Latency.Max, r.CPU)
	}
	if err == nil && r.Errors+r.Mismatches > 0 {
		err = fmt.Errorf("%d requests failed, %d reads were wrong; first: %s", r.Errors, r.Mismatches, r.First)
	}
	return err
}
