package judge

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

const (
	sector = 512
	block  = 64 << 10
)

// disk is what a guest finds on a virtual disk. Blocks that are not in the map, and what lies past the end, are zeroes.
type disk struct {
	size   int64
	blocks map[int64][]byte // by number
}

// readRaw reads a raw image. It skips the holes of the file.
func readRaw(path string) (_ *disk, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	d := &disk{size: info.Size(), blocks: map[int64][]byte{}}
	for at := int64(0); ; {
		data, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return d, nil
		}
		if err != nil {
			return nil, fmt.Errorf("%s: find data: %w", path, err)
		}
		n := data / block
		b := make([]byte, block)
		if _, err := f.ReadAt(b, n*block); err != nil && !errors.Is(err, io.EOF) {
			return nil, err
		}
		if !bytes.Equal(b, zeroes) {
			d.blocks[n] = b
		}
		at = (n + 1) * block
	}
}

var zeroes = make([]byte, block)

// block returns the content of a block.
func (d *disk) block(n int64) []byte {
	if b := d.blocks[n]; b != nil {
		return b
	}
	return zeroes
}

// sector returns the content of a sector.
func (d *disk) sector(n int64) []byte {
	return d.block(n * sector / block)[n*sector%block:][:sector]
}

func (d *disk) equal(o *disk) bool {
	return d.size == o.size && maps.EqualFunc(d.blocks, o.blocks, bytes.Equal)
}

// fill returns a disk in which n bytes at off, whole sectors of it, have the given value.
func (d *disk) fill(off, n int64, value byte) *disk {
	filled := &disk{size: d.size, blocks: maps.Clone(d.blocks)}
	for end := off + n; off < end; {
		number := off / block
		b := slices.Clone(d.block(number))
		part := b[off%block : min(block, off%block+end-off)]
		for i := range part {
			part[i] = value
		}
		filled.blocks[number] = b
		d, off = filled, off+int64(len(part))
	}
	return filled
}

// numbers returns the numbers of all blocks that are not zeroes on one of the disks, in order.
func numbers(disks ...*disk) []int64 {
	all := map[int64][]byte{}
	for _, d := range disks {
		maps.Copy(all, d.blocks)
	}
	return slices.Sorted(maps.Keys(all))
}
