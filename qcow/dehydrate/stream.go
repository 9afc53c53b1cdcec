package dehydrate

import (
	"bytes"
	"encoding/binary"
	"hash"
	"hash/crc32"
	"io"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

const (
	magic   = "QCSIMETA"
	version = 1

	prologueSize = 32
	runSize      = 16 // before the content
	sumSize      = 4

	kindContent = 1
	kindZeroes  = 2
	kindEnd     = 3

	maxContent = 1 << 20
	maxZeroes  = 1 << 31
	zeroUnit   = 4096 // bytes; less than that is not worth a run
)

// Flags of a dump.
const (
	flagKeysZeroed = 1 << iota
	flagNamesRedacted
	flagIncomplete
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// writer writes a dump.
type writer struct {
	w    io.Writer
	all  hash.Hash32
	runs uint64
	zero struct{ off, n uint64 } // zeroes that are not written yet
}

func newWriter(w io.Writer, length uint64, flags uint32) (*writer, error) {
	d := &writer{w: w, all: crc32.New(castagnoli)}
	b := make([]byte, 0, prologueSize)
	b = append(b, magic...)
	b = binary.BigEndian.AppendUint32(b, version)
	b = binary.BigEndian.AppendUint32(b, flags)
	b = binary.BigEndian.AppendUint64(b, length)
	b = binary.BigEndian.AppendUint32(b, 0)
	b = binary.BigEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
	return d, d.write(b)
}

func (d *writer) write(b []byte) error {
	if _, err := d.w.Write(b); err != nil {
		return err
	}
	d.all.Write(b)
	return nil
}

// add writes the bytes that are at off in the original. Calls come in the order of the offsets.
func (d *writer) add(off uint64, b []byte) error {
	for len(b) > 0 {
		n := extent(off, b)
		if isZero(b[:n]) {
			if d.zero.n > 0 && (d.zero.off+d.zero.n != off || d.zero.n+uint64(n) > maxZeroes) {
				if err := d.flush(); err != nil {
					return err
				}
			}
			if d.zero.n == 0 {
				d.zero.off = off
			}
			d.zero.n += uint64(n)
		} else {
			if err := d.flush(); err != nil {
				return err
			}
			if err := d.run(kindContent, off, uint32(n), b[:n]); err != nil {
				return err
			}
		}
		off, b = off+uint64(n), b[n:]
	}
	return nil
}

// extent returns how many bytes at the start of b make one run: up to where zeroes begin or end.
func extent(off uint64, b []byte) int {
	first := unit(off, b)
	zero := isZero(b[:first])
	n := first
	for n < len(b) && n < maxContent {
		k := unit(off+uint64(n), b[n:])
		if isZero(b[n:n+k]) != zero {
			break
		}
		n += k
	}
	return min(n, maxContent)
}

// unit returns how many bytes at the start of b are judged together.
func unit(off uint64, b []byte) int { return min(len(b), int(zeroUnit-off%zeroUnit)) }

func isZero(b []byte) bool { return len(bytes.TrimLeft(b, "\x00")) == 0 }

// flush writes the zeroes that are not written yet.
func (d *writer) flush() error {
	if d.zero.n == 0 {
		return nil
	}
	off, n := d.zero.off, d.zero.n
	d.zero.n = 0
	return d.run(kindZeroes, off, uint32(n), nil)
}

func (d *writer) run(kind uint32, off uint64, n uint32, content []byte) error {
	d.runs++
	b := make([]byte, 0, runSize+len(content)+sumSize)
	b = binary.BigEndian.AppendUint32(b, kind)
	b = binary.BigEndian.AppendUint32(b, n)
	b = binary.BigEndian.AppendUint64(b, off)
	b = append(b, content...)
	return d.write(binary.BigEndian.AppendUint32(b, crc32.Checksum(b, castagnoli)))
}

// close ends the dump.
func (d *writer) close() error {
	if err := d.flush(); err != nil {
		return err
	}
	b := binary.BigEndian.AppendUint32(make([]byte, 0, runSize+sumSize), kindEnd)
	b = binary.BigEndian.AppendUint32(b, 0)
	b = binary.BigEndian.AppendUint64(b, d.runs)
	if err := d.write(b); err != nil {
		return err
	}
	return d.write(binary.BigEndian.AppendUint32(nil, d.all.Sum32()))
}

// reader reads a dump.
type reader struct {
	r      io.Reader
	all    hash.Hash32
	at     uint64 // bytes of the dump that were read
	length uint64
	flags  uint32
	next   uint64 // no run may begin before it
	runs   uint64
	buf    []byte
}

func newReader(r io.Reader) (*reader, error) {
	d := &reader{r: r, all: crc32.New(castagnoli)}
	b, err := d.read(nil, prologueSize)
	if err != nil {
		return nil, err
	}
	if string(b[:len(magic)]) != magic {
		return nil, d.corrupt("not a metadata dump: wrong magic")
	}
	if v := binary.BigEndian.Uint32(b[8:]); v != version {
		return nil, format.Unsupportedf("metadata dump", 8, "version %d", v)
	}
	if err := d.verify(b); err != nil {
		return nil, err
	}
	d.flags, d.length = binary.BigEndian.Uint32(b[12:]), binary.BigEndian.Uint64(b[16:])
	if d.length > 1<<63-1 {
		return nil, d.corrupt("length %d", d.length)
	}
	return d, nil
}

func (d *reader) corrupt(msg string, args ...any) error {
	return format.Corruptf("metadata dump", format.HostOffset(d.at), msg, args...)
}

// read appends n bytes of the dump to b.
func (d *reader) read(b []byte, n int) ([]byte, error) {
	start := len(b)
	b = append(b, make([]byte, n)...)
	got, err := io.ReadFull(d.r, b[start:])
	d.at += uint64(got)
	switch {
	case err == io.EOF, err == io.ErrUnexpectedEOF:
		return nil, d.corrupt("it ends here, before its end")
	case err != nil:
		return nil, err
	}
	return b, nil
}

// verify compares the checksum that b ends with.
func (d *reader) verify(b []byte) error {
	sum := len(b) - sumSize
	if want, got := binary.BigEndian.Uint32(b[sum:]), crc32.Checksum(b[:sum], castagnoli); got != want {
		return d.corrupt("checksum %#x, not %#x", got, want)
	}
	d.all.Write(b)
	return nil
}

// run returns the next run; content is nil for zeroes and valid until the next call. The error is io.EOF at the end of the dump.
func (d *reader) run() (off, n uint64, content []byte, err error) {
	b, err := d.read(d.buf[:0], runSize)
	if err != nil {
		return 0, 0, nil, err
	}
	kind, length := binary.BigEndian.Uint32(b), binary.BigEndian.Uint32(b[4:])
	off, n = binary.BigEndian.Uint64(b[8:]), uint64(length)
	if kind == kindEnd {
		return 0, 0, nil, d.end(b, off)
	}
	more := 0
	switch {
	case kind != kindContent && kind != kindZeroes:
		return 0, 0, nil, d.corrupt("a run of kind %d", kind)
	case n == 0 || kind == kindContent && n > maxContent:
		return 0, 0, nil, d.corrupt("a run of %d bytes", n)
	case off < d.next:
		return 0, 0, nil, d.corrupt("a run at %#x behind one that ends at %#x", off, d.next)
	case off > d.length || n > d.length-off:
		return 0, 0, nil, d.corrupt("a run of %d bytes at %#x exceeds the length of %d", n, off, d.length)
	case kind == kindContent:
		more = int(n)
	}
	if b, err = d.read(b, more+sumSize); err != nil {
		return 0, 0, nil, err
	}
	d.buf = b
	if err := d.verify(b); err != nil {
		return 0, 0, nil, err
	}
	d.next = off + n
	d.runs++
	if kind == kindContent {
		content = b[runSize : runSize+more]
	}
	return off, n, content, nil
}

// end verifies the end of the dump, whose first bytes are b.
func (d *reader) end(b []byte, runs uint64) error {
	if runs != d.runs {
		return d.corrupt("%d runs, not %d", d.runs, runs)
	}
	d.all.Write(b)
	sum, err := d.read(nil, sumSize)
	if err != nil {
		return err
	}
	if want, got := binary.BigEndian.Uint32(sum), d.all.Sum32(); got != want {
		return d.corrupt("checksum of the dump %#x, not %#x", got, want)
	}
	return io.EOF
}
