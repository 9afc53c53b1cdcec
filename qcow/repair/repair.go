package repair

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// Mode says how much to repair.
type Mode uint8

const (
	Leaks Mode = iota // only lower refcounts that exceed the references
	All               // everything
)

// Options tune a repair. The zero value of each field but Mode asks for the default.
type Options struct {
	Mode   Mode
	DryRun bool // change nothing, only report what would be changed
	// Lossless refuses an image of which something would have to be given up: a pointer that cannot be followed may be all that is
	// known of data that still is in the file.
	Lossless   bool
	MaxChanges int   // how many changes to keep in the report; default 1000
	MaxMemory  int64 // bytes to spend on what is known of clusters and tables; default 1 GiB

	// Progress, unless nil, is called now and then with the L2 tables that were worked on and how many there are to work
	// on, each counted once for reading it and once for correcting it.
	Progress func(done, total int64)
}

const (
	defaultMaxChanges = 1000
	defaultMaxMemory  = 1 << 30

	chunkSize = 64 << 10 // bytes that tables are read in
)

// Run repairs the image in f, which nobody else may use meanwhile; the package comment says what that means. The report is what
// was changed, empty when nothing had to be.
//
// It fails with ErrCorrupt when there is nothing to repair from: the header is unusable, or the L1 table or the
// encryption header is not in the file; when a refcount would have to be larger than its width allows; and in mode Leaks when
// the refcounts must be rebuilt, which takes mode All; for what Lossless refuses; and where the mark of an external data file seems to be what is
// wrong, since to believe it would be to lose every cluster. It fails with ErrUnsupported when the image has a feature that is not
// known here, and with ErrNoSpace when the file system is full. Whenever it fails without a report the image is what it was.
// An error beside a report says that the image is repaired, but not all free clusters were given back.
func Run(ctx context.Context, f storage.File, o Options) (*Report, error) {
	if o.MaxChanges <= 0 {
		o.MaxChanges = defaultMaxChanges
	}
	if o.MaxMemory <= 0 {
		o.MaxMemory = defaultMaxMemory
	}
	size, err := f.Size()
	if err != nil {
		return nil, fmt.Errorf("repair: length of the file: %w", err)
	}
	r := &repairer{f: f, o: o, size: uint64(size), report: &Report{}, budget: budget{left: o.MaxMemory, total: o.MaxMemory}}
	if err := r.run(ctx); err != nil {
		return nil, fmt.Errorf("repair: %w", err)
	}
	if err := r.release(ctx); err != nil {
		return r.report, fmt.Errorf("the image is repaired, but not all free clusters were given back: %w", err)
	}
	return r.report, nil
}

// repairer is the state of one repair.
type repairer struct {
	f      storage.File
	o      Options
	size   uint64 // length of the file in bytes, as it was
	report *Report
	budget budget

	// As it was.
	h               *format.Header // with usable fields in place of those that are not
	sector          []byte         // the fixed header, as far as it can change
	end             uint64         // clusters of the file, the last one perhaps in part
	encrypted       region
	blocks          []format.HostOffset // refcount blocks by index in the refcount table; 0: none, or an unusable pointer
	active          region              // the active L1 table
	snapshots       []snapshot
	snapTable       region
	snapshotChanges []Change // noted before it is clear that they are made

	// What is wrong.
	badRefcounts string // why the refcounts must be rebuilt; empty when they need not
	faults       int    // what is wrong besides, refcounts that do not match aside
	lost         int    // things among them that cannot be followed
	misplaced    int    // entries that lead to another place of the data file than that of their guest cluster
	dropBitmaps  string // why; empty when they stay
	badSnapshots bool   // the snapshot table must be rewritten
	survey       survey

	// What is made of it.
	clusters clusterMap
	outside  outside
	tables   []l2Table           // by offset
	others   []format.HostOffset // of the L2 tables that further L1 entries need copies of
	foreign  map[format.HostOffset]*l2Table
	next     format.Header // the header to be
	alloc    allocator
	switched bool

	buf    []byte // for stream
	l2buf  []byte // for readL2
	fresh  []byte // for freshL2
	worked int64
}

func (r *repairer) run(ctx context.Context) error {
	for _, step := range []func(context.Context) error{
		r.readHeader, r.readRefcountTable, r.readSnapshots, r.walk, r.judge,
	} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	if r.h.DataFile && (r.h.Snapshots > 0 || r.misplaced > 0 && r.h.DataFileName() == "") {
		return format.Corruptf("header", format.IncompatibleOffset, "the image is marked to have an external data file, but does not look so")
	}
	if r.o.Lossless && r.lost > 0 {
		return format.Corruptf("image", 0, "its tables have %d pointers that cannot be followed, and to repair it would be to give up what they meant", r.lost)
	}
	r.next = *r.h
	r.next.Incompatible &^= format.IncompatDirty | format.IncompatCorrupt
	if !r.wrong() {
		return r.finish()
	}
	if r.keepsTables() {
		r.next.Incompatible = r.h.Incompatible // what is wrong stays, and the marks that say so
	}
	if r.keepsTables() && (r.lost > 0 || r.survey.leaks == 0) {
		return r.noteRefcounts(ctx)
	}
	if err := r.rebuild(ctx); err != nil {
		return errors.Join(err, r.undo())
	}
	return r.finish()
}

// wrong reports whether more than a mark in the header is.
func (r *repairer) wrong() bool {
	return r.badRefcounts != "" || r.faults > 0 || r.survey.leaks > 0 || r.survey.low > 0
}

// rebuild makes new tables beside the old ones. Nothing that the header of before reaches changes.
func (r *repairer) rebuild(ctx context.Context) error {
	if err := r.noteRefcounts(ctx); err != nil {
		return err
	}
	if r.keepsTables() {
		if err := r.keepRefcounts(ctx); err != nil {
			return err
		}
		r.forgetRefcounts()
		return r.makeRefcounts(ctx)
	}
	r.forgetRefcounts()
	for _, step := range []func(context.Context) error{
		r.correctL2Tables, r.correctL1Tables, r.correctSnapshotTable, r.makeRefcounts,
	} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	return nil
}

// keepsTables reports whether only refcounts are to be lowered, because more is wrong than mode Leaks repairs.
func (r *repairer) keepsTables() bool { return r.o.Mode == Leaks && (r.faults > 0 || r.survey.low > 0) }

// undo gives back what a repair that failed has added to the file.
func (r *repairer) undo() error {
	if r.switched || r.o.DryRun {
		return nil
	}
	size, err := r.f.Size()
	if err != nil || uint64(size) <= r.size {
		return err
	}
	if err := r.f.Truncate(int64(r.size)); err != nil {
		return fmt.Errorf("give back the end of the file: %w", err)
	}
	return nil
}

func (r *repairer) changed(c Change) {
	r.report.counts[c.Kind]++
	if len(r.report.Changes) < r.o.MaxChanges {
		r.report.Changes = append(r.report.Changes, c)
	}
}

// progress counts an L2 table.
func (r *repairer) progress(ctx context.Context) error {
	r.worked++
	if r.o.Progress != nil {
		r.o.Progress(min(r.worked, 2*int64(len(r.tables))), 2*int64(len(r.tables)))
	}
	return ctx.Err()
}

// read fills p with the bytes of the file at off, and with zeroes past its end.
func (r *repairer) read(t Table, p []byte, off format.HostOffset) error {
	if uint64(off) >= r.size {
		clear(p)
		return nil
	}
	want := min(uint64(len(p)), r.size-uint64(off))
	n, err := r.f.ReadAt(p[:want], int64(off))
	if uint64(n) == want {
		clear(p[want:])
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF // the file has become shorter
	}
	return fmt.Errorf("read %v at %#x: %w", t, uint64(off), err)
}

// stream calls f with the n bytes of the file at off, in pieces of chunkSize bytes but for the last one.
func (r *repairer) stream(ctx context.Context, t Table, off format.HostOffset, n uint64, f func(at format.HostOffset, b []byte) error) error {
	if r.buf == nil {
		r.buf = make([]byte, chunkSize)
	}
	for end := off + format.HostOffset(n); off < end; {
		if err := ctx.Err(); err != nil {
			return err
		}
		b := r.buf[:min(chunkSize, uint64(end-off))]
		if err := r.read(t, b, off); err != nil {
			return err
		}
		if err := f(off, b); err != nil {
			return err
		}
		off += format.HostOffset(len(b))
	}
	return nil
}

// write writes a new table or copy.
func (r *repairer) write(t Table, p []byte, off format.HostOffset) error {
	if r.o.DryRun {
		return nil
	}
	if _, err := r.f.WriteAt(p, int64(off)); err != nil {
		return fmt.Errorf("write %v at %#x: %w", t, uint64(off), err)
	}
	return nil
}
