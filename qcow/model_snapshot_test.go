package qcow_test

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// createSnapshot makes a snapshot, up to four of them.
func (m *model) createSnapshot(_, b uint64) error {
	if len(m.kept) == 4 {
		return nil
	}
	m.made++
	name := fmt.Sprintf("snapshot %d", m.made)
	made, err := m.img.CreateSnapshot(m.ctx, name, time.Unix(int64(m.made), int64(b%1e9)))
	if m.kind.external {
		return refused(err, qcow.ErrUnsupported)
	}
	if errors.Is(err, qcow.ErrInvalid) {
		return m.tooNarrow(err, "")
	}
	if err == nil && (made.Name != name || made.DiskSize != uint64(len(m.want))) {
		return fmt.Errorf("made %+v", made)
	}
	m.kept = append(m.kept, keptDisk{name, bytes.Clone(m.want)})
	return err
}

func (m *model) applySnapshot(a, _ uint64) error {
	if len(m.kept) == 0 {
		err := m.img.ApplySnapshot(m.ctx, "none")
		return refused(err, qcow.ErrNotFound)
	}
	k := m.kept[a%uint64(len(m.kept))]
	class := m.mayResize(int64(len(k.content)))
	err := m.img.ApplySnapshot(m.ctx, k.name)
	if class == nil && errors.Is(err, qcow.ErrInvalid) {
		return m.tooNarrow(err, k.name)
	}
	if class == nil {
		m.replaceInBitmaps(m.want, k.content)
		m.want = bytes.Clone(k.content)
	}
	return refused(err, class)
}

func (m *model) deleteSnapshot(a, _ uint64) error {
	if len(m.kept) == 0 {
		return refused(m.img.DeleteSnapshot(m.ctx, "none"), qcow.ErrNotFound)
	}
	i := int(a % uint64(len(m.kept)))
	name := m.kept[i].name
	m.kept = slices.Delete(m.kept, i, i+1)
	return m.img.DeleteSnapshot(m.ctx, name)
}

// readSnapshot reads a snapshot from the file as it is.
func (m *model) readSnapshot(a, _ uint64) error {
	if len(m.kept) == 0 {
		return nil
	}
	return m.holdsSnapshot(m.kept[a%uint64(len(m.kept))])
}

// tooNarrow returns err, with which a snapshot was not made, or the one of the name not applied, unless refcounts of the image's
// width really can't count the references. Nothing has changed since, and nothing unlinked waits for its release.
func (m *model) tooNarrow(err error, apply string) error {
	r, readErr := newReferences(m.file().Bytes())
	if readErr != nil {
		return readErr
	}
	active := r.count(r.h.L1Offset, r.h.L1Entries)
	more := active
	if apply != "" {
		list, _, decodeErr := format.DecodeSnapshots(r.b[r.h.SnapshotsOffset:], r.h.Snapshots)
		if decodeErr != nil {
			return decodeErr
		}
		i := slices.IndexFunc(list, func(s format.Snapshot) bool { return s.Name == apply })
		more = r.count(list[i].L1Offset, list[i].L1Entries)
	} else {
		active = nil
	}
	for c, n := range more {
		if r.stored(c)-active[c]+n > r.h.MaxRefcount() {
			return nil
		}
	}
	return fmt.Errorf("refused, though refcounts of %d bits suffice: %w", r.h.RefcountBits(), err)
}

// references looks at an image as it is in its file.
type references struct {
	b []byte
	h *format.Header
}

func newReferences(b []byte) (*references, error) {
	h, err := format.DecodeHeader(b)
	if err != nil {
		return nil, err
	}
	return &references{append(b, make([]byte, h.ClusterSize())...), h}, nil
}

// stored returns the refcount of a cluster.
func (r *references) stored(c format.Cluster) uint64 {
	i := uint64(c) >> r.h.BlockBits()
	if i >= r.h.RefcountTableBytes()/format.EntrySize {
		return 0
	}
	block := format.RefcountTableEntry(format.Entry(r.b[r.h.RefcountTableOffset:], i)).Offset()
	if block == 0 {
		return 0
	}
	return format.Refcount(r.b[block:], r.h.RefcountOrder, uint64(c)&(r.h.BlockEntries()-1))
}

// largest returns the largest refcount.
func (r *references) largest() uint64 {
	most := uint64(0)
	for i := range r.h.RefcountTableBytes() / format.EntrySize {
		at := format.RefcountTableEntry(format.Entry(r.b[r.h.RefcountTableOffset:], i)).Offset()
		if at == 0 {
			continue
		}
		block := r.b[at:][:r.h.ClusterSize()]
		for w := range uint64(len(block)) / format.EntrySize { // most are free, eight bytes of them at once
			for k := uint64(0); format.Entry(block, w) != 0 && k < format.EntrySize*8>>r.h.RefcountOrder; k++ {
				most = max(most, format.Refcount(block[w*format.EntrySize:], r.h.RefcountOrder, k))
			}
		}
	}
	return most
}

// entries calls fn for each L2 entry below an L1 table.
func (r *references) entries(l1 format.HostOffset, n uint32, fn func(e format.MappingEntry)) {
	for i := range uint64(n) {
		table := format.L1Entry(format.Entry(r.b[l1:], i)).Offset()
		for k := uint64(0); table != 0 && k < r.h.L2Entries(); k++ {
			fn(r.h.MappingEntry(r.b[table:], k))
		}
	}
}

// count returns how often the L2 tables below an L1 table refer to each cluster.
func (r *references) count(l1 format.HostOffset, n uint32) map[format.Cluster]uint64 {
	counts := map[format.Cluster]uint64{}
	r.entries(l1, n, func(e format.MappingEntry) {
		switch {
		case e.L2Entry.Kind() == format.Compressed:
			off, length := e.CompressedRange(r.h.Geometry)
			for c := r.h.ClusterOf(off); c <= r.h.ClusterOf(off+format.HostOffset(length-1)); c++ {
				counts[c]++
			}
		case e.Offset() != 0:
			counts[r.h.ClusterOf(e.Offset())]++
		}
	})
	return counts
}

// compressed tells whether the disk or a snapshot has a compressed cluster.
func (r *references) compressed() (found bool, err error) {
	note := func(e format.MappingEntry) { found = found || e.L2Entry.Kind() == format.Compressed }
	r.entries(r.h.L1Offset, r.h.L1Entries, note)
	list, _, err := format.DecodeSnapshots(r.b[r.h.SnapshotsOffset:], r.h.Snapshots)
	for _, s := range list {
		r.entries(s.L1Offset, s.L1Entries, note)
	}
	return found, err
}
