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
	OpMark      // nothing: a note of the test between operations
	OpWriteSync // Data at Offset, durable at once
	OpAllocate  // Length bytes at Offset
)

// Op is one recorded operation.
type Op struct {
	Kind   OpKind
	File   int // of the file's place in its RecorderGroup; 0 without one
	Offset int64
	Length int64
	Data   []byte // of a write
	Mark   any    // of a mark
}

// String describes the operation. That of a file which is not the first of its group begins with the number of the file.
func (o Op) String() string {
	if o.File != 0 {
		return fmt.Sprintf("file %d: %s", o.File, o.describe())
	}
	return o.describe()
}

func (o Op) describe() string {
	switch o.Kind {
	case OpWrite:
		return fmt.Sprintf("write %#x+%#x", o.Offset, len(o.Data))
	case OpWriteSync:
		return fmt.Sprintf("write-sync %#x+%#x", o.Offset, len(o.Data))
	case OpPunch:
		return fmt.Sprintf("punch %#x+%#x", o.Offset, o.Length)
	case OpAllocate:
		return fmt.Sprintf("allocate %#x+%#x", o.Offset, o.Length)
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

// opLog is a log that recorders share.
type opLog struct {
	mu  sync.Mutex // held across the operation, so that the log has the order in which the files changed
	ops []Op
}

func (l *opLog) mark(v any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ops = append(l.ops, Op{Kind: OpMark, Mark: v})
}

func (l *opLog) clone() []Op {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.ops)
}

// Recorder is a [File] that hands every operation on and logs the ones that change the file, in the order in which
// they reached it. Failed operations are not logged, except for what a failed write has written.
type Recorder struct {
	File

	log   *opLog
	index int // the Op.File of what it logs
}

// NewRecorder records what happens to f.
func NewRecorder(f File) *Recorder { return &Recorder{File: f, log: &opLog{}} }

// RecorderGroup records what happens to several files in one log, so that a crash in the middle of what concerns all of
// them can be enumerated by [GroupCrashStates].
type RecorderGroup struct {
	log   opLog
	files int
}

// Record adds f to the group and returns its recorder. The first file added is number 0 in the log, and so on. Marks and Ops of
// the recorder are those of the group.
func (g *RecorderGroup) Record(f File) *Recorder {
	g.log.mu.Lock()
	defer g.log.mu.Unlock()
	g.files++
	return &Recorder{File: f, log: &g.log, index: g.files - 1}
}

// Mark adds a note to the log.
func (g *RecorderGroup) Mark(v any) { g.log.mark(v) }

// Ops returns the log so far.
func (g *RecorderGroup) Ops() []Op { return g.log.clone() }

// Mark adds a note to the log.
func (r *Recorder) Mark(v any) { r.log.mark(v) }

// Ops returns the log so far.
func (r *Recorder) Ops() []Op { return r.log.clone() }

// WriteAt implements [File].
func (r *Recorder) WriteAt(p []byte, off int64) (int, error) {
	return r.write(OpWrite, p, off, r.File.WriteAt)
}

// WriteSync implements [File]. What a failed one has written counts as an ordinary write.
func (r *Recorder) WriteSync(p []byte, off int64) (int, error) {
	return r.write(OpWriteSync, p, off, r.File.WriteSync)
}

func (r *Recorder) write(kind OpKind, p []byte, off int64, do func([]byte, int64) (int, error)) (int, error) {
	r.log.mu.Lock()
	defer r.log.mu.Unlock()
	n, err := do(p, off)
	if err != nil {
		kind = OpWrite
	}
	if n > 0 {
		r.log.ops = append(r.log.ops, Op{Kind: kind, File: r.index, Offset: off, Data: slices.Clone(p[:n])})
	}
	return n, err
}

// PunchHole implements [File].
func (r *Recorder) PunchHole(off, n int64) error {
	return r.change(Op{Kind: OpPunch, Offset: off, Length: n}, func() error { return r.File.PunchHole(off, n) })
}

// Truncate implements [File].
func (r *Recorder) Truncate(size int64) error {
	return r.change(Op{Kind: OpTruncate, Length: size}, func() error { return r.File.Truncate(size) })
}

// Allocate implements [File].
func (r *Recorder) Allocate(off, n int64) error {
	return r.change(Op{Kind: OpAllocate, Offset: off, Length: n}, func() error { return r.File.Allocate(off, n) })
}

// Sync implements [File].
func (r *Recorder) Sync() error {
	return r.change(Op{Kind: OpSync}, r.File.Sync)
}

func (r *Recorder) change(op Op, do func() error) error {
	r.log.mu.Lock()
	defer r.log.mu.Unlock()
	if err := do(); err != nil {
		return err
	}
	op.File = r.index
	r.log.ops = append(r.log.ops, op)
	return nil
}
