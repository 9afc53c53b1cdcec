package qcow_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"

	"github.com/qcow-csi/qcow-csi/qcow"
)

// place makes a range of the disk of two numbers, at any alignment.
func (m *model) place(a, b uint64) (off, n int64) {
	size := int64(len(m.want))
	if size == 0 {
		return 0, 0
	}
	n = int64(a%uint64(min(6*m.cluster, max(size/3, 1)))) + 1
	if b%10 == 0 {
		return size - n, n
	}
	return int64(b % uint64(size-n+1)), n
}

// placeToWrite makes a range that can be written, seldom one that can't: of an encrypted image these are whole sectors.
func (m *model) placeToWrite(a, b uint64) (off, n int64, class error) {
	off, n = m.place(a, b)
	if !m.kind.luks {
		return off, n, nil
	}
	if a>>48%16 != 0 {
		end := (off + n + sector - 1) / sector * sector
		off = off / sector * sector
		n = end - off
	}
	if (off|n)%sector != 0 {
		class = qcow.ErrInvalid
	}
	return off, n, class
}

// put notes that p is to be read at off, which a request wrote whose error must be of the class.
func (m *model) put(p []byte, off int64, err, class error) error {
	m.requested(off, int64(len(p)))
	if class == nil {
		m.changed(off, int64(len(p)))
		copy(m.want[off:], p)
	}
	return refused(err, class)
}

func (m *model) write(a, b uint64) error {
	off, n, class := m.placeToWrite(a, b)
	p := make([]byte, n)
	scramble(p, b)
	_, err := m.img.WriteAt(p, off)
	return m.put(p, off, err, class)
}

func (m *model) writeSync(a, b uint64) error {
	off, n, class := m.placeToWrite(a, b)
	p := make([]byte, n)
	scramble(p, b)
	_, err := m.img.WriteSync(p, off)
	return m.put(p, off, err, class)
}

// writeZeroData writes data that is nothing but zeroes, or has some, which the image may be told to detect.
func (m *model) writeZeroData(a, b uint64) error {
	off, n, class := m.placeToWrite(a, b)
	p := make([]byte, n)
	if a>>40%3 == 0 {
		scramble(p[n/3:n/2], b)
	}
	var err error
	if a>>42%3 == 0 {
		_, err = m.img.WriteSync(p, off)
	} else {
		_, err = m.img.WriteAt(p, off)
	}
	return m.put(p, off, err, class)
}

func (m *model) zero(a, b uint64) error {
	off, n, class := m.placeToWrite(a, b)
	return m.put(make([]byte, n), off, m.img.WriteZeroes(off, n, a&(1<<40) != 0), class)
}

// discard takes any range. In an image of version 2 with a backing file it does nothing.
func (m *model) discard(a, b uint64) error {
	off, n := m.place(a, b)
	first, end := (off+m.cluster-1)/m.cluster*m.cluster, (off+n)/m.cluster*m.cluster
	if off+n == int64(len(m.want)) {
		end = off + n
	}
	m.requested(off, n)
	if first < end && (m.version > 2 || len(m.chain) == 0) {
		m.changed(first, end-first)
		clear(m.want[first:end])
	}
	return m.img.Discard(off, n)
}

// writeCompressed writes the whole clusters of a range, with what can be compressed, or is zeroes, or can't.
func (m *model) writeCompressed(a, b uint64) error {
	off, n := m.place(a, b)
	off = off / m.cluster * m.cluster
	n = min((n+m.cluster-1)/m.cluster*m.cluster, int64(len(m.want))-off)
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(b >> (i / 100 % 64))
	}
	switch start := n / 3 / m.cluster * m.cluster; a >> 48 % 4 {
	case 0:
		clear(p[start:])
	case 1:
		scramble(p[start:], a)
	}
	err := m.img.WriteCompressed(p, off)
	if m.kind.luks || m.kind.external {
		return refused(err, qcow.ErrUnsupported)
	}
	return m.put(p, off, err, nil)
}

func (m *model) read(a, b uint64) error {
	off, n := m.place(a, b)
	got := make([]byte, n)
	if _, err := m.img.ReadAt(got, off); err != nil {
		return err
	}
	if i := firstDifference(got, m.want[off:][:n]); i >= 0 {
		return fmt.Errorf("byte %d is %#x instead of %#x", off+int64(i), got[i], m.want[off+int64(i)])
	}
	return nil
}

// reachOutside expects that requests which reach past the end of the disk are refused, and reads end there.
func (m *model) reachOutside(a, b uint64) error {
	off, n := m.place(a, b)
	size := int64(len(m.want))
	n = size - off + 1 + n
	p := make([]byte, n)
	if got, err := m.img.ReadAt(p, off); !errors.Is(err, io.EOF) || int64(got) != size-off || !bytes.Equal(p[:got], m.want[off:]) {
		return fmt.Errorf("a read of %d bytes at %d, of a disk of %d: %d, %w", n, off, size, got, errorOrNone(err))
	}
	_, writeErr := m.img.WriteAt(p, off)
	_, syncErr := m.img.WriteSync(p, off)
	for _, err := range []error{writeErr, syncErr, m.img.WriteZeroes(off, n, a%2 == 0), m.img.Discard(off, n), m.img.WriteZeroes(-1, 1, true)} {
		if err := refused(err, qcow.ErrInvalid); err != nil {
			return err
		}
	}
	return nil
}

// size makes a size of the disk a little smaller or larger than now, seldom much smaller.
func (m *model) size(a, b uint64) int64 {
	size := int64(len(m.want))
	most := min(8*m.cluster, 512<<10)
	if b%8 == 0 {
		most = size
	}
	change := int64(a%uint64(most+1)) / sector * sector
	if b%2 == 0 {
		return max(size-change, 0)
	}
	return min(size+change, max(m.kind.o.Size+1<<20, size))
}

func (m *model) resize(a, b uint64) error {
	size := m.size(a, b)
	class := m.mayResize(size)
	if b>>32%32 == 0 {
		size, class = size+1, qcow.ErrInvalid
	}
	return m.resized(size, m.img.Resize(m.ctx, size), class)
}

func (m *model) resizePreallocated(a, b uint64) error {
	size := m.size(a, b|1)
	o := qcow.ResizeOptions{Preallocation: qcow.Preallocation(b >> 32 % 4)}
	class := m.mayResize(size)
	if b>>40%16 == 0 && size > sector {
		size -= sector
	}
	if size < int64(len(m.want)) && o.Preallocation != qcow.PreallocationOff {
		class = qcow.ErrInvalid
	}
	return m.resized(size, m.img.ResizeWith(m.ctx, size, o), class)
}

// resized notes that the disk has another size.
func (m *model) resized(size int64, err, class error) error {
	if class == nil {
		old := int64(len(m.want))
		m.want = append(m.want[:min(size, old)], make([]byte, max(size-old, 0))...)
		m.resizeBitmaps(old, size)
	}
	return refused(err, class)
}

// compact moves what is at the end of the file, which does not become longer.
func (m *model) compact(_, _ uint64) error {
	sum, err := m.img.Compact(m.ctx, nil)
	if err == nil && (sum.After > sum.Before || sum.Moved < 0) {
		err = fmt.Errorf("compacted: %+v", sum)
	}
	return err
}

// scramble fills p with bytes that depend on seed.
func scramble(p []byte, seed uint64) {
	pcg := rand.NewPCG(seed, 0)
	for i := 0; i < len(p); i += 8 {
		v := pcg.Uint64()
		for k := i; k < min(i+8, len(p)); k++ {
			p[k] = byte(v)
			v >>= 8
		}
	}
}
