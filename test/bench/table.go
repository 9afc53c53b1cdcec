package main

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
)

// table is a heading, what is to be said of it, and cells; the first row names the columns.
type table struct {
	title string
	text  string
	rows  [][]string
	left  int // columns that are aligned to the left
}

// tables returns everything that a reader of the report wants to see.
func (r *report) tables() []table {
	ts := []table{r.targets(), r.figures(), r.processor(), r.memory()}
	if r.Idle != nil {
		ts = append(ts, r.idle())
	}
	return ts
}

// labels begin each row of a table.
func (r row) labels() []string { return []string{r.Workload.Name, r.shape(), r.Client} }

var labelNames = []string{"workload", "depth x connections", "client"}

func (r *report) targets() table {
	t := table{
		title: "Ratios and targets",
		text: "Of qcow-csi to the others, in operations or bytes for each second; \"CPU\" is the server's processor time for one I/O. " +
			"QEMU is the better of its servers in that row. In brackets the target, and whether it is met.",
		rows: [][]string{append(labelNames[:3:3], "to QEMU", "CPU to QEMU", "to nbdkit file", "to nbdkit null", "to raw", "QEMU is")},
		left: 3,
	}
	met, all := 0, 0
	for _, row := range r.Rows {
		peer := r.againstQEMU(row)
		cells := row.labels()
		for _, c := range []comparison{peer, r.processorAgainstQEMU(row), r.againstFile(row), r.againstNull(row), r.againstRaw(row)} {
			cells = append(cells, c.String())
			if c.judged() {
				all++
				if c.met() {
					met++
				}
			}
		}
		if peer.peer == "" {
			peer.peer = "-"
		}
		t.rows = append(t.rows, append(cells, peer.peer))
	}
	t.text += fmt.Sprintf(" Of %d targets %d are met.", all, met)
	return t
}

// byServer returns a table with one column for each server.
func (r *report) byServer(title, text string, show func(row, cell) string) table {
	t := table{title: title, text: text, rows: [][]string{labelNames[:3:3]}, left: 3}
	for _, s := range r.Servers {
		t.rows[0] = append(t.rows[0], s.Name)
	}
	for _, row := range r.Rows {
		cells := row.labels()
		for _, c := range row.Cells {
			switch {
			case c.Error != "":
				cells = append(cells, "failed")
			case len(c.Samples) == 0:
				cells = append(cells, "-")
			default:
				cells = append(cells, show(row, c))
			}
		}
		t.rows = append(t.rows, cells)
	}
	return t
}

func (r *report) figures() table {
	return r.byServer("Figures", "Median, and in brackets the least and the greatest sample. IOPS, or MB/s where blocks are of 256 KiB or more.", func(_ row, c cell) string {
		values := pick(c.Samples, value)
		if len(values) == 1 {
			return fmt.Sprintf("%.0f", values[0])
		}
		return fmt.Sprintf("%.0f (%.0f..%.0f)", median(values), slices.Min(values), slices.Max(values))
	})
}

func (r *report) processor() table {
	return r.byServer("Processor time", "Of the server for one I/O, in microseconds: median. nbdcopy's I/O is of 256 KiB.",
		func(_ row, c cell) string {
			if m := median(pick(c.Samples, cpu)); m > 0 {
				return fmt.Sprintf("%.1f", m)
			}
			return "-"
		})
}

// memory has one row for each server: what it takes hardly depends on the workload, and the most is what counts.
func (r *report) memory() table {
	t := table{
		title: "Memory of the servers",
		text:  "In MiB, over all rows: median of the idle server, median after the load, and the most that was ever resident. \"Anonymous\" is the part that is no page cache.",
		rows:  [][]string{{"server", "idle", "idle, anonymous", "after load", "after load, anonymous", "peak"}},
		left:  1,
	}
	for i, s := range r.Servers {
		var samples []sample
		for _, row := range r.Rows {
			samples = append(samples, row.Cells[i].Samples...)
		}
		if len(samples) == 0 || s.Family == limit {
			continue
		}
		cells := []string{s.Name}
		for _, of := range []func(sample) int64{
			func(s sample) int64 { return s.Idle.RSS }, func(s sample) int64 { return s.Idle.Anon },
			func(s sample) int64 { return s.End.RSS }, func(s sample) int64 { return s.End.Anon },
		} {
			cells = append(cells, mebibytes(median(pick(samples, func(s sample) float64 { return float64(of(s)) }))))
		}
		var peak int64
		for _, s := range samples {
			peak = max(peak, s.End.Peak)
		}
		t.rows = append(t.rows, append(cells, mebibytes(float64(peak))))
	}
	return t
}

// mebibytes writes a number of KiB.
func mebibytes(kib float64) string { return fmt.Sprintf("%.1f", kib/1024) }

func (r *report) idle() table {
	i := r.Idle
	verdict := func(kib float64) string {
		c := comparison{peer: "base", ratio: kib / 1024, target: idleTarget / 1024, atMost: true}
		return c.String()
	}
	return table{
		title: "Memory of an idle export",
		text: fmt.Sprintf("Of one process that exports %d images of %d GiB, each with one client: MiB for each export, above the %s MiB (%s anonymous) of the process without exports.",
			i.Exports, int64(emptySize)>>30, mebibytes(float64(i.Base.RSS)), mebibytes(float64(i.Base.Anon))),
		rows: [][]string{
			{"state", "resident", "anonymous"},
			{"idle from the beginning", verdict(i.each(rss, i.Idle)), mebibytes(i.each(anon, i.Idle))},
			{"idle after allocating writes at depth 16", verdict(i.each(rss, i.Loaded)), mebibytes(i.each(anon, i.Loaded))},
		},
		left: 1,
	}
}

// introduction says where, when and how the figures were taken, one sentence a line.
func (r *report) introduction() (lines []string) {
	m := r.Machine
	lines = append(lines,
		fmt.Sprintf("%s: %s, %d CPUs, %d MiB of memory, Linux %s; load before the run: %s.", r.Date, m.Processor, m.CPUs, m.MemoryMiB, m.Kernel, m.Load),
		fmt.Sprintf("%d rounds, %g s for each measurement; nbdcopy copies %d MiB.", r.Rounds, r.Runtime, r.Copied>>20))
	var versions []string
	for _, v := range m.Versions {
		versions = append(versions, v.Program+": "+v.Version)
	}
	lines = append(lines, strings.Join(versions, "; ")+".")
	lines = append(lines, "AIO in QEMU's command lines is threads for allocating writes with more than one request in flight, else io_uring.")
	for _, note := range r.Notes {
		lines = append(lines, "Note: "+note+".")
	}
	for _, failure := range r.failures() {
		lines = append(lines, "Failed: "+strings.Join(strings.Fields(failure), " "))
	}
	return lines
}

// commands lists the command lines of the servers, and of each client in its first row.
func (r *report) commands() (lines []string) {
	for _, s := range r.Servers {
		if len(s.Command) > 0 {
			lines = append(lines, strings.Join(s.Command, " "))
		}
	}
	seen := map[string]bool{}
	for _, row := range r.Rows {
		if !seen[row.Client] {
			seen[row.Client] = true
			lines = append(lines, strings.Join(row.Command, " "))
		}
	}
	return lines
}

// writeText writes the report for a terminal.
func (r *report) writeText(w io.Writer) error {
	var b strings.Builder
	for _, line := range append(r.introduction(), r.commands()...) {
		b.WriteString(line + "\n")
	}
	for _, t := range r.tables() {
		fmt.Fprintf(&b, "\n%s\n%s\n\n", strings.ToUpper(t.title), t.text)
		cells := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
		for _, row := range t.rows {
			if _, err := io.WriteString(cells, strings.Join(row, "\t")+"\n"); err != nil {
				return err
			}
		}
		if err := cells.Flush(); err != nil {
			return err
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}
