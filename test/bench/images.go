package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// images are the files that are served. All are made by qemu-img with its defaults.
type images struct {
	dir    string
	full   map[string]string // path by server: each has its own copy
	locked [][]byte
	notes  []string
}

func newImages(ctx context.Context, dir string) (*images, error) {
	i := &images{dir: dir, full: map[string]string{}}
	raw := filepath.Join(dir, "random.raw")
	f, err := os.Create(raw)
	if err != nil {
		return nil, err
	}
	_, err = io.CopyN(f, rand.Reader, fullSize)
	if err := errors.Join(err, f.Close()); err != nil {
		return nil, err
	}
	for _, server := range []string{"qcow-csi", "qemu-nbd"} {
		path := filepath.Join(dir, server+".qcow2")
		if _, err := output(ctx, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, path); err != nil {
			return nil, err
		}
		i.full[server] = path
		if err := i.keepInMemory(path); err != nil {
			i.notes = append(i.notes, fmt.Sprintf("images may leave the page cache: mlock: %v", err))
		}
	}
	return i, os.Remove(raw)
}

// keepInMemory makes sure that reading the file does not read the disk.
func (i *images) keepInMemory(path string) (err error) {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	m, err := unix.Mmap(int(f.Fd()), 0, int(info.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	i.locked = append(i.locked, m)
	return unix.Mlock(m)
}

// open returns the path of an image for one measurement of the server, and how to get rid of it.
func (i *images) open(ctx context.Context, kind imageKind, server string) (path string, done func() error, err error) {
	if kind == full {
		return i.full[server], func() error { return nil }, nil
	}
	path = filepath.Join(i.dir, "empty.qcow2")
	_, err = output(ctx, "qemu-img", "create", "-f", "qcow2", path, strconv.Itoa(emptySize))
	return path, func() error { return os.Remove(path) }, err
}

func (i *images) close() error {
	var errs []error
	for _, m := range i.locked {
		errs = append(errs, unix.Munmap(m))
	}
	return errors.Join(errs...)
}
