package dehydrate

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// Options say what is in a dump.
type Options struct {
	KeyMaterial bool // keep the key material of the encryption header: whoever has it and a passphrase can read the image
	RedactNames bool // replace the names of the backing file and the data file
	Ambiguous   bool // keep tables that are guest data too, by what another table says
	MaxLeftOut  int  // how many Omissions to list; default 1000
}

const defaultMaxLeftOut = 1000

// Result says what is in a dump.
type Result struct {
	Length   int64 // of the image in bytes
	Metadata int64 // bytes of it that are in the dump

	KeysZeroed    bool // there was key material, and it is not in the dump
	NamesRedacted bool // likewise names
	Incomplete    bool // something that could be metadata is not in the dump

	LeftOut   int        // such things; Dehydrate only
	Omissions []Omission // the first of them
}

// Omission is something that is not in a dump.
type Omission struct {
	Table  string            // what it is
	Offset format.HostOffset // where it is, or was said to be
	Reason string
}

func (o Omission) String() string {
	return fmt.Sprintf("%s at %#x: %s", o.Table, uint64(o.Offset), o.Reason)
}

// Dehydrate writes a dump of the image in f to w. The file must not change meanwhile.
//
// It fails with ErrCorrupt when f does not begin like a qcow2 image, with ErrUnsupported when its version is not known.
// Whatever else is wrong with the image, what can be reached is dumped.
func Dehydrate(ctx context.Context, f storage.File, w io.Writer, o Options) (*Result, error) {
	if o.MaxLeftOut <= 0 {
		o.MaxLeftOut = defaultMaxLeftOut
	}
	size, err := f.Size()
	if err != nil {
		return nil, fmt.Errorf("dehydrate: length of the file: %w", err)
	}
	d := &dehydrator{f: f, o: o, size: uint64(size), result: &Result{Length: size}}
	if err := d.run(ctx, w); err != nil {
		return nil, fmt.Errorf("dehydrate: %w", err)
	}
	return d.result, nil
}

// dehydrator is the state of a dump.
type dehydrator struct {
	f      storage.File
	o      Options
	size   uint64 // length of the file in bytes
	result *Result

	format.Geometry
	header     header
	ranges     ranges   // what is in the dump
	tables     ranges   // what may be in it: tables that other tables name
	l2Tables   []uint64 // offsets
	distinctL2 int      // how many different ones there were when they were last counted
	walked     uint64   // bytes of L1 and bitmap tables
	hidden     ranges   // what is zeroed
	names      ranges   // names to replace
	buf        []byte   // for entries
}

func (d *dehydrator) run(ctx context.Context, w io.Writer) error {
	for _, step := range []func(context.Context) error{
		d.readHeader, d.walkRefcounts, d.walkL1Tables, d.walkBitmaps, d.walkEncryption, d.leaveOutGuestData,
	} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	d.result.Incomplete = d.result.LeftOut > 0
	d.result.KeysZeroed = len(d.hidden) > 0
	d.result.NamesRedacted = len(d.names) > 0
	return d.dump(ctx, w)
}

// dump writes the ranges.
func (d *dehydrator) dump(ctx context.Context, w io.Writer) error {
	buffered := bufio.NewWriterSize(w, 64<<10)
	out, err := newWriter(buffered, d.size, d.flags())
	if err != nil {
		return err
	}
	b := make([]byte, maxContent)
	for _, x := range d.ranges.merged() {
		for x.n > 0 {
			if err := ctx.Err(); err != nil {
				return err
			}
			b := b[:min(x.n, maxContent)]
			if err := d.read("metadata", b, x.off); err != nil {
				return err
			}
			d.redact(b, x.off)
			if err := out.add(x.off, b); err != nil {
				return err
			}
			d.result.Metadata += int64(len(b))
			x.off, x.n = x.off+uint64(len(b)), x.n-uint64(len(b))
		}
	}
	if err := out.close(); err != nil {
		return err
	}
	return buffered.Flush()
}

func (d *dehydrator) flags() (flags uint32) {
	if d.result.KeysZeroed {
		flags |= flagKeysZeroed
	}
	if d.result.NamesRedacted {
		flags |= flagNamesRedacted
	}
	if d.result.Incomplete {
		flags |= flagIncomplete
	}
	return flags
}

// leftOut notes that something is not in the dump.
func (d *dehydrator) leftOut(table string, off uint64, reason string, args ...any) {
	d.result.LeftOut++
	if len(d.result.Omissions) < d.o.MaxLeftOut {
		d.result.Omissions = append(d.result.Omissions, Omission{table, format.HostOffset(off), fmt.Sprintf(reason, args...)})
	}
}

// read fills p with the bytes of the file at off, and with zeroes past its end.
func (d *dehydrator) read(table string, p []byte, off uint64) error {
	if off >= d.size {
		clear(p)
		return nil
	}
	want := min(uint64(len(p)), d.size-off)
	n, err := d.f.ReadAt(p[:want], int64(off))
	if uint64(n) == want {
		clear(p[want:])
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF // the file has become shorter
	}
	return fmt.Errorf("read %s at %#x: %w", table, off, err)
}

// entries calls f with each entry that is not 0 of the n bytes of a table at off.
func (d *dehydrator) entries(ctx context.Context, table string, off, n uint64, f func(e uint64)) error {
	const chunk = 64 << 10
	if d.buf == nil {
		d.buf = make([]byte, chunk)
	}
	for n >= format.EntrySize {
		if err := ctx.Err(); err != nil {
			return err
		}
		b := d.buf[:min(n, chunk)&^(format.EntrySize-1)]
		if err := d.read(table, b, off); err != nil {
			return err
		}
		for i := range uint64(len(b)) / format.EntrySize {
			if e := format.Entry(b, i); e != 0 {
				f(e)
			}
		}
		off, n = off+uint64(len(b)), n-uint64(len(b))
	}
	return nil
}
