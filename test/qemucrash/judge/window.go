package judge

import (
	"cmp"
	"slices"

	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// window is the part of a file that a log touches, moved together into a small file. The states that [storage.GroupCrashStates]
// enumerates of the small file are those of the file itself, in the same order, and take much less copying.
//
// It works because operations stay in one piece and at the same place within a sector, and because no state is shorter than
// the untouched part: what lies behind the shortest length that the file can have is touched as a whole.
type window struct {
	initial []byte
	spans   []span // in order, apart from each other; the last one has no end
}

// span is a touched range, in whole sectors but for the beginning of the last one.
type span struct {
	start, end int64
	at         int64 // where it begins in the small file
}

// newWindow looks at what ops do to the file with the given number.
func newWindow(initial []byte, ops []storage.Op, file int) *window {
	tail := int64(len(initial))
	for _, op := range ops {
		if op.File == file && op.Kind == storage.OpTruncate {
			tail = min(tail, op.Length)
		}
	}
	w := &window{initial: initial}
	for _, op := range ops {
		if op.File != file {
			continue
		}
		switch start, end := op.Offset, op.Offset; op.Kind {
		case storage.OpPunch:
			w.add(start, end+op.Length, tail)
		case storage.OpWrite, storage.OpWriteSync:
			w.add(start, end+int64(len(op.Data)), tail)
		case storage.OpTruncate, storage.OpAllocate, storage.OpSync, storage.OpMark:
		}
	}
	w.join(tail / sector * sector)
	return w
}

// add notes a range; what lies behind tail is touched anyhow.
func (w *window) add(start, end, tail int64) {
	if start < tail && start < end {
		w.spans = append(w.spans, span{start: start / sector * sector, end: (end + sector - 1) / sector * sector})
	}
}

// join puts the spans in order and gives them their places.
func (w *window) join(tail int64) {
	const infinity = 1 << 62
	w.spans = append(w.spans, span{start: tail, end: infinity})
	slices.SortFunc(w.spans, func(a, b span) int { return cmp.Compare(a.start, b.start) })
	joined := w.spans[:1]
	for _, s := range w.spans[1:] {
		if last := &joined[len(joined)-1]; s.start <= last.end {
			last.end = max(last.end, s.end)
		} else {
			joined = append(joined, s)
		}
	}
	for i := range joined[1:] {
		joined[i+1].at = joined[i].at + joined[i].end - joined[i].start
	}
	w.spans = joined
}

// small returns what the small file holds at first.
func (w *window) small() []byte {
	var b []byte
	for _, s := range w.spans {
		b = append(b, w.initial[s.start:min(s.end, int64(len(w.initial)))]...)
	}
	return b
}

// move returns where an offset of the file, which is touched, is in the small file.
func (w *window) move(off int64) int64 {
	i, _ := slices.BinarySearchFunc(w.spans, off, func(s span, off int64) int { return cmp.Compare(s.end, off+1) })
	return off - w.spans[i].start + w.spans[i].at
}

// op returns what an operation on the file is on the small file.
func (w *window) op(op storage.Op) storage.Op {
	switch op.Kind {
	case storage.OpWrite, storage.OpWriteSync:
		op.Offset = w.move(op.Offset)
	case storage.OpPunch:
		if op.Length > 0 {
			op.Offset = w.move(op.Offset)
		}
	case storage.OpTruncate:
		op.Length = w.move(op.Length)
	case storage.OpAllocate:
		// It only makes the file longer, if anything.
		last := w.spans[len(w.spans)-1]
		if op.Length > 0 {
			op.Length = max(0, op.Offset+op.Length-last.start)
		}
		op.Offset = last.at
	case storage.OpSync, storage.OpMark:
	}
	return op
}

// full returns what the file holds when the small file holds b.
func (w *window) full(b []byte) []byte {
	last := w.spans[len(w.spans)-1]
	full := make([]byte, last.start+int64(len(b))-last.at)
	copy(full, w.initial)
	for _, s := range w.spans {
		copy(full[s.start:min(s.end, int64(len(full)))], b[s.at:])
	}
	return full
}
