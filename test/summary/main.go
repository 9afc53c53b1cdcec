// Command summary reads the events of `go test -json` and prints what `go test` prints: a line per package, and
// everything that a failed test said. Below that it names the tests that were skipped, with their reasons, and closes
// with one line of counts:
//
//	1204 passed, 0 failed, 3 skipped
//
// Tests and subtests are counted alike; a package that does not build, or that dies, counts as one failure.
//
// With -required it also reads a list of tests that must have run: one "PACKAGE TEST" a line, the package relative to the
// module. A test of the list that is absent, skipped, or has a skipped subtest is a failure. It is how continuous
// integration notices that the real mounts or the virtual machine silently stopped being tested.
//
// The exit status is 1 when anything failed or nothing ran. In a pipeline use it with pipefail, so that the status of
// go test counts as well.
package main

import (
	"flag"
	"fmt"
	"io"
	"os"
)

func main() {
	required := flag.String("required", "", "`file` that lists the tests that must have run and passed")
	flag.Parse()
	if err := run(os.Stdin, os.Stdout, *required); err != nil {
		fmt.Fprintln(os.Stderr, "summary:", err)
		os.Exit(1)
	}
}

func run(in io.Reader, out io.Writer, required string) error {
	var list []name
	if required != "" {
		f, err := os.Open(required)
		if err != nil {
			return err
		}
		list, err = parseRequired(f)
		if err = closeAfter(f, err); err != nil {
			return fmt.Errorf("%s: %w", required, err)
		}
	}
	r := newReport(out)
	if err := r.read(in); err != nil {
		return err
	}
	return r.finish(list)
}

// closeAfter closes c and returns err, or what Close said.
func closeAfter(c io.Closer, err error) error {
	if closeErr := c.Close(); err == nil {
		return closeErr
	}
	return err
}
