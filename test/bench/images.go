package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"
)

// emptySize, in bytes, is that of disks on which every write meets another cluster: there are a million of them.
const emptySize = 64 << 30

// images are the files that are served. All are made by qemu-img with its defaults, but for those of writeRepeated.
type images struct {
	dir     string
	copyDir string            // of what nbdcopy reads and writes
	full    map[string]string // path by program: each has its own copy
	locked  [][]byte
	notes   []string
}

// Names of files.
const (
	backingName    = "backing.qcow2" // beside the images on it
	copySourceName = "copy-source"   // and the format
)

// newImages makes the images that the rows and servers need, in dir and, for nbdcopy, in copyDir.
func newImages(ctx context.Context, o *options, dir, copyDir string, servers []server, rows []row) (*images, error) {
	i := &images{dir: dir, copyDir: copyDir, full: map[string]string{}}
	need := map[imageKind]bool{}
	for _, r := range rows {
		need[r.Workload.Image] = true
	}
	random := interruptible{ctx, rand.NewChaCha8([32]byte{1})}
	if need[full] {
		if err := i.makeFull(ctx, o.imageSize, servers, random); err != nil {
			return i, err
		}
	}
	if need[onBacking] {
		path := filepath.Join(dir, backingName)
		if err := writeRepeated(path, emptySize, o.imageSize, random); err != nil {
			return i, err
		}
		i.keepInMemory(path)
	}
	source := filepath.Join(copyDir, copySourceName)
	if need[copied] || need[copying] {
		if err := writeRandom(source+".raw", o.copySize, random); err != nil {
			return i, err
		}
		i.keepInMemory(source + ".raw")
	}
	if need[copied] {
		if err := writeRepeated(source+".qcow2", o.copySize, min(o.copySize, o.imageSize), random); err != nil {
			return i, err
		}
		i.keepInMemory(source + ".qcow2")
	}
	return i, nil
}

// makeFull makes an image full of random data, and gives each program its own copy in the format that it serves.
func (i *images) makeFull(ctx context.Context, size int64, servers []server, random io.Reader) error {
	raw, qcow2 := filepath.Join(i.dir, "full.raw"), filepath.Join(i.dir, "full.qcow2")
	if err := writeRandom(raw, size, random); err != nil {
		return err
	}
	if _, err := output(ctx, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, qcow2); err != nil {
		return err
	}
	for _, s := range servers {
		if s.format() == "" || i.full[s.program()] != "" {
			continue
		}
		path := filepath.Join(i.dir, s.program()+"."+s.format())
		if err := copyFile(path, filepath.Join(i.dir, "full."+s.format())); err != nil {
			return err
		}
		i.full[s.program()] = path
		i.keepInMemory(path)
	}
	return errors.Join(os.Remove(raw), os.Remove(qcow2))
}

// open returns the path of an image for one measurement of the server, what nbdcopy has at its other end, and how to get
// rid of what is only for this measurement.
func (i *images) open(ctx context.Context, w workload, s server) (path, other string, done func() error, err error) {
	fresh := filepath.Join(i.dir, "fresh."+s.format())
	size := int64(emptySize)
	switch w.Image {
	case empty, onBacking:
	case full:
		done = func() error { return nil }
		if w.dirties() {
			// The next measurement must not share the disk with what this one leaves.
			done = func() error { return syncFile(i.full[s.program()]) }
		}
		return i.full[s.program()], "", done, nil
	case copied:
		other = filepath.Join(i.copyDir, "copy.raw")
		path = filepath.Join(i.copyDir, copySourceName+"."+s.format())
		return path, other, func() error { return os.Remove(other) }, os.WriteFile(other, nil, 0o600)
	case copying:
		other = filepath.Join(i.copyDir, copySourceName+".raw")
		fresh = filepath.Join(i.copyDir, "fresh."+s.format())
		info, err := os.Stat(other)
		if err != nil {
			return "", "", nil, err
		}
		size = info.Size()
	}
	args := []string{"create", "-q", "-f", s.format()}
	if w.Image == onBacking {
		args = append(args, "-b", backingName, "-F", "qcow2")
	}
	_, err = output(ctx, "qemu-img", append(args, fresh, strconv.FormatInt(size, 10))...)
	return fresh, other, func() error { return os.Remove(fresh) }, err
}

// keepInMemory makes sure that reading the file does not read the disk, if that is possible.
func (i *images) keepInMemory(path string) {
	m, err := mapFile(path)
	if err == nil {
		i.locked = append(i.locked, m)
		err = errors.Join(unix.Mlock(m), syncFile(path))
	}
	if err != nil {
		note := fmt.Sprintf("images may leave the page cache: %v", err)
		if !slices.Contains(i.notes, note) {
			i.notes = append(i.notes, note)
		}
	}
}

func mapFile(path string) (_ []byte, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	return unix.Mmap(int(f.Fd()), 0, int(info.Size()), unix.PROT_READ, unix.MAP_SHARED)
}

// syncFile writes a file to the disk.
func syncFile(path string) (err error) {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	return f.Sync()
}

func (i *images) close() error {
	var errs []error
	for _, m := range i.locked {
		errs = append(errs, unix.Munmap(m))
	}
	return errors.Join(errs...)
}

// interruptible is a reader that fails once its context is done: gigabytes take a while.
type interruptible struct {
	ctx context.Context
	io.Reader
}

// Read implements io.Reader.
func (i interruptible) Read(p []byte) (int, error) {
	if err := i.ctx.Err(); err != nil {
		return 0, err
	}
	return i.Reader.Read(p)
}

func writeRandom(path string, size int64, random io.Reader) error {
	return writeFile(path, io.LimitReader(random, size))
}

func copyFile(to, from string) (err error) {
	f, err := os.Open(from)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	return writeFile(to, f)
}

func writeFile(path string, from io.Reader) (err error) {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	_, err = io.Copy(f, from)
	return err
}
