package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/qcow-csi/qcow-csi/test/load/generator"
)

// idleExports says how much memory one process takes that exports many images, as the node plugin does.
type idleExports struct {
	Exports int    `json:"exports"`
	Base    memory `json:"base"`   // of the process without any
	Idle    memory `json:"idle"`   // each has a client that does nothing
	Loaded  memory `json:"loaded"` // each has had allocating writes, and is idle again
}

// idleTarget is what an idle export may take, in KiB.
const idleTarget = 2048

// each returns how much of a figure one export takes, in KiB.
func (i *idleExports) each(of func(memory) int64, m memory) float64 {
	return float64(of(m)-of(i.Base)) / float64(i.Exports)
}

func rss(m memory) int64  { return m.RSS }
func anon(m memory) int64 { return m.Anon }

// measureIdle runs this program as a host without exports, and with so many.
func measureIdle(ctx context.Context, exports int, dir string) (*idleExports, error) {
	i := &idleExports{Exports: exports}
	err := withHost(ctx, nil, func(pid int) (err error) {
		i.Base, err = memoryOf(pid)
		return err
	})
	if err != nil {
		return nil, err
	}
	var paths []string
	for n := range exports {
		path := filepath.Join(dir, "idle-"+strconv.Itoa(n)+".qcow2")
		paths = append(paths, path)
		if _, err := output(ctx, "qemu-img", "create", "-q", "-f", "qcow2", path, strconv.Itoa(emptySize)); err != nil {
			return nil, err
		}
	}
	err = withHost(ctx, paths, func(pid int) error { return i.observe(ctx, pid, paths) })
	for _, path := range paths {
		err = errors.Join(err, os.Remove(path))
	}
	return i, err
}

// observe measures a host.
func (i *idleExports) observe(ctx context.Context, pid int, paths []string) (err error) {
	settle := func() { time.Sleep(500 * time.Millisecond) }
	var clients closers
	defer func() { err = errors.Join(err, clients.Close()) }()
	for _, path := range paths {
		client, err := generator.Hold(socketURI(path))
		if err != nil {
			return err
		}
		clients = append(clients, client)
	}
	settle()
	if i.Idle, err = memoryOf(pid); err != nil {
		return err
	}
	for _, path := range paths {
		_, err := generator.Job{
			URI:     socketURI(path),
			Pattern: generator.Pattern{RW: "randwrite", Block: 4 * kib, Align: clusterSize},
			Depth:   16, Connections: 1, Runtime: 50 * time.Millisecond,
		}.Run(ctx)
		if err != nil {
			return err
		}
	}
	settle()
	i.Loaded, err = memoryOf(pid)
	return err
}

func socketURI(image string) string { return "nbd+unix:///?socket=" + image + ".sock" }
