package storage

import (
	"fmt"
	"slices"
	"strings"
	"sync"
)

// OpKind names what an [Op] did.
type OpKind uint8

const (
	OpWrite    OpKind = iota // Data at Offset
	OpPunch                  // Length bytes at Offset
	OpTruncate               // to Length bytes
	OpSync
	OpMark // nothing: a note of the test between operations
)

// Op is one recorded operation.
type Op struct {
	Kind   OpKind
	Offset int64
	Length int64
	Data   []byte // of a write
	Mark   any    // of a mark
}

func (o Op) String() string {
	switch o.Kind {
	case OpWrite:
		return fmt.Sprintf("write %#x+%#x", o.Offset, len(o.Data))
	case OpPunch:
		return fmt.Sprintf("punch %#x+%#x", o.Offset, o.Length)
	case OpTruncate:
		return fmt.Sprintf("truncate %#x", o.Length)
	case OpSync:
		return "sync"
	case OpMark:
		return fmt.Sprintf("# %v", o.Mark)
	}
	return "unknown"
}

// Trace formats operations, one a line.
func Trace(ops []Op) string {
	var b strings.Builder
	for _, o := range ops {
		fmt.Fprintln(&b, o)
	}
	return b.String()
}

// Recorder is a [File] that hands every operation on and logs the ones that change the file, in the order in which
// they reached it. Failed operations are not logged.
type Recorder struct {
	File

	mu  sync.Mutex // held across the operation, so that the log has the file's order
	ops []Op
}

// NewRecorder records what happens to f.
func NewRecorder(f File) *Recorder { return &Recorder{File: f} }

// Mark adds a note to the log.
func (r *Recorder) Mark(v any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ops = append(r.ops, Op{Kind: OpMark, Mark: v})
}

// Ops returns the log so far.
func (r *Recorder) Ops() []Op {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.ops)
}

// WriteAt implements [File].
func (r *Recorder) WriteAt(p []byte, off int64) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	n, err := r.File.WriteAt(p, off)
	if n > 0 {
		r.ops = append(r.ops, Op{Kind: OpWrite, Offset: off, Data: slices.Clone(p[:n])})
	}
	return n, err
}

// PunchHole implements [File].
func (r *Recorder) PunchHole(off, n int64) error {
	return r.log(Op{Kind: OpPunch, Offset: off, Length: n}, func() error { return r.File.PunchHole(off, n) })
}

// Truncate implements [File].
func (r *Recorder) Truncate(size int64) error {
	return r.log(Op{Kind: OpTruncate, Length: size}, func() error { return r.File.Truncate(size) })
}

// Sync implements [File].
func (r *Recorder) Sync() error {
	return r.log(Op{Kind: OpSync}, r.File.Sync)
}

func (r *Recorder) log(op Op, do func() error) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := do(); err != nil {
		return err
	}
	r.ops = append(r.ops, op)
	return nil
}
