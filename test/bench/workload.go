package main

import (
	"slices"
	"strings"
)

// imageKind says what a workload runs on.
type imageKind string

const (
	full      imageKind = "full"       // every cluster has data
	empty     imageKind = "empty"      // no cluster has; a fresh one for every measurement
	onBacking imageKind = "on backing" // no cluster has, but every one of the backing file; a fresh one as well
	copied    imageKind = "copied"     // what nbdcopy reads: every cluster has data
	copying   imageKind = "copying"    // what nbdcopy writes: empty and fresh
)

// workload is what a client does.
type workload struct {
	Name  string    `json:"name"`
	Image imageKind `json:"image"`
	RW    string    `json:"rw"`    // as fio and the load generator call it
	Block int64     `json:"block"` // bytes of a request
	Align int64     `json:"align"` // bytes; random offsets are multiples of it
	Unit  string    `json:"unit"`  // of what is compared: "IOPS" or "MB/s"
}

const (
	kib         = 1 << 10
	mib         = 1 << 20
	clusterSize = 64 * kib
	copyBlock   = 256 * kib // what nbdcopy asks for at a time
	mixReads    = 70        // percent
)

var workloads = []workload{
	{Name: "random read 4k", Image: full, RW: "randread", Block: 4 * kib, Align: 4 * kib, Unit: "IOPS"},
	{Name: "overwrite 4k", Image: full, RW: "randwrite", Block: 4 * kib, Align: 4 * kib, Unit: "IOPS"},
	{Name: "mixed 70/30 4k", Image: full, RW: "randrw", Block: 4 * kib, Align: 4 * kib, Unit: "IOPS"},
	{Name: "allocating write 4k", Image: empty, RW: "randwrite", Block: 4 * kib, Align: clusterSize, Unit: "IOPS"},
	{Name: "copy-on-write 4k", Image: onBacking, RW: "randwrite", Block: 4 * kib, Align: clusterSize, Unit: "IOPS"},
	{Name: "random read 64k", Image: full, RW: "randread", Block: 64 * kib, Align: 64 * kib, Unit: "IOPS"},
	{Name: "overwrite 64k", Image: full, RW: "randwrite", Block: 64 * kib, Align: 64 * kib, Unit: "IOPS"},
	{Name: "sequential read 1M", Image: full, RW: "read", Block: mib, Align: mib, Unit: "MB/s"},
	{Name: "sequential write 1M", Image: full, RW: "write", Block: mib, Align: mib, Unit: "MB/s"},
	{Name: "nbdcopy in", Image: copying, RW: "write", Block: copyBlock, Align: copyBlock, Unit: "MB/s"},
	{Name: "nbdcopy out", Image: copied, RW: "read", Block: copyBlock, Align: copyBlock, Unit: "MB/s"},
}

// isCopy tells whether nbdcopy is the client, with its own depth and connections.
func (w workload) isCopy() bool { return w.Image == copied || w.Image == copying }

// passing tells whether the image is removed after the measurement.
func (w workload) passing() bool {
	return w.Image == empty || w.Image == onBacking || w.Image == copying
}

// dirties tells whether the workload leaves data in an image that stays.
func (w workload) dirties() bool { return w.Image == full && w.RW != "read" && w.RW != "randread" }

// value returns the figure that is compared.
func (w workload) value(f figures) float64 {
	if w.Unit == "MB/s" {
		return f.MBs
	}
	return f.IOPS
}

// newRows returns the rows of the table that the options ask for.
func newRows(o *options, servers []server) (rows []row) {
	add := func(r row) {
		r.Cells = make([]cell, len(servers))
		for i, s := range servers {
			r.Cells[i].Absent = !s.can(r.Workload)
		}
		rows = append(rows, r)
	}
	for _, w := range workloads {
		if !o.workloads.MatchString(w.Name) {
			continue
		}
		if w.isCopy() {
			r := row{Workload: w, Client: "nbdcopy"}
			r.Command = r.client(o, server{})
			add(r)
			continue
		}
		for _, connections := range o.connections {
			for _, depth := range o.depths {
				for _, client := range []string{"load", "fio"} {
					if !slices.Contains(o.clients, client) || client == "fio" && !o.fioWorkloads.MatchString(w.Name) {
						continue
					}
					r := row{Workload: w, Depth: depth, Connections: connections, Client: client}
					r.Command = r.client(o, server{})
					add(r)
				}
			}
		}
	}
	return rows
}

// String names the row.
func (r row) String() string {
	if r.Workload.isCopy() {
		return r.Workload.Name
	}
	return strings.Join([]string{r.Workload.Name, r.shape(), r.Client}, ", ")
}
