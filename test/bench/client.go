package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/qcow-csi/qcow-csi/test/load/generator"
)

// filePlace stands, in command lines of nbdcopy, for the file at the other end.
const filePlace = "FILE"

// client returns the command line of the client of a row, for a server, with placeholders.
func (r row) client(o *options, s server) []string {
	switch r.Client {
	case "fio":
		return r.fio(o, s)
	case "nbdcopy":
		return r.nbdcopy(s)
	}
	return r.load(o, s)
}

func uri() string { return "nbd+unix:///?socket=" + socketPlace }

// used is how many bytes of the disk the workload uses.
func (r row) used(o *options) int64 {
	if r.Workload.Image == full {
		return o.imageSize
	}
	return emptySize
}

// load returns the command line of our own generator.
func (r row) load(o *options, s server) []string {
	w := r.Workload
	args := []string{"load", "-uri", uri()}
	if s.Family == limit {
		args = []string{"load", "-file", imagePlace}
	}
	args = append(args,
		"-rw", w.RW, "-mix", strconv.Itoa(mixReads), "-bs", strconv.FormatInt(w.Block, 10),
		"-align", strconv.FormatInt(w.Align, 10), "-size", strconv.FormatInt(r.used(o), 10),
		"-depth", strconv.Itoa(r.Depth), "-connections", strconv.Itoa(r.Connections),
		"-runtime", o.runtime.String(), "-json")
	if w.Align > w.Block {
		args = append(args, "-distinct") // a cluster is allocated once
	}
	return args
}

// fio returns the command line of fio: one job, with a connection of its own, for each connection.
func (r row) fio(o *options, s server) []string {
	w, jobs, depth := r.Workload, r.Connections, r.Depth
	args := []string{"fio", "--name=bench", "--thread", "--group_reporting", "--unified_rw_reporting=mixed"}
	if s.Family == limit {
		jobs, depth = min(jobs*depth, generator.MaxThreads), 1
		args = append(args, "--ioengine=psync", "--filename="+imagePlace, "--allow_file_create=0", "--fallocate=none", "--invalidate=0")
	} else {
		args = append(args, "--ioengine=nbd", "--uri="+uri())
	}
	size := r.used(o)
	if w.RW == "read" || w.RW == "write" {
		size = size / int64(jobs) / w.Align * w.Align // a part of the disk for each job
		args = append(args, "--offset_increment="+strconv.FormatInt(size, 10))
	}
	return append(args,
		"--rw="+w.RW, "--rwmixread="+strconv.Itoa(mixReads), "--bs="+strconv.FormatInt(w.Block, 10),
		"--blockalign="+strconv.FormatInt(w.Align, 10), "--size="+strconv.FormatInt(size, 10), "--norandommap",
		"--iodepth="+strconv.Itoa(depth), "--numjobs="+strconv.Itoa(jobs),
		"--time_based", "--runtime="+strconv.Itoa(int(max(o.runtime, time.Second).Seconds())), "--output-format=json")
}

// nbdcopy returns the command line of nbdcopy, with its own defaults: up to 4 connections, 64 requests of 256 KiB on each.
func (r row) nbdcopy(s server) []string {
	disk := uri()
	if s.Family == limit {
		disk = imagePlace
	}
	if r.Workload.Image == copying {
		return []string{"nbdcopy", filePlace, disk}
	}
	return []string{"nbdcopy", disk, filePlace}
}

// figures are what a client has measured.
type figures struct {
	Requests int64
	IOPS     float64
	MBs      float64 // 10^6 bytes for each second
	P50, P99 float64 // latency in microseconds
}

// parseClient reads what the client of a row has written, after so many bytes were copied in so much time.
func parseClient(client string, out []byte, copied int64, took time.Duration) (figures, error) {
	switch client {
	case "fio":
		return parseFio(out)
	case "nbdcopy":
		n := copied / copyBlock
		return figures{
			Requests: n, IOPS: float64(n) / took.Seconds(), MBs: float64(copied) / 1e6 / took.Seconds(),
		}, nil
	}
	return parseLoad(out)
}

// parseLoad reads the JSON of our own generator.
func parseLoad(out []byte) (figures, error) {
	var r generator.Result
	if err := json.Unmarshal(out, &r); err != nil {
		return figures{}, fmt.Errorf("load: %w", err)
	}
	f := figures{Requests: r.Reads + r.Writes, IOPS: r.IOPS, MBs: r.MBs, P50: r.Latency.P50, P99: r.Latency.P99}
	if r.Errors > 0 || f.Requests == 0 {
		return figures{}, fmt.Errorf("load did %d requests, %d failed: %s", f.Requests, r.Errors, r.First)
	}
	return f, nil
}

// parseFio reads fio's JSON, which the nbd engine precedes with lines of its own.
func parseFio(out []byte) (figures, error) {
	begin := bytes.IndexByte(out, '{')
	if begin < 0 {
		return figures{}, fmt.Errorf("fio printed no JSON: %.200q", out)
	}
	var result struct {
		Jobs []struct {
			Error int
			Mixed struct {
				Total   int64   `json:"total_ios"`
				IOPS    float64 `json:"iops"`
				Bytes   float64 `json:"bw_bytes"`
				Latency struct {
					Percentile map[string]float64 `json:"percentile"`
				} `json:"clat_ns"`
			}
		}
	}
	if err := json.Unmarshal(out[begin:], &result); err != nil {
		return figures{}, fmt.Errorf("fio: %w", err)
	}
	if len(result.Jobs) != 1 {
		return figures{}, fmt.Errorf("fio reports %d jobs", len(result.Jobs))
	}
	job := result.Jobs[0]
	if job.Error != 0 || job.Mixed.Total == 0 {
		return figures{}, errors.New("fio did no I/O, or had errors")
	}
	percentile := job.Mixed.Latency.Percentile
	return figures{
		Requests: job.Mixed.Total, IOPS: job.Mixed.IOPS, MBs: job.Mixed.Bytes / 1e6,
		P50: percentile["50.000000"] / 1e3, P99: percentile["99.000000"] / 1e3,
	}, nil
}
