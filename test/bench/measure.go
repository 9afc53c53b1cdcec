package main

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// sample is the outcome of one measurement.
type sample struct {
	Value float64 `json:"value"`         // in the unit of the workload
	CPU   float64 `json:"cpu,omitempty"` // of the server, in microseconds for one I/O
	P50   float64 `json:"p50,omitempty"` // latency in microseconds
	P99   float64 `json:"p99,omitempty"`
	Idle  memory  `json:"idle"` // of the server, before the load
	End   memory  `json:"end"`  // of the server, after the load
}

// patience is how much longer than its runtime a client may take before its server counts as hanging. nbdcopy has no runtime.
const patience = 5 * time.Minute

// laboratory has what measurements need.
type laboratory struct {
	*options
	images   *images
	socket   string
	programs map[string]string // paths of what was built, by name
}

// place puts paths into a command line of a row.
func (l *laboratory) place(r *row, command []string, image string) []string {
	placed := make([]string, len(command))
	replacer := strings.NewReplacer(imagePlace, image, socketPlace, l.socket, aioPlace, r.aio())
	for i, word := range command {
		placed[i] = replacer.Replace(word)
	}
	if path, ok := l.programs[placed[0]]; ok {
		placed[0] = path
	}
	return placed
}

// measure serves an image, lets the client work, and ends the server.
func (l *laboratory) measure(ctx context.Context, r *row, s server) (_ sample, err error) {
	image, file, done, err := l.images.open(ctx, r.Workload, s)
	if err != nil {
		return sample{}, err
	}
	defer func() { err = errors.Join(err, done()) }()

	client := l.place(r, r.client(l.options, s), image)
	for i, word := range client {
		if word == filePlace {
			client[i] = file
		}
	}
	work := func() (figures, error) {
		ctx, cancel := context.WithTimeout(ctx, l.runtime+patience)
		defer cancel()
		begin := time.Now()
		out, err := output(ctx, client[0], client[1:]...)
		if err != nil {
			return figures{}, err
		}
		return parseClient(r.Client, out, l.copySize, time.Since(begin))
	}
	if s.Family == limit {
		f, err := work()
		return sample{Value: r.Workload.value(f), P50: f.P50, P99: f.P99}, err
	}
	serving, err := start(ctx, l.place(r, s.Command, image), l.socket)
	if err != nil {
		return sample{}, err
	}
	end := serving.stop
	if r.Workload.passing() {
		end = serving.kill
	}
	defer func() { err = errors.Join(err, end()) }()
	return serving.observe(r.Workload, work)
}

// observe watches the server while a client works.
func (s *serving) observe(w workload, work func() (figures, error)) (sample, error) {
	pid := s.cmd.Process.Pid
	idle, err := memoryOf(pid)
	if err != nil {
		return sample{}, err
	}
	before, err := s.cpu()
	if err != nil {
		return sample{}, err
	}
	f, err := work()
	if err != nil {
		return sample{}, err
	}
	after, err := s.cpu()
	if err != nil {
		return sample{}, fmt.Errorf("the server is gone: %w", err)
	}
	end, err := memoryOf(pid)
	return sample{
		Value: w.value(f),
		CPU:   float64((after - before).Nanoseconds()) / 1e3 / float64(f.Requests),
		P50:   f.P50, P99: f.P99,
		Idle: idle, End: end,
	}, err
}

// output runs a program and returns what it writes; the error has what it writes to stderr.
func output(ctx context.Context, name string, args ...string) ([]byte, error) {
	out, err := exec.CommandContext(ctx, name, args...).Output()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		err = fmt.Errorf("%s: %w: %s", filepath.Base(name), err, exit.Stderr)
	}
	return out, err
}
