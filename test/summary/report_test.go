package main

import (
	"encoding/json"
	"strings"
	"testing"
)

const module = "example.org/m/"

// events encodes "action package test output" rows as go test does.
func events(t *testing.T, rows ...event) string {
	t.Helper()
	var b strings.Builder
	for _, e := range rows {
		line, err := json.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		b.Write(append(line, '\n'))
	}
	return b.String()
}

// passed is a package whose one test passes after saying something.
func passed(pkg, test string) []event {
	return []event{
		{Action: "run", Package: module + pkg, Test: test},
		{Action: "output", Package: module + pkg, Test: test, Output: "noise\n"},
		{Action: "pass", Package: module + pkg, Test: test},
		{Action: "output", Package: module + pkg, Output: "PASS\n"},
		{Action: "output", Package: module + pkg, Output: "ok  \t" + module + pkg + "\t0.1s\n"},
		{Action: "pass", Package: module + pkg},
	}
}

func skippedTest(pkg, test string) []event {
	return []event{
		{Action: "run", Package: module + pkg, Test: test},
		{Action: "output", Package: module + pkg, Test: test, Output: "=== RUN   " + test + "\n"},
		{Action: "output", Package: module + pkg, Test: test, Output: "    x_test.go:1: needs root\n"},
		{Action: "output", Package: module + pkg, Test: test, Output: "--- SKIP: " + test + " (0.00s)\n"},
		{Action: "skip", Package: module + pkg, Test: test},
	}
}

func TestReport(t *testing.T) {
	for _, c := range []struct {
		name     string
		rows     []event
		required string
		ok       bool
		want     []string // parts of the output
		not      []string
	}{
		{
			name: "all pass", rows: passed("a", "TestX"), ok: true,
			want: []string{"ok  \texample.org/m/a\t0.1s\n", "\n1 passed, 0 failed, 0 skipped\n"}, not: []string{"noise", "PASS"},
		},
		{
			name: "nothing ran", rows: nil, ok: false, want: []string{"0 passed, 0 failed, 0 skipped\n"},
		},
		{
			name: "a failed test is heard",
			rows: []event{
				{Action: "run", Package: "a", Test: "TestX"},
				{Action: "output", Package: "a", Test: "TestX", Output: "=== RUN   TestX\n"},
				{Action: "output", Package: "a", Test: "TestX", Output: "the reason\n"},
				{Action: "fail", Package: "a", Test: "TestX"},
				{Action: "output", Package: "a", Output: "FAIL\ta\t0.1s\n"},
				{Action: "fail", Package: "a"},
			},
			want: []string{"the reason\n", "FAIL\ta\t0.1s\n", "0 passed, 1 failed, 0 skipped\n"}, not: []string{"=== RUN"},
		},
		{
			name: "a package that does not build",
			rows: append(passed("b", "TestY"),
				event{Action: "build-output", ImportPath: "a", Output: "a.go:1: syntax error\n"},
				event{Action: "output", Package: "a", Output: "FAIL\ta [build failed]\n"},
				event{Action: "fail", Package: "a"}),
			want: []string{"a.go:1: syntax error\n", "[build failed]", "1 passed, 1 failed, 0 skipped\n"},
		},
		{
			name: "a package that dies in the middle of a test",
			rows: []event{
				{Action: "run", Package: "a", Test: "TestX"},
				{Action: "output", Package: "a", Test: "TestX", Output: "panic: test timed out\n"},
				{Action: "fail", Package: "a"},
			},
			want: []string{"panic: test timed out", "0 passed, 1 failed, 0 skipped\n"},
		},
		{
			name: "a skip is named with its reason", rows: append(skippedTest("a", "TestR"), passed("b", "TestY")...), ok: true,
			want: []string{"skipped: example.org/m/a TestR: x_test.go:1: needs root\n", "1 passed, 0 failed, 1 skipped\n"},
		},
		{
			name: "a required test that passed", rows: passed("a", "TestX"), required: "# why\na TestX\n", ok: true,
		},
		{
			name: "a required test that is not there", rows: passed("a", "TestX"), required: "a TestGone\n",
			want: []string{"required, but it did not run: a TestGone\n", "1 passed, 0 failed, 0 skipped\n"},
		},
		{
			name: "a required test of another package", rows: passed("aa", "TestX"), required: "a TestX\n",
			want: []string{"it did not run"},
		},
		{
			name: "a required test that skipped", rows: append(skippedTest("a", "TestR"), passed("b", "TestY")...), required: "a TestR",
			want: []string{"it did not pass (skip): a TestR\n"},
		},
		{
			name: "a required test with a subtest that skipped",
			rows: append(skippedTest("a", "TestX/xfs"), passed("a", "TestX")...), required: "a TestX",
			want: []string{"it skipped TestX/xfs: a TestX\n"},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			required, err := parseRequired(strings.NewReader(c.required))
			if err != nil {
				t.Fatal(err)
			}
			var out strings.Builder
			r := newReport(&out)
			if err := r.read(strings.NewReader(events(t, c.rows...))); err != nil {
				t.Fatal(err)
			}
			if err := r.finish(required); (err == nil) != c.ok {
				t.Errorf("finish: %v, want success: %v", err, c.ok)
			}
			for _, part := range c.want {
				if !strings.Contains("\n"+out.String(), part) {
					t.Errorf("%q is missing in:\n%s", part, out.String())
				}
			}
			for _, part := range c.not {
				if strings.Contains(out.String(), part) {
					t.Errorf("%q does not belong in:\n%s", part, out.String())
				}
			}
		})
	}
}

func TestLinesThatAreNoEventsArePassedOn(t *testing.T) {
	var out strings.Builder
	if err := newReport(&out).read(strings.NewReader("go: no such module\n")); err != nil || out.String() != "go: no such module\n" {
		t.Errorf("read %q, %v", out.String(), err)
	}
}

func TestMalformedRequirement(t *testing.T) {
	if _, err := parseRequired(strings.NewReader("only-a-package\n")); err == nil {
		t.Error("a line without a test was accepted")
	}
}
