package repair

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// Where header fields are.
const (
	clusterBitsAt       = 20
	refcountTableAt     = 48
	refcountClustersAt  = 56
	snapshotsAt         = 60
	snapshotTableAt     = 64
	switchEnd2          = format.SwitchOffset + format.SwitchLength // of what changes, in version 2
	switchEnd3          = format.AutoclearOffset + 8
	headerPrefix        = 1 << format.DefaultClusterBits
	knownIncompatible   = format.IncompatDirty | format.IncompatCorrupt | format.IncompatDataFile | format.IncompatCompression | format.IncompatExtendedL2
	knownAutoclear      = format.AutoclearBitmaps | format.AutoclearRawDataFile
	placeholderClusters = 1
)

// readHeader decodes the header. Fields that are rebuilt anyway may be unusable.
func (r *repairer) readHeader(context.Context) error {
	b := make([]byte, min(r.size, headerPrefix))
	if err := r.read(Header, b, 0); err != nil {
		return err
	}
	r.sector = make([]byte, switchEnd3)
	copy(r.sector, b)
	if len(b) >= switchEnd2 {
		bits := binary.BigEndian.Uint32(b[clusterBitsAt:])
		if bits > format.DefaultClusterBits && bits <= format.MaxClusterBits { // extensions may fill a larger cluster
			b = make([]byte, min(r.size, 1<<bits))
			if err := r.read(Header, b, 0); err != nil {
				return err
			}
		}
		if bits >= format.MinClusterBits && bits <= format.MaxClusterBits {
			r.replaceUnusable(b, bits)
		}
	}
	h, err := format.DecodeHeader(b)
	if err != nil {
		return err
	}
	if unknown := h.Incompatible &^ knownIncompatible; unknown != 0 {
		return format.Unsupportedf("header", format.IncompatibleOffset, "%s", h.IncompatibleNames(unknown))
	}
	if h.Version == 2 {
		r.sector = r.sector[:switchEnd2]
	}
	r.h, r.end = h, h.ClustersFor(r.size)
	return r.locateFixed()
}

// replaceUnusable puts something that can be decoded in the place of pointers to the refcount table and the snapshot table that
// cannot be right.
func (r *repairer) replaceUnusable(b []byte, bits uint32) {
	unusable := func(off uint64) bool {
		return off == 0 || off >= uint64(format.MaxHostOffset) || off&(1<<bits-1) != 0
	}
	off, n := binary.BigEndian.Uint64(b[refcountTableAt:]), uint64(binary.BigEndian.Uint32(b[refcountClustersAt:]))
	if n == 0 || n > format.MaxRefcountTableBytes>>bits || unusable(off) {
		r.badRefcounts = fmt.Sprintf("the header has a refcount table of %d clusters at %#x", n, off)
		binary.BigEndian.PutUint64(b[refcountTableAt:], 1<<bits)
		binary.BigEndian.PutUint32(b[refcountClustersAt:], placeholderClusters)
	}
	off, n = binary.BigEndian.Uint64(b[snapshotTableAt:]), uint64(binary.BigEndian.Uint32(b[snapshotsAt:]))
	if n > 0 && unusable(off) {
		r.dropSnapshots(0, n, format.HostOffset(snapshotsAt), fmt.Sprintf("the header has the table at %#x", off))
		n = 0
	}
	if n > format.MaxSnapshots {
		r.dropSnapshots(format.MaxSnapshots, n, format.HostOffset(snapshotsAt), fmt.Sprintf("the header has %d, more than %d", n, format.MaxSnapshots))
		n = format.MaxSnapshots
	}
	binary.BigEndian.PutUint32(b[snapshotsAt:], uint32(n))
}

// locateFixed finds the structures that nothing can replace.
func (r *repairer) locateFixed() error {
	off, n, err := r.h.Encryption()
	if err != nil {
		return err
	}
	if n > 0 {
		if r.h.ClustersFor(uint64(off)+n) > r.end {
			return format.Corruptf("header extension", 0, "the encryption header, %d bytes at %#x, is not in the file of %d bytes", n, uint64(off), r.size)
		}
		r.encrypted = region{off: off, bytes: n}
	}
	r.active = region{off: r.h.L1Offset, bytes: r.h.L1Bytes()}
	switch {
	case r.active.bytes == 0:
	case uint64(r.active.off) >= r.size:
		return format.Corruptf("header", 40, "the L1 table at %#x is not in the file of %d bytes", uint64(r.active.off), r.size)
	case r.meetsFixed(r.active):
		return format.Corruptf("header", 40, "the L1 table at %#x is where the encryption header is", uint64(r.active.off))
	}
	return nil
}

// isFixed reports whether cluster cl belongs to a structure that cannot move.
func (r *repairer) isFixed(cl uint64) bool {
	first := uint64(r.h.ClusterOf(r.encrypted.off))
	return cl == 0 || cl >= first && cl < first+r.h.ClustersFor(r.encrypted.bytes)
}

// meetsFixed reports whether a cluster of the region does.
func (r *repairer) meetsFixed(g region) bool {
	first, n := uint64(r.h.ClusterOf(g.off)), r.h.ClustersFor(g.bytes)
	keys, m := uint64(r.h.ClusterOf(r.encrypted.off)), r.h.ClustersFor(r.encrypted.bytes)
	return n > 0 && (first == 0 || m > 0 && first < keys+m && keys < first+n)
}

// finish switches the image to what was made.
func (r *repairer) finish() error {
	r.noteMarks()
	if r.dropBitmaps != "" && !r.keepsTables() {
		r.changed(Change{Kind: BitmapsDropped, Table: Bitmaps, Offset: format.AutoclearOffset, Detail: r.dropBitmaps})
		r.next.Autoclear &^= format.AutoclearBitmaps
	}
	if r.report.Clean() || r.o.DryRun {
		return r.undo()
	}
	r.next.Autoclear &= knownAutoclear // as every writer must
	if err := r.switchHeader(); err != nil {
		return errors.Join(err, r.undo())
	}
	return nil
}

// noteMarks reports the marks that are cleared.
func (r *repairer) noteMarks() {
	for _, bit := range []uint64{format.IncompatDirty, format.IncompatCorrupt} {
		if r.h.Incompatible&bit != 0 && r.next.Incompatible&bit == 0 {
			r.changed(Change{
				Kind: MarkCleared, Table: Header, Offset: format.IncompatibleOffset,
				Old: r.h.Incompatible, New: r.next.Incompatible, Detail: r.h.IncompatibleNames(bit),
			})
		}
	}
}

// switchHeader changes the header with one write inside its first sector, so that the image has either the old tables or the new
// ones whatever happens, and makes that durable. Everything that the new header points to is made durable first.
func (r *repairer) switchHeader() error {
	if err := r.f.Sync(); err != nil {
		return err
	}
	old := r.sector[format.SwitchOffset:]
	b := bytes.Clone(old)
	if next := r.next.EncodeSwitch(); r.keepsTables() {
		const from, to = refcountTableAt - format.SwitchOffset, snapshotsAt - format.SwitchOffset
		copy(b[from:to], next[from:to])
	} else {
		copy(b, next)
	}
	if r.h.Version > 2 {
		binary.BigEndian.PutUint64(b[format.IncompatibleOffset-format.SwitchOffset:], r.next.Incompatible)
		binary.BigEndian.PutUint64(b[format.AutoclearOffset-format.SwitchOffset:], r.next.Autoclear)
	}
	if _, err := r.f.WriteAt(b, format.SwitchOffset); err != nil {
		err = fmt.Errorf("write header: %w", err)
		if _, again := r.f.WriteAt(old, format.SwitchOffset); again != nil {
			r.switched = true // perhaps: whatever either header needs stays
			return errors.Join(err, fmt.Errorf("write the header of before again: %w", again))
		}
		return err
	}
	r.switched = true // perhaps, until the sync has succeeded
	if err := r.f.Sync(); err != nil {
		return fmt.Errorf("write header: %w", err)
	}
	return nil
}
