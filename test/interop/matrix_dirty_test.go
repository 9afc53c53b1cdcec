package interop_test

import (
	"bytes"
	"fmt"
)

// dirty says what a bitmap must say to be changed, and what it may: operations on the whole image may touch more than they change.
type dirty struct {
	name        string
	granularity int64
	disabled    bool
	must, may   []bool // one for each bit
}

// resize cuts off or adds bits, which are not set.
func (d *dirty) resize(size int64) {
	n := int((size + d.granularity - 1) / d.granularity)
	for _, bits := range []*[]bool{&d.must, &d.may} {
		*bits = append(*bits, make([]bool, max(n-len(*bits), 0))...)[:n]
	}
}

// note says that a range was changed.
func (d *dirty) note(off, n int64) {
	d.set(d.must, off, n)
	d.mayBe(off, n)
}

// mayBe says that a range may have been changed.
func (d *dirty) mayBe(off, n int64) { d.set(d.may, off, n) }

func (d *dirty) set(bits []bool, off, n int64) {
	for i := off / d.granularity; n > 0 && !d.disabled && i <= (off+n-1)/d.granularity; i++ {
		bits[i] = true
	}
}

// differ says that the disk has other content: where that differs it was changed, and elsewhere it may have been.
func (d *dirty) differ(was, is disk) {
	d.mayBe(0, int64(len(is)))
	for off := int64(0); off < int64(min(len(was), len(is))); off += d.granularity {
		end := min(off+d.granularity, int64(len(was)), int64(len(is)))
		if !bytes.Equal(was[off:end], is[off:end]) {
			d.note(off, end-off)
		}
	}
}

// holds returns an error unless the bits are as they must be.
func (d *dirty) holds(bits []bool) error {
	if len(bits) != len(d.must) {
		return fmt.Errorf("bitmap %s has %d bits, want %d", d.name, len(bits), len(d.must))
	}
	for i, is := range bits {
		if d.must[i] && !is || is && !d.may[i] {
			return fmt.Errorf("bitmap %s with granularity %d: bit %d of %d is %t", d.name, d.granularity, i, len(bits), is)
		}
	}
	return nil
}
