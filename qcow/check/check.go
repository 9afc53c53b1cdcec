package check

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// Reader is what Check needs of a file. The file must not change while it is checked.
type Reader interface {
	io.ReaderAt
	Size() (int64, error)
}

// Options tune a check. The zero value of each field asks for the default.
type Options struct {
	MaxFindings int   // how many findings to keep; default 1000
	MaxMemory   int64 // bytes to spend on what is known of clusters; default 1 GiB
}

const (
	defaultMaxFindings = 1000
	defaultMaxMemory   = 1 << 30

	chunkSize       = 64 << 10 // bytes that tables are read in
	contextInterval = 4096     // clusters between two looks at the context
	pooledMemory    = 1 << 20  // a checker that has grown larger is not kept for the next check

	clusterBitsAt = 20 // offset in the header
)

// Check checks the image in r. It fails only when the image cannot be checked: reading failed, ctx is done,
// Options.MaxMemory does not suffice, or the header is unusable (format.ErrCorrupt) or asks for a feature that is not
// known here (format.ErrUnsupported). Everything else that is wrong with the image is in the report.
func Check(ctx context.Context, r Reader, o Options) (*Report, error) {
	if o.MaxFindings <= 0 {
		o.MaxFindings = defaultMaxFindings
	}
	if o.MaxMemory <= 0 {
		o.MaxMemory = defaultMaxMemory
	}
	size, err := r.Size()
	if err != nil {
		return nil, fmt.Errorf("check: length of the file: %w", err)
	}
	c := checkers.Get().(*checker) //nolint:forcetypeassert // the pool holds nothing else
	c.r, c.size, c.opts, c.report = r, uint64(size), o, &Report{}
	if err := c.run(ctx); err != nil {
		return nil, fmt.Errorf("check: %w", err)
	}
	report := c.report
	c.r, c.report, c.h = nil, nil, nil
	if c.refs.memory+c.tableMemory() <= pooledMemory {
		checkers.Put(c)
	}
	return report, nil
}

// checkers keeps the memory of finished checks, so that checking thousands of small images allocates little.
var checkers = sync.Pool{New: func() any { return new(checker) }}

// checker is the state of one check.
type checker struct {
	r      Reader
	opts   Options
	report *Report

	size     uint64 // length of the file in bytes
	clusters uint64 // of the file, the last one perhaps in part
	highest  uint64 // last cluster of the file with a refcount or a reference
	h        *format.Header

	blocks    []format.HostOffset // refcount blocks by index in the refcount table; 0: none, or an unusable pointer
	l2Tables  []l2Table           // each once: first those that the active L1 table refers to, then the others
	activeL2s int                 // how many the active L1 table refers to
	refs      references

	chunk []byte // for stream
	table []byte // for readTable
}

func (c *checker) run(ctx context.Context) error {
	if err := c.readHeader(); err != nil {
		return err
	}
	c.clusters = c.h.ClustersFor(c.size)
	c.highest = 0
	c.blocks, c.l2Tables, c.activeL2s = c.blocks[:0], c.l2Tables[:0], 0
	c.refs.reset(c.h.Geometry)
	c.report.TotalClusters = int64(c.h.ClustersFor(c.h.Size &^ (format.SectorSize - 1)))
	c.report.Dirty = c.h.Incompatible&format.IncompatDirty != 0
	c.report.MarkedCorrupt = c.h.Incompatible&format.IncompatCorrupt != 0

	// The stored refcounts come first, since COPIED is judged by them, and metadata comes before guest data, so that an
	// overlap is blamed on the data.
	for _, step := range []func(context.Context) error{
		c.readRefcountTable,
		c.referHeader,
		c.referRefcounts,
		c.walkActiveL1,
		c.walkSnapshots,
		c.walkBitmaps,
		c.walkL2Tables,
		c.compare,
	} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	c.report.ImageEnd = int64(c.h.OffsetOf(format.Cluster(c.highest + 1)))
	return nil
}

// knownIncompatible are the incompatible features of the images that can be checked.
const knownIncompatible = format.IncompatDirty | format.IncompatCorrupt | format.IncompatDataFile | format.IncompatCompression | format.IncompatExtendedL2

func (c *checker) readHeader() error {
	if err := c.readTable(HeaderCluster, 0, min(c.size, 1<<format.DefaultClusterBits)); err != nil {
		return err
	}
	if len(c.table) > clusterBitsAt+4 { // extensions may fill a cluster that is larger than what has been read
		bits := binary.BigEndian.Uint32(c.table[clusterBitsAt:])
		if bits > format.DefaultClusterBits && bits <= format.MaxClusterBits {
			if err := c.readTable(HeaderCluster, 0, min(c.size, 1<<bits)); err != nil {
				return err
			}
		}
	}
	h, err := format.DecodeHeader(c.table)
	if err != nil {
		return err
	}
	if unknown := h.Incompatible &^ knownIncompatible; unknown != 0 {
		return format.Unsupportedf("header", format.IncompatibleOffset, "%s", h.IncompatibleNames(unknown))
	}
	c.h = h
	return nil
}

// found adds a finding; see Finding for what t and off mean.
func (c *checker) found(k Kind, t Table, off format.HostOffset, detail string, args ...any) {
	if k.Severity() == Leak {
		c.report.Leaks++
	} else {
		c.report.Corruptions++
	}
	if len(c.report.Findings) < c.opts.MaxFindings {
		c.report.Findings = append(c.report.Findings, Finding{
			Kind: k, Severity: k.Severity(), Table: t, Offset: off, Detail: fmt.Sprintf(detail, args...),
		})
	}
}

// readTable reads n bytes at off into c.table.
func (c *checker) readTable(t Table, off format.HostOffset, n uint64) error {
	c.table = slices.Grow(c.table[:0], int(n))[:n]
	return c.read(t, c.table, off)
}

// read fills p with the bytes of the file at off, and with zeroes past its end.
func (c *checker) read(t Table, p []byte, off format.HostOffset) error {
	if uint64(off) >= c.size {
		clear(p)
		return nil
	}
	want := min(uint64(len(p)), c.size-uint64(off))
	n, err := c.r.ReadAt(p[:want], int64(off))
	if uint64(n) == want {
		clear(p[want:])
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF // the file has become shorter
	}
	return fmt.Errorf("read %v at %#x: %w", t, uint64(off), err)
}

// load returns the n bytes of the file at off, zeroes past its end.
func (c *checker) load(t Table, off format.HostOffset, n uint64) ([]byte, error) {
	b := make([]byte, n)
	return b, c.read(t, b, off)
}

// undecodable adds a finding for the structure t at start, whose decoder failed with err.
func (c *checker) undecodable(t Table, start format.HostOffset, err error) {
	if e := (*format.Error)(nil); errors.As(err, &e) {
		c.found(BadTable, t, start+e.Offset, "%s", e.Reason)
		return
	}
	c.found(BadTable, t, start, "%v", err)
}

// stream calls f with the n bytes of the file at off, in pieces of chunkSize bytes but for the last one.
func (c *checker) stream(ctx context.Context, t Table, off format.HostOffset, n uint64, f func(at format.HostOffset, b []byte) error) error {
	if c.chunk == nil {
		c.chunk = make([]byte, chunkSize)
	}
	for end := off + format.HostOffset(n); off < end; {
		if err := ctx.Err(); err != nil {
			return err
		}
		b := c.chunk[:min(chunkSize, uint64(end-off))]
		if err := c.read(t, b, off); err != nil {
			return err
		}
		if err := f(off, b); err != nil {
			return err
		}
		off += format.HostOffset(len(b))
	}
	return nil
}
