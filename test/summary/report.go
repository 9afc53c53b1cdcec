package main

import (
	"bufio"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
)

// event is one line of `go test -json`; see `go doc test2json`.
type event struct {
	Action     string
	Package    string
	ImportPath string // of build-output
	Test       string
	Output     string
}

// name identifies a test. Test is empty for the package itself.
type name struct{ pkg, test string }

func (n name) String() string { return strings.TrimSpace(n.pkg + " " + n.test) }

func compare(a, b name) int { return cmp.Or(cmp.Compare(a.pkg, b.pkg), cmp.Compare(a.test, b.test)) }

// report collects events and prints packages as they end.
type report struct {
	out    io.Writer
	output map[name][]string // of tests and packages that have not passed
	result map[name]string   // "pass", "fail" or "skip" of tests that have ended
	open   map[name]bool     // tests that have begun and not ended
	dead   int               // packages that failed though none of their tests did
	err    error             // the first error of out
}

func newReport(out io.Writer) *report {
	return &report{out: out, output: map[name][]string{}, result: map[name]string{}, open: map[name]bool{}}
}

func (r *report) printf(format string, args ...any) {
	if _, err := fmt.Fprintf(r.out, format, args...); err != nil && r.err == nil {
		r.err = err
	}
}

// read consumes events until the end of in. Lines that are no events are passed on as they are.
func (r *report) read(in io.Reader) error {
	lines := bufio.NewScanner(in)
	lines.Buffer(nil, 64<<20) // a line of output of a test has no bound, a line of a file of hex has a large one
	for lines.Scan() {
		var e event
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			r.printf("%s\n", lines.Bytes())
			continue
		}
		r.add(e)
	}
	return errors.Join(lines.Err(), r.err)
}

func (r *report) add(e event) {
	n := name{e.Package, e.Test}
	switch e.Action {
	case "build-output":
		r.printf("%s", e.Output)
	case "run":
		r.open[n] = true
	case "output":
		r.output[n] = append(r.output[n], e.Output)
	case "pass", "fail", "skip":
		if n.test == "" {
			r.endPackage(n, e.Action)
			return
		}
		delete(r.open, n)
		if r.result[n] == "fail" { // in an earlier one of several runs
			return
		}
		r.result[n] = e.Action
		if e.Action == "pass" {
			delete(r.output, n)
		}
	}
}

// endPackage prints the package's line and, when it failed, what its failed and unfinished tests had to say.
func (r *report) endPackage(pkg name, action string) {
	own := r.output[pkg]
	delete(r.output, pkg)
	if action != "fail" {
		if len(own) > 0 { // the last line is "ok  	package	seconds", or "?   	package	[no test files]"
			r.printf("%s", own[len(own)-1])
		}
		return
	}
	blamed := false
	var failed []name
	for n := range r.output {
		if n.pkg == pkg.pkg && (r.result[n] == "fail" || r.open[n]) {
			failed = append(failed, n)
		}
	}
	slices.SortFunc(failed, compare)
	for _, n := range failed {
		blamed = blamed || r.result[n] == "fail"
		for _, line := range r.output[n] {
			if !strings.HasPrefix(line, "=== ") { // RUN, PAUSE, CONT: of interest to the machine only
				r.printf("%s", line)
			}
		}
		delete(r.output, n)
	}
	for _, line := range own {
		r.printf("%s", line)
	}
	if !blamed {
		r.dead++
	}
}

// finish prints the skipped tests, the required ones that did not run, and the counts.
func (r *report) finish(required []name) error {
	var skipped []name
	count := map[string]int{"fail": r.dead}
	for n, result := range r.result {
		count[result]++
		if result == "skip" {
			skipped = append(skipped, n)
		}
	}
	slices.SortFunc(skipped, compare)
	for _, n := range skipped {
		r.printf("skipped: %s: %s\n", n, reason(r.output[n]))
	}
	unmet := 0
	for _, want := range required {
		if why := r.unmet(want, skipped); why != "" {
			r.printf("required, but %s: %s\n", why, want)
			unmet++
		}
	}
	r.printf("%d passed, %d failed, %d skipped\n", count["pass"], count["fail"], count["skip"])
	switch {
	case r.err != nil:
		return r.err
	case count["fail"] > 0:
		return fmt.Errorf("%d failed", count["fail"])
	case unmet > 0:
		return fmt.Errorf("%d required tests did not do their work", unmet)
	case count["pass"] == 0:
		return errors.New("no test ran")
	}
	return nil
}

// unmet says in what way the required test did not do its work; "" when it did.
func (r *report) unmet(want name, skipped []name) string {
	for n, result := range r.result {
		if n.test != want.test || !strings.HasSuffix("/"+n.pkg, "/"+want.pkg) {
			continue
		}
		if result != "pass" {
			return "it did not pass (" + result + ")"
		}
		for _, s := range skipped {
			if s.pkg == n.pkg && strings.HasPrefix(s.test, n.test+"/") {
				return "it skipped " + s.test
			}
		}
		return ""
	}
	return "it did not run"
}

// reason is what a skipped test said: its output without the frame that the testing package puts around it.
func reason(output []string) string {
	var said []string
	for _, line := range output {
		line = strings.TrimSpace(line)
		if line != "" && !strings.HasPrefix(line, "=== ") && !strings.HasPrefix(line, "--- ") {
			said = append(said, line)
		}
	}
	if len(said) == 0 {
		return "no reason given"
	}
	return strings.Join(said, " ")
}

// parseRequired reads lines of "PACKAGE TEST"; empty ones and those that begin with # are comments.
func parseRequired(in io.Reader) ([]name, error) {
	var list []name
	lines := bufio.NewScanner(in)
	for lines.Scan() {
		line := strings.TrimSpace(lines.Text())
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		pkg, test, ok := strings.Cut(line, " ")
		if !ok {
			return nil, fmt.Errorf("%q is not of the form PACKAGE TEST", line)
		}
		list = append(list, name{pkg, strings.TrimSpace(test)})
	}
	return list, lines.Err()
}
