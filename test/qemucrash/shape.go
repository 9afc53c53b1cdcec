package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
)

// shape is what the image looks like that an operation is done to.
type shape struct {
	name    string
	cluster int64 // bytes
	size    int64 // of the disk in bytes
	shrunk  int64 // that resize --shrink goes to; data lies behind it
	grown   int64 // for which the L1 table must grow
	// What a guest wrote: before the first snapshot, between the two, and since the second.
	layers [3][]fill

	made []byte // the image, once it was made
}

// fill is a range of the disk, in bytes, with the value that each of its bytes has.
type fill struct {
	off, n int64
	value  byte
}

const (
	kib = 1 << 10
	mib = 1 << 20
	gib = 1 << 30

	image        = "disk.qcow2"
	firstRequest = 181 // the shapes use smaller values, and the guest's requests those from here on
	lastRequest  = 250
)

var shapes = []*shape{
	{
		// One L2 table, one refcount block; 20 to 30 clusters with data in each layer.
		name: "default", cluster: 64 * kib, size: 16 * mib, shrunk: 6 * mib, grown: 2 * gib,
		layers: [3][]fill{
			{{0, 1 * mib, 1}, {4 * mib, 640 * kib, 2}},
			{{512 * kib, 768 * kib, 3}, {9 * mib, 200 * kib, 4}},
			{{64 * kib, 100 * kib, 5}, {12 * mib, 256 * kib, 6}},
		},
	},
	{
		// 80 L2 tables of 2 MiB each.
		name: "wide", cluster: 4 * kib, size: 160 * mib, shrunk: 60 * mib, grown: 400 * mib,
		layers: [3][]fill{
			every(2*mib, 80, 0, 72*kib, 1),
			every(4*mib, 40, 16*kib, 32*kib, 81),
			every(6*mib, 26, 8*kib, 16*kib, 121),
		},
	},
}

// every returns fills of n bytes at start and at regular distances from it, each with its own value.
func every(step int64, count int, start, n int64, value byte) []fill {
	var fills []fill
	for i := range count {
		fills = append(fills, fill{start + int64(i)*step, n, value + byte(i)})
	}
	return fills
}

// create makes the image in dir, with its two snapshots.
func (s *shape) create(ctx context.Context, dir string) (err error) {
	path := filepath.Join(dir, image)
	if s.made != nil {
		return os.WriteFile(path, s.made, 0o600)
	}
	if err := s.createOver(ctx, dir); err != nil {
		return err
	}
	s.made, err = os.ReadFile(path)
	return err
}

// createOver does so with options of qemu-img create, which may name a backing file.
func (s *shape) createOver(ctx context.Context, dir string, options ...string) error {
	if err := s.empty(ctx, dir, image, options...); err != nil {
		return err
	}
	for i, layer := range s.layers {
		if err := write(ctx, dir, image, layer); err != nil {
			return err
		}
		if i == len(s.layers)-1 {
			break
		}
		if _, err := output(ctx, dir, "qemu-img", "snapshot", "-c", fmt.Sprint("s", i+1), image); err != nil {
			return err
		}
	}
	return nil
}

// flat makes the image in dir without a snapshot.
func (s *shape) flat(ctx context.Context, dir, name string) error {
	if err := s.empty(ctx, dir, name); err != nil {
		return err
	}
	for _, layer := range s.layers {
		if err := write(ctx, dir, name, layer); err != nil {
			return err
		}
	}
	return nil
}

// empty makes an image without data. Options are those of qemu-img create.
func (s *shape) empty(ctx context.Context, dir, name string, options ...string) error {
	args := append([]string{"create", "-q", "-f", "qcow2", "-o", fmt.Sprint("cluster_size=", s.cluster)}, options...)
	_, err := output(ctx, dir, "qemu-img", append(args, name, strconv.FormatInt(s.size, 10))...)
	return err
}

// write fills ranges of an image.
func write(ctx context.Context, dir, name string, fills []fill) error {
	args := []string{"-f", "qcow2", "-t", "unsafe"}
	for _, f := range fills {
		args = append(args, "-c", fmt.Sprintf("write -P %d %d %d", f.value, f.off, f.n))
	}
	_, err := output(ctx, dir, "qemu-io", append(args, name)...)
	return err
}
