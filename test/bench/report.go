package main

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
)

// report is everything that one run says.
type report struct {
	Machine machine  `json:"machine"`
	Rounds  int      `json:"rounds"`
	Runtime float64  `json:"runtime_seconds"`
	Servers []server `json:"servers"`
	Notes   []string `json:"notes,omitempty"`
	Rows    []row    `json:"rows"`
}

// row has the measurements of one workload.
type row struct {
	Workload workload   `json:"workload"`
	Command  []string   `json:"client"`
	Samples  [][]sample `json:"samples"` // by server, as in report.Servers
	Medians  []sample   `json:"medians"`
	Ratio    float64    `json:"ratio"` // of the first server's value to the second's
}

// summarize computes what follows from the samples.
func (r *report) summarize() {
	for i := range r.Rows {
		row := &r.Rows[i]
		row.Medians = nil
		for _, samples := range row.Samples {
			row.Medians = append(row.Medians, sample{
				Value: median(samples, func(s sample) float64 { return s.Value }),
				CPU:   median(samples, func(s sample) float64 { return s.CPU }),
			})
		}
		row.Ratio = row.Medians[0].Value / row.Medians[1].Value
	}
}

func median(samples []sample, of func(sample) float64) float64 {
	values := make([]float64, len(samples))
	for i, s := range samples {
		values[i] = of(s)
	}
	slices.Sort(values)
	middle := len(values) / 2
	if len(values)%2 == 0 {
		return (values[middle-1] + values[middle]) / 2
	}
	return values[middle]
}

func (r *report) writeJSON(w io.Writer) error {
	r.summarize()
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(r)
}

func (r *report) writeTable(w io.Writer) error {
	r.summarize()
	m := r.Machine
	text := fmt.Appendf(nil, "%s, %d CPUs, %d MiB, Linux %s; %s, %s, %s\n",
		m.Processor, m.CPUs, m.MemoryMiB, m.Kernel, m.Go, m.Fio, m.QEMU)
	for _, s := range r.Servers {
		text = fmt.Appendf(text, "%s: %s IMAGE\n", s.Name, strings.Join(s.Command, " "))
	}
	if len(r.Rows) > 0 {
		text = fmt.Appendf(text, "client, of the first row: %s\n", strings.Join(r.Rows[0].Command, " "))
	}
	for _, note := range r.Notes {
		text = fmt.Appendf(text, "note: %s\n", note)
	}
	text = fmt.Appendf(text, "medians of %d rounds of %g s; in brackets, CPU time of the server for one I/O, in microseconds\n\n",
		r.Rounds, r.Runtime)
	if _, err := w.Write(text); err != nil {
		return err
	}

	cells := fmt.Appendf(nil, "workload\tdepth\t%s\t\t%s\t\t\tratio\t\n", r.Servers[0].Name, r.Servers[1].Name)
	for _, row := range r.Rows {
		ours, peer := row.Medians[0], row.Medians[1]
		cells = fmt.Appendf(cells, "%s\t%d\t%.0f\t(%.1f)\t%.0f\t(%.1f)\t%s\t%.2f\t\n", row.Workload.Name, row.Workload.Depth,
			ours.Value, ours.CPU, peer.Value, peer.CPU, row.Workload.Unit, row.Ratio)
	}
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	if _, err := table.Write(cells); err != nil {
		return err
	}
	return table.Flush()
}
