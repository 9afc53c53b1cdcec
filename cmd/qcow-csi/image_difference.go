package main

import (
	"bytes"
	"fmt"

	"github.com/qcow-csi/qcow-csi/qcow"
)

// difference is an image as the target of a copy: it takes only the clusters that differ from what it reads as already, because its
// backing file has them.
type difference struct {
	img      *qcow.Image
	unit     int // bytes of a cluster
	compress bool
}

var _ qcow.Target = (*difference)(nil)

// Size implements qcow.Target.
func (d *difference) Size() int64 { return d.img.Size() }

// Flush implements qcow.Target.
func (d *difference) Flush() error { return d.img.Flush() }

// WriteAt implements qcow.Target. The bytes begin where a cluster does, and end so or where the disk ends.
func (d *difference) WriteAt(p []byte, off int64) (int, error) {
	old := make([]byte, len(p))
	if _, err := d.img.ReadAt(old, off); err != nil {
		return 0, fmt.Errorf("read %d bytes at %d: %w", len(p), off, err)
	}
	for done := 0; done < len(p); {
		n, change := d.alike(p[done:], old[done:])
		if err := d.apply(change, p[done:done+n], off+int64(done)); err != nil {
			return done, err
		}
		done += n
	}
	return len(p), nil
}

// change is what a copy means for a cluster.
type change uint8

const (
	changeNothing change = iota
	changeToZeroes
	changeToData
)

// alike returns how many bytes at the start of p and old, in whole clusters, mean the same change.
func (d *difference) alike(p, old []byte) (n int, c change) {
	for n < len(p) {
		end := min(n+d.unit, len(p))
		next := changeToData
		if bytes.Equal(p[n:end], old[n:end]) {
			next = changeNothing
		} else if len(bytes.TrimLeft(p[n:end], "\x00")) == 0 {
			next = changeToZeroes
		}
		if n > 0 && next != c {
			break
		}
		n, c = end, next
	}
	return n, c
}

// apply makes a change of whole clusters to the content p.
func (d *difference) apply(c change, p []byte, off int64) error {
	switch {
	case c == changeNothing:
		return nil
	case c == changeToZeroes:
		return d.img.WriteZeroes(off, int64(len(p)), true)
	case d.compress:
		return d.img.WriteCompressed(p, off)
	}
	_, err := d.img.WriteAt(p, off)
	return err
}

// WriteZeroes implements qcow.Target. Where the disk reads as zeroes anyway nothing is written.
func (d *difference) WriteZeroes(off, n int64, mayUnmap bool) error {
	for e, err := range d.img.Extents(off, n) {
		if err != nil {
			return err
		}
		if e.Kind != qcow.ExtentData && e.Kind != qcow.ExtentCompressed {
			continue
		}
		if err := d.img.WriteZeroes(e.Offset, e.Length, mayUnmap); err != nil {
			return err
		}
	}
	return nil
}
