package repair

import (
	"context"
	"encoding/binary"
	"fmt"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// An entry of the snapshot table begins with these bytes of fixed fields, starts at multiples of so many bytes, and in version 3
// has at least so many bytes of extra data.
const (
	snapshotFixed         = 40
	snapshotAlign         = 8
	snapshotExtraRequired = 16
	snapshotExtraAt       = 36
)

// snapshot is a snapshot that can be read.
type snapshot struct {
	format.Snapshot
	l1 region
}

// readSnapshots reads the snapshot table. Where an entry cannot be decoded, those behind it cannot be found.
func (r *repairer) readSnapshots(ctx context.Context) error {
	start := r.h.SnapshotsOffset
	r.snapTable = region{off: start}
	next := start
	for i := range r.h.Snapshots {
		if i%chunkSize == 0 && ctx.Err() != nil {
			return ctx.Err()
		}
		at := (next + snapshotAlign - 1) &^ (snapshotAlign - 1)
		s, end, err := r.readSnapshot(start, at)
		if err != nil {
			return err
		}
		if end == 0 {
			r.dropSnapshots(uint64(i), uint64(r.h.Snapshots), at, "the entry does not fit into the table")
			break
		}
		next = end
		if problem := r.snapshotProblem(&s); problem != "" {
			r.dropSnapshots(uint64(i), uint64(i)+1, at, problem)
			continue
		}
		s.l1 = region{off: s.L1Offset, bytes: uint64(s.L1Entries) * format.EntrySize}
		r.snapshots = append(r.snapshots, s)
		if err := r.budget.take(snapshotSize(&s)); err != nil {
			return err
		}
	}
	r.snapTable.bytes = uint64(next - start)
	return nil
}

// readSnapshot reads the entry at the offset `at` of the file. The table starts at start. end is 0 when the entry exceeds the table or
// the file.
func (r *repairer) readSnapshot(start, at format.HostOffset) (s snapshot, end format.HostOffset, err error) {
	if uint64(at)+snapshotFixed > r.size {
		return s, 0, nil
	}
	b := make([]byte, snapshotFixed)
	if err := r.read(SnapshotTable, b, at); err != nil {
		return s, 0, err
	}
	names := uint64(binary.BigEndian.Uint16(b[12:])) + uint64(binary.BigEndian.Uint16(b[14:]))
	extra := uint64(binary.BigEndian.Uint32(b[snapshotExtraAt:]))
	end = at + snapshotFixed + format.HostOffset(extra+names)
	if uint64(end-start) > format.MaxSnapshotTableBytes || uint64(end) > r.size {
		return s, 0, nil
	}

	kept := min(extra, format.MaxSnapshotExtra)
	b = append(b, make([]byte, kept+names)...)
	if err := r.read(SnapshotTable, b[snapshotFixed:][:kept], at+snapshotFixed); err != nil {
		return s, 0, err
	}
	if err := r.read(SnapshotTable, b[snapshotFixed+kept:], end-format.HostOffset(names)); err != nil {
		return s, 0, err
	}
	binary.BigEndian.PutUint32(b[snapshotExtraAt:], uint32(kept))
	list, _, err := format.DecodeSnapshots(b, 1)
	if err != nil {
		return s, 0, err
	}
	s.Snapshot = list[0]
	if extra < snapshotExtraRequired {
		s.DiskSize = r.h.Size
	}
	if kept < extra || extra < snapshotExtraRequired && r.h.Version > 2 {
		r.correctSnapshot(at, fmt.Sprintf("snapshot %q has %d bytes of extra data", s.Name, extra))
	}
	return s, end, nil
}

// snapshotProblem says why a snapshot cannot be read, if it cannot.
func (r *repairer) snapshotProblem(s *snapshot) string {
	g := region{off: s.L1Offset, bytes: uint64(s.L1Entries) * format.EntrySize}
	switch {
	case g.bytes > format.MaxL1Bytes:
		return fmt.Sprintf("snapshot %q has an L1 table of %d bytes", s.Name, g.bytes)
	case !r.h.Aligned(g.off), g.off >= format.MaxHostOffset:
		return fmt.Sprintf("snapshot %q has its L1 table at %#x", s.Name, uint64(g.off))
	case g.bytes > 0 && (uint64(g.off) >= r.size || r.meetsFixed(g)):
		return fmt.Sprintf("snapshot %q has its L1 table at %#x, in a file of %d bytes", s.Name, uint64(g.off), r.size)
	}
	return ""
}

// dropSnapshots notes that entries from..to-1 of the snapshot table cannot be kept.
func (r *repairer) dropSnapshots(from, to uint64, at format.HostOffset, why string) {
	r.badSnapshots = true
	r.cannotFollow()
	detail := fmt.Sprintf("entry %d: %s", from, why)
	if to-from > 1 {
		detail = fmt.Sprintf("entries %d to %d: %s", from, to-1, why)
	}
	r.snapshotChanges = append(r.snapshotChanges, Change{Kind: SnapshotDropped, Table: SnapshotTable, Offset: at, Detail: detail})
}

// correctSnapshot notes that an entry of the snapshot table is rewritten.
func (r *repairer) correctSnapshot(at format.HostOffset, why string) {
	r.badSnapshots = true
	r.fault()
	r.snapshotChanges = append(r.snapshotChanges, Change{Kind: SnapshotCorrected, Table: SnapshotTable, Offset: at, Detail: why})
}

// snapshotSize returns the bytes of memory that a snapshot takes.
func snapshotSize(s *snapshot) int64 {
	return 256 + int64(len(s.ID)+len(s.Name)+len(s.Extra))
}

func (r *repairer) snapshotMemory() (n int64) {
	for i := range r.snapshots {
		n += snapshotSize(&r.snapshots[i])
	}
	return n
}

// correctSnapshotTable makes a new snapshot table if the old one is wrong, names what has moved, or lies in a wrong place.
func (r *repairer) correctSnapshotTable(context.Context) error {
	for _, c := range r.snapshotChanges {
		r.changed(c)
	}
	moves := !r.owns(table, &r.snapTable)
	if moves {
		r.changed(Change{Kind: TableMoved, Table: SnapshotTable, Offset: r.snapTable.off, Detail: "another structure lies there, or the file ends there"})
	}
	if !moves && !r.badSnapshots {
		return nil
	}
	r.next.Snapshots, r.next.SnapshotsOffset = uint32(len(r.snapshots)), 0
	if len(r.snapshots) == 0 {
		return r.leave(table, &r.snapTable)
	}
	list := make([]format.Snapshot, len(r.snapshots))
	for i := range r.snapshots {
		list[i] = r.snapshots[i].Snapshot
		const fields = 24 // of the extra data, that are always written
		list[i].Extra = list[i].Extra[:min(len(list[i].Extra), format.MaxSnapshotExtra-fields)]
	}
	b := format.EncodeSnapshots(list)
	if len(b) > format.MaxSnapshotTableBytes {
		return format.Corruptf("snapshot table", r.snapTable.off, "it would exceed %d bytes", format.MaxSnapshotTableBytes)
	}
	to, err := r.replaceTable(SnapshotTable, &r.snapTable, b)
	r.next.SnapshotsOffset = to
	return err
}
