package main

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"errors"
	"flag"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write what the tests of texts and pictures want")

func samples(values ...float64) (ss []sample) {
	for _, v := range values {
		ss = append(ss, sample{
			Value: v, CPU: 1e6 / v, P50: 10, P99: 20,
			Idle: memory{4096, 1024, 4096}, End: memory{8192, 2048, int64(v)},
		})
	}
	return ss
}

// testReport is a run of two rows and of nbdcopy, with a server that failed.
func testReport() *report {
	all := newServers(1 << 30)
	r := &report{
		Date: "2024-02-29", Rounds: 3, Runtime: 2, Copied: 4 << 30, Notes: []string{"something to know"},
		Machine: machine{
			Processor: "A <fast> one", CPUs: 2, MemoryMiB: 4096, Kernel: "6.1", Load: "0.00 0.01 0.05",
			Versions: []version{{"Go", "go1"}, {"fio", "fio-3"}},
		},
		Idle: &idleExports{Exports: 4, Base: memory{RSS: 10 << 10, Anon: 1 << 10}, Idle: memory{RSS: 14 << 10, Anon: 3 << 10}, Loaded: memory{RSS: 30 << 10, Anon: 19 << 10}},
	}
	for _, s := range all {
		if !s.extra && !strings.Contains(s.Name, "large") {
			r.Servers = append(r.Servers, s)
		}
	}
	o, err := parseOptions([]string{"-workloads", "random read 4k|allocating|nbdcopy out", "-depths", "16", "-connections", "1", "-clients", "load", "-runtime", "2s"})
	if err != nil {
		panic(err)
	}
	r.Rows = newRows(o, r.Servers)
	for i := range r.Rows {
		r.Rows[i].Cells[0].Samples = samples(90, 300, 100)
		r.Rows[i].Cells[1].Samples = samples(30, 110, 50)
		r.Rows[i].Cells[2].Samples = samples(60, 60, 60)
	}
	r.Rows[0].Cells[3].Samples = samples(100, 100, 100)
	r.Rows[0].Cells[4].Samples = samples(200, 200, 200)
	r.Rows[0].Cells[5].Samples = samples(1000, 1000, 1000)
	r.Rows[1].Cells[3].Error = "it\nended"
	return r
}

func TestStatistics(t *testing.T) {
	for _, c := range []struct{ got, want float64 }{
		{median(nil), 0},
		{median([]float64{3}), 3},
		{median([]float64{9, 1, 5}), 5},
		{median([]float64{1, 2, 4, 100}), 3},
		{ratio([]float64{10, 40, 30}, []float64{5, 10, 10}), 3}, // not 30/10 by chance: the quotients are 2, 4, 3
		{ratio([]float64{10, 100}, []float64{5}), 2},
		{ratio([]float64{10}, []float64{0}), 0},
	} {
		if diff := c.got - c.want; diff > 1e-9 || diff < -1e-9 {
			t.Errorf("%g, want %g", c.got, c.want)
		}
	}
}

func TestComparison(t *testing.T) {
	r := testReport()
	for name, c := range map[string]struct{ got, want any }{
		"the better one is the peer": {r.againstQEMU(r.Rows[0]).peer, "qemu-storage-daemon"},
		"QEMU":                       {r.againstQEMU(r.Rows[0]).String(), "1.67 (>= 2.5: missed by 33 %)"},
		"allocating":                 {r.againstQEMU(r.Rows[1]).target, 6.},
		"nbdcopy":                    {r.againstQEMU(r.Rows[2]).String(), "1.67 (>= 1.3: met)"},
		"processor":                  {r.processorAgainstQEMU(r.Rows[0]).String(), "0.60 (<= 0.5: missed by 20 %)"},
		"file":                       {r.againstFile(r.Rows[0]).String(), "1.00 (>= 1.1: missed by 9 %)"},
		"failed":                     {r.againstFile(r.Rows[1]).String(), "-"},
		"null":                       {r.againstNull(r.Rows[0]).String(), "0.50 (>= 0.8: missed by 38 %)"},
		"absent":                     {r.againstNull(r.Rows[1]).String(), "-"},
		"raw":                        {r.againstRaw(r.Rows[0]).String(), "0.10"},
		"a hair's breadth":           {comparison{peer: "x", ratio: 2.4999, target: 2.5}.String(), "2.50 (>= 2.5: missed by 1 %)"},
	} {
		if c.got != c.want {
			t.Errorf("%s: %v, want %v", name, c.got, c.want)
		}
	}
}

// TestTargets holds every row of a full run to the target that docs/benchmarks.md names.
func TestTargets(t *testing.T) {
	o, err := parseOptions([]string{"-full"})
	if err != nil {
		t.Fatal(err)
	}
	r := testReport()
	for _, row := range newRows(o, r.Servers) {
		want := 1.8
		switch name := row.Workload.Name; {
		case strings.HasPrefix(name, "allocating"):
			want = 6
		case strings.HasPrefix(name, "copy-on-write"):
			want = 3
		case strings.HasPrefix(name, "sequential"):
			want = 1.5
		case strings.HasPrefix(name, "nbdcopy"):
			want = 1.3
		case row.Connections == 4:
			want = 3.5
		case row.Depth > 1:
			want = 2.5
		}
		if got := r.againstQEMU(row).target; got != want {
			t.Errorf("%s: target %g, want %g", row, got, want)
		}
	}
}

// TestForms compares the text, the section of a document and the picture with what they were when somebody last looked
// at them.
func TestForms(t *testing.T) {
	r := testReport()
	var text bytes.Buffer
	if err := r.writeText(&text); err != nil {
		t.Fatal(err)
	}
	for name, got := range map[string]string{"report.txt": text.String(), "report.md": r.markdown(), "report.svg": r.chart()} {
		path := filepath.Join("testdata", name)
		if *update {
			if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if got != string(want) {
			t.Errorf("%s differs from testdata; go test ./test/bench -update writes it:\n%s", name, got)
		}
	}
}

func TestChartIsXML(t *testing.T) {
	d := xml.NewDecoder(strings.NewReader(testReport().chart()))
	for {
		if _, err := d.Token(); errors.Is(err, io.EOF) {
			return
		} else if err != nil {
			t.Fatal(err)
		}
	}
}

// TestFrom makes sure that everything is drawn from the JSON alone.
func TestFrom(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "report.json")
	r := testReport()
	if err := r.save(path); err != nil {
		t.Fatal(err)
	}
	got, err := readReport(path)
	if err != nil {
		t.Fatal(err)
	}
	if got.markdown() != r.markdown() || got.chart() != r.chart() || len(got.failures()) != 1 {
		t.Error("the report that was read differs from the one that was written")
	}
	document, picture := filepath.Join(dir, "x.md"), filepath.Join(dir, "x.svg")
	if err := os.WriteFile(document, []byte("before\n"+sectionBegin+"old\n"+sectionEnd+"after\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := run(t.Context(), []string{"-from", path, "-markdown", document, "-svg", picture, "-json", filepath.Join(dir, "no")}); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(document)
	if err != nil {
		t.Fatal(err)
	}
	if want := "before\n" + sectionBegin + "\n" + r.markdown() + "\n" + sectionEnd + "after\n"; string(text) != want {
		t.Errorf("the document is now %q", text)
	}
	if _, err := os.Stat(picture); err != nil {
		t.Error(err)
	}
}

func TestReadReport(t *testing.T) {
	path := filepath.Join(t.TempDir(), "r")
	r := testReport()
	r.Rows[0].Cells = r.Rows[0].Cells[1:]
	text, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range [][]byte{text, nil, []byte("{")} {
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := readReport(path); err == nil {
			t.Errorf("%.40q was accepted", text)
		}
	}
}

func TestReplaceSection(t *testing.T) {
	for _, document := range []string{"", sectionBegin, sectionEnd + sectionBegin} {
		if text, err := replaceSection(document, "x"); err == nil {
			t.Errorf("%q became %q", document, text)
		}
	}
}

// TestDocument makes sure that the document has the section that runs are put into.
func TestDocument(t *testing.T) {
	text, err := os.ReadFile("../../docs/benchmarks.md")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := replaceSection(string(text), "x"); err != nil {
		t.Error(err)
	}
}

func TestRowsAndCells(t *testing.T) {
	o, err := parseOptions([]string{"-full"})
	if err != nil {
		t.Fatal(err)
	}
	servers := newServers(1 << 30)
	rows := newRows(o, servers)
	if want := 9*3*2*2 + 2; len(rows) != want {
		t.Errorf("%d rows, want %d", len(rows), want)
	}
	seen := map[string]bool{}
	for _, row := range rows {
		if seen[row.String()] {
			t.Errorf("%s is there twice", row)
		}
		seen[row.String()] = true
		for i, s := range servers {
			var absent bool
			switch s.Family {
			case ours, qemu:
			case nbdkitNull:
				absent = row.Workload.Image != full
			case nbdkitFile, limit:
				absent = row.Workload.Image == onBacking
			}
			if row.Cells[i].Absent != absent {
				t.Errorf("%s in %s: absent is %t", s.Name, row, !absent)
			}
		}
	}
}
