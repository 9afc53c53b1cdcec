package dehydrate

import (
	"bytes"
	"context"
	"encoding/binary"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// A LUKS header begins with this magic and, in version 1, has so many bytes before the key material.
const (
	luksMagic       = "LUKS\xba\xbe"
	luksDescription = 592
)

// walkEncryption adds the encryption header, and hides its key material.
func (d *dehydrator) walkEncryption(context.Context) error {
	if d.header.decoded == nil {
		return nil
	}
	off, n, err := d.header.decoded.Encryption()
	if err != nil {
		d.leftOut("encryption header", 0, "%v", err)
		return nil
	}
	if n == 0 {
		return nil
	}
	start, n := d.inFile("encryption header", uint64(off), n)
	d.ranges.add(start, n)
	if d.o.KeyMaterial || n == 0 {
		return nil
	}
	shown := min(n, luksDescription)
	b := make([]byte, shown)
	if err := d.read("encryption header", b, start); err != nil {
		return err
	}
	// Version 2 has keys elsewhere; so may what is no LUKS header at all.
	if !bytes.HasPrefix(b, []byte(luksMagic)) || len(b) < 8 || binary.BigEndian.Uint16(b[6:]) != 1 {
		shown = 0
	}
	d.hidden.add(start+shown, n-shown)
	return nil
}

// redactNames hides the names of the backing file and the data file, which are in the first cluster, b.
func (d *dehydrator) redactNames(b []byte, h *format.Header) {
	if !d.o.RedactNames {
		return
	}
	if h.BackingFile != "" {
		d.hideName(b, binary.BigEndian.Uint64(b[backingNameAt:]), uint64(len(h.BackingFile)))
	}
	pos := uint64(h.HeaderLength)
	for _, e := range h.Extensions {
		pos += 8 // type and length
		if e.Type == format.ExtDataFile {
			d.hideName(b, pos, uint64(len(e.Data)))
		}
		pos += (uint64(len(e.Data)) + 7) &^ 7
	}
}

// redactRaw hides all that may be a name in a header that cannot be decoded: everything behind the fixed fields.
func (d *dehydrator) redactRaw(b []byte) {
	if !d.o.RedactNames {
		return
	}
	const fixed = 112
	if len(b) > fixed {
		d.hideName(b, fixed, uint64(len(b)-fixed))
	}
}

// hideName notes n bytes of the first cluster, b, as a name.
func (d *dehydrator) hideName(b []byte, off, n uint64) {
	if off < uint64(len(b)) && n > 0 {
		d.names.add(off, min(n, uint64(len(b))-off))
	}
}

// redact hides what must not be in the dump in the bytes b of the file at off.
func (d *dehydrator) redact(b []byte, off uint64) {
	for _, x := range d.hidden {
		clear(overlap(b, off, x))
	}
	for _, x := range d.names {
		name := overlap(b, off, x)
		for i := range name {
			name[i] = 'x'
		}
	}
}

// overlap returns the part of b, the bytes at off, that is in x.
func overlap(b []byte, off uint64, x bytesAt) []byte {
	first, end := max(off, x.off), min(off+uint64(len(b)), x.off+x.n)
	if first >= end {
		return nil
	}
	return b[first-off : end-off]
}
