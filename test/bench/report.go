package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
)

// report is everything that one run says. Tables and pictures are made of nothing else.
type report struct {
	Date    string       `json:"date"`
	Machine machine      `json:"machine"`
	Rounds  int          `json:"rounds"` // that are complete
	Runtime float64      `json:"runtime_seconds"`
	Copied  int64        `json:"copied_bytes"` // by nbdcopy
	Servers []server     `json:"servers"`
	Notes   []string     `json:"notes,omitempty"`
	Rows    []row        `json:"rows"`
	Idle    *idleExports `json:"idle_exports,omitempty"`
}

// row has the measurements of one workload with one client.
type row struct {
	Workload    workload `json:"workload"`
	Depth       int      `json:"depth,omitempty"` // 0: the client's default
	Connections int      `json:"connections,omitempty"`
	Client      string   `json:"client"`  // load, fio or nbdcopy
	Command     []string `json:"command"` // of the client
	Cells       []cell   `json:"cells"`   // by server, as in report.Servers
}

// cell has the measurements of one server in a row.
type cell struct {
	Absent  bool     `json:"absent,omitempty"` // the server has no part in the workload
	Error   string   `json:"error,omitempty"`  // why there is no further sample
	Samples []sample `json:"samples,omitempty"`
}

// shape names the depth and the connections.
func (r row) shape() string {
	if r.Depth == 0 {
		return "default"
	}
	return fmt.Sprintf("%d x %d", r.Depth, r.Connections)
}

func (r *report) writeJSON(w io.Writer) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(r)
}

// save writes the report to a file.
func (r *report) save(path string) (err error) {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	return r.writeJSON(f)
}

func readReport(path string) (*report, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var r report
	if err := json.Unmarshal(text, &r); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	for _, row := range r.Rows {
		if len(row.Cells) != len(r.Servers) {
			return nil, fmt.Errorf("%s: %s: %d cells for %d servers", path, row, len(row.Cells), len(r.Servers))
		}
	}
	return &r, nil
}

// failures lists the measurements that were not possible.
func (r *report) failures() (fs []string) {
	for _, row := range r.Rows {
		for i, c := range row.Cells {
			if c.Error != "" {
				fs = append(fs, fmt.Sprintf("%s, %s: %s", r.Servers[i].Name, row, c.Error))
			}
		}
	}
	return fs
}
