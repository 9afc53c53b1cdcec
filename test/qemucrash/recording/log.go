package recording

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// Log is what the library logs, as far as it has been read.
type Log struct {
	Ops []storage.Op // Op.File is the index of the file in those to be watched

	file  *os.File
	files int
	rest  []byte // what has been read of a record that is not whole yet
}

// The kinds of records, as the library numbers them.
const (
	kindWrite = iota
	kindFallocate
	kindTruncate
	kindSync
	kindWriteSync // a write that was durable when it returned
)

const (
	recordSize = 6 * 8
	mostData   = 1 << 31 // bytes in one call, as Linux bounds it
)

// Update reads what has been logged since. When a program that waits for us has answered, all that it did is there.
func (l *Log) Update() error {
	more, err := io.ReadAll(l.file)
	if err != nil {
		return err
	}
	b := slices.Concat(l.rest, more)
	for {
		n, err := l.parse(b)
		if err != nil {
			return err
		}
		if n == 0 {
			l.rest = b
			return nil
		}
		b = b[n:]
	}
}

// Close reads the rest of the log of a program that has ended. It fails if the log ends within a record.
func (l *Log) Close() error {
	err := l.Update()
	if err == nil && len(l.rest) > 0 {
		err = errors.New("recording: the log ends within a record")
	}
	return errors.Join(err, l.file.Close())
}

// parse takes one record off b, and returns how many bytes it has: 0 if b has no whole one.
func (l *Log) parse(b []byte) (int, error) {
	if len(b) < recordSize {
		return 0, nil
	}
	field := func(i int) int64 { return int64(binary.NativeEndian.Uint64(b[8*i:])) }
	kind, file, mode, offset, length, size := field(0), field(1), field(2), field(3), field(4), field(5)
	if file < 0 || file >= int64(l.files) || offset < 0 || length < 0 || size < 0 {
		return 0, errors.New("recording: damaged record")
	}
	op := storage.Op{File: int(file), Offset: offset}
	switch kind {
	case kindWrite, kindWriteSync:
		if length > mostData {
			return 0, errors.New("recording: damaged record")
		}
		n := recordSize + int(length)
		if len(b) < n {
			return 0, nil
		}
		if op.Data = b[recordSize:n:n]; kind == kindWriteSync {
			op.Kind = storage.OpWriteSync
		}
		l.Ops = append(l.Ops, op)
		return n, nil
	case kindFallocate:
		if err := l.fallocated(op.File, mode, offset, length, size); err != nil {
			return 0, err
		}
	case kindTruncate:
		op.Kind, op.Length = storage.OpTruncate, length
		l.Ops = append(l.Ops, op)
	case kindSync:
		op.Kind = storage.OpSync
		l.Ops = append(l.Ops, op)
	default:
		return 0, fmt.Errorf("recording: record of unknown kind %d", kind)
	}
	return recordSize, nil
}

// fallocated adds what a fallocate means for the content of a file that had size bytes.
func (l *Log) fallocated(file int, mode, offset, length, size int64) error {
	keepSize := mode&unix.FALLOC_FL_KEEP_SIZE != 0
	switch mode &^ unix.FALLOC_FL_KEEP_SIZE {
	case 0: // space for what reads as before
	case unix.FALLOC_FL_PUNCH_HOLE, unix.FALLOC_FL_ZERO_RANGE:
		if within := min(length, size-offset); within > 0 {
			l.Ops = append(l.Ops, storage.Op{Kind: storage.OpPunch, File: file, Offset: offset, Length: within})
		}
	default:
		return fmt.Errorf("recording: fallocate with mode %#x", mode)
	}
	if !keepSize {
		l.Ops = append(l.Ops, storage.Op{Kind: storage.OpAllocate, File: file, Offset: offset, Length: length})
	}
	return nil
}

// Replay repeats ops on files that held initial and returns what they hold then. A recording is complete if that is what
// the program left in the files.
func Replay(initial [][]byte, ops []storage.Op) ([][]byte, error) {
	files := make([]*storage.Memory, len(initial))
	for i := range files {
		files[i] = storage.NewMemoryFrom(slices.Clone(initial[i]))
	}
	for _, op := range ops {
		var err error
		switch f := files[op.File]; op.Kind {
		case storage.OpWrite, storage.OpWriteSync:
			_, err = f.WriteAt(op.Data, op.Offset)
		case storage.OpPunch:
			err = f.PunchHole(op.Offset, op.Length)
		case storage.OpTruncate:
			err = f.Truncate(op.Length)
		case storage.OpAllocate:
			err = f.Allocate(op.Offset, op.Length)
		case storage.OpSync, storage.OpMark:
		}
		if err != nil {
			return nil, fmt.Errorf("replay %v: %w", op, err)
		}
	}
	final := make([][]byte, len(files))
	for i, f := range files {
		final[i] = f.Bytes()
	}
	return final, nil
}
