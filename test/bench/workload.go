package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"time"
)

// imageKind says what a workload runs on.
type imageKind int

const (
	full  imageKind = iota // every cluster has data
	empty                  // no cluster has; a fresh one for every measurement
)

const (
	fullSize  = 256 << 20
	emptySize = 32 << 30 // so many clusters that few are written twice
)

// workload is what the client does.
type workload struct {
	Name  string `json:"name"`
	image imageKind
	rw    string
	block string
	align string // of random offsets, if not the block
	Depth int    `json:"depth"`
	Unit  string `json:"unit"` // of what is compared: "IOPS" or "MB/s"
}

// workloads are the rows of the table.
var workloads = func() (ws []workload) {
	for _, w := range []workload{
		{Name: "random read 4k", image: full, rw: "randread", block: "4k", Unit: "IOPS"},
		{Name: "overwrite 4k", image: full, rw: "randwrite", block: "4k", Unit: "IOPS"},
		{Name: "allocating write 4k", image: empty, rw: "randwrite", block: "4k", align: "64k", Unit: "IOPS"},
		{Name: "sequential read 1M", image: full, rw: "read", block: "1M", Unit: "MB/s"},
	} {
		for _, w.Depth = range []int{1, 16} {
			ws = append(ws, w)
		}
	}
	return ws
}()

// fio returns the command line of the client.
func (w workload) fio(socket string, runtime time.Duration) []string {
	size := fullSize
	if w.image == empty {
		size = emptySize
	}
	args := []string{
		"fio", "--name=bench", "--ioengine=nbd", "--uri=nbd+unix:///?socket=" + socket,
		"--rw=" + w.rw, "--bs=" + w.block, "--iodepth=" + strconv.Itoa(w.Depth),
		"--size=" + strconv.Itoa(size), "--time_based", "--runtime=" + strconv.Itoa(int(runtime.Seconds())),
		"--norandommap", "--output-format=json",
	}
	if w.align != "" {
		args = append(args, "--blockalign="+w.align)
	}
	return args
}

// figures are what fio has measured.
type figures struct {
	ios          int64
	iops         float64
	bytesPerSecs float64
}

// parseFio reads fio's JSON, which the nbd engine precedes with a line of its own.
func parseFio(out []byte) (figures, error) {
	begin := bytes.IndexByte(out, '{')
	if begin < 0 {
		return figures{}, fmt.Errorf("fio printed no JSON: %.200q", out)
	}
	type direction struct {
		Total int64   `json:"total_ios"`
		IOPS  float64 `json:"iops"`
		Bytes float64 `json:"bw_bytes"`
	}
	var result struct {
		Jobs []struct {
			Error       int
			Read, Write direction
		}
	}
	if err := json.Unmarshal(out[begin:], &result); err != nil {
		return figures{}, fmt.Errorf("fio: %w", err)
	}
	if len(result.Jobs) != 1 {
		return figures{}, fmt.Errorf("fio reports %d jobs", len(result.Jobs))
	}
	job := result.Jobs[0]
	f := figures{job.Read.Total + job.Write.Total, job.Read.IOPS + job.Write.IOPS, job.Read.Bytes + job.Write.Bytes}
	if job.Error != 0 || f.ios == 0 {
		return figures{}, errors.New("fio did no I/O, or had errors")
	}
	return f, nil
}

// value is the figure that is compared.
func (w workload) value(f figures) float64 {
	if w.Unit == "MB/s" {
		return f.bytesPerSecs / 1e6
	}
	return f.iops
}
