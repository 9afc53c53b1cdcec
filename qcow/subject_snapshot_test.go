package qcow_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/repair"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// withSnapshots makes an image of two snapshots, "first" of ones in all the disk and "second" of twos in its first cluster, that holds threes
// there now.
func withSnapshots(t *testing.T, o qcow.CreateOptions) *handmade {
	return newHandmade(t, o, func(img *qcow.Image) {
		writeAt(t, img, repeated(1, o.Size), 0)
		for i, name := range []string{"first", "second"} {
			_, err := img.CreateSnapshot(t.Context(), name, time.Unix(1, 0))
			do(t, err)
			writeAt(t, img, repeated(byte(2+i), int64(o.ClusterSize)), 0)
		}
	})
}

// setSnapshots puts a snapshot table at the end of the image, with the number of entries in the header, as if it had no other. The
// refcounts are those of before.
func (m *handmade) setSnapshots(n int, table []byte) {
	at := uint64(len(m.b))
	m.b = append(append(m.b, table...), make([]byte, -uint64(len(table))&(m.h.ClusterSize()-1))...)
	m.patchHeader(atSnapshots, 4, uint64(n))
	m.patchHeader(atSnapshotTable, 8, at)
}

// Whatever is done with the snapshots of an image on a backing file, that file is not changed, nor opened for that.
func TestSnapshotsLeaveBackingFileAlone(t *testing.T) {
	base := create(t, qcow.CreateOptions{Size: 1 << 20, ClusterSize: 4096})
	change(t, base, func(img *qcow.Image) { writeAt(t, img, repeated(5, 100<<10), 0) })
	before := base.Bytes()
	gate := func(r qcow.Reference) (qcow.Opened, error) {
		if !r.ReadOnly {
			t.Error("the backing file is opened for writing")
		}
		return qcow.Opened{File: storage.NewFaults(base, &storage.Fault{Forever: true, Err: errInjected}), Format: "qcow2"}, nil
	}
	top := overlay(t, qcow.CreateOptions{Size: 1 << 20, ClusterSize: 4096}, "base", "qcow2")
	img := open(t, top, qcow.Options{Gate: gate})
	_, err := img.CreateSnapshot(t.Context(), "before", time.Unix(1, 0))
	do(t, err)
	writeAt(t, img, repeated(6, 1000), 50<<10)
	_, err = img.CreateSnapshot(t.Context(), "after", time.Unix(2, 0))
	do(t, err)
	do(t, img.ApplySnapshot(t.Context(), "before"))
	expectAt(t, img, repeated(5, 100<<10), 0)
	do(t, img.ApplySnapshot(t.Context(), "after"))
	expectAt(t, img, repeated(6, 1000), 50<<10)
	do(t, img.DeleteSnapshot(t.Context(), "before"))
	do(t, img.Close())
	at(t, top).expectSound()
	if !bytes.Equal(base.Bytes(), before) {
		t.Error("the backing file has changed")
	}
}

// An image can have 65536 snapshots, and not one more.
func TestSnapshotTableIsFull(t *testing.T) {
	m := newHandmade(t, qcow.CreateOptions{Size: 1 << 20, ClusterSize: 4096}, func(img *qcow.Image) { writeAt(t, img, repeated(1, 4096), 0) })
	list := make([]format.Snapshot, format.MaxSnapshots)
	for i := range list {
		list[i] = format.Snapshot{ID: fmt.Sprint(i + 1), DiskSize: m.h.Size, L1Offset: m.h.L1Offset} // without an L1 table
	}
	m.setSnapshots(len(list), format.EncodeSnapshots(list))
	f, _ := m.mended(repair.All)
	full := f.Bytes()
	change(t, f, func(img *qcow.Image) {
		_, err := img.CreateSnapshot(t.Context(), "one more", time.Unix(1, 0))
		expectClass(t, "one more", err, qcow.ErrInvalid)
	})
	if !bytes.Equal(f.Bytes(), full) {
		t.Fatal("what was refused has changed the image")
	}
	change(t, f, func(img *qcow.Image) {
		do(t, img.DeleteSnapshot(t.Context(), "4711"))
		made, err := img.CreateSnapshot(t.Context(), "in its place", time.Unix(1, 0))
		do(t, err)
		if n := len(img.Snapshots()); n != format.MaxSnapshots || made.ID != "65537" {
			t.Errorf("%d snapshots, the last one has the ID %s", n, made.ID)
		}
	})
	at(t, f).expectSound()
}

// A table with more snapshots, or more bytes, than there can be is refused. A repair keeps what comes before the limit, and gives
// the tables of the others back.
func TestSnapshotTableBeyondItsLimits(t *testing.T) {
	for _, c := range []struct{ snapshots, name, kept int }{
		{2 * format.MaxSnapshots, 0, format.MaxSnapshots},
		{1100, 64000, (64 << 20) / (64 + 8 + 64000)},
		{70000, 1000, (64 << 20) / (64 + 8 + 1000)}, // both
	} {
		t.Run(fmt.Sprintf("%d of %d bytes", c.snapshots, c.name), func(t *testing.T) {
			m := withSnapshots(t, qcow.CreateOptions{Size: 256 << 10, ClusterSize: 4096})
			own, _, err := format.DecodeSnapshots(m.b[m.h.SnapshotsOffset:], m.h.Snapshots)
			do(t, err)
			list := make([]format.Snapshot, c.snapshots)
			for i := range list {
				list[i] = format.Snapshot{ID: fmt.Sprintf("%08d", i), Name: strings.Repeat("n", c.name), DiskSize: m.h.Size, L1Offset: m.h.L1Offset}
			}
			list[0], list[len(list)-1] = own[0], own[1]
			m.setSnapshots(len(list), format.EncodeSnapshots(list))
			for _, readOnly := range []bool{true, false} {
				_, err := qcow.Open(m.file(), qcow.Options{ReadOnly: readOnly})
				expectClass(t, "open", err, qcow.ErrCorrupt)
			}
			mend := m.mended
			if c.snapshots < format.MaxSnapshots { // QEMU needs seconds for so many
				mend = m.repaired
			}
			f, report := mend(repair.All)
			if n := report.Count(repair.SnapshotDropped); n == 0 || n > 2 { // not one by one
				t.Errorf("the repair says %d times that snapshots were dropped", n)
			}
			img := open(t, f, qcow.Options{})
			// The first entry is shorter than the others, which leaves room for one more at most.
			if n := len(img.Snapshots()); n != c.kept && n != c.kept+1 {
				t.Errorf("%d snapshots are left, want %d", n, c.kept)
			}
			expectAt(t, img, repeated(3, 4096), 0)
			do(t, img.ApplySnapshot(t.Context(), "first"))
			expectAt(t, img, repeated(1, 256<<10), 0)
			do(t, img.Close())
		})
	}
}

// A snapshot whose L1 table is between clusters, or longer than a table can be, keeps the image from being used until it is repaired: the
// snapshot goes, everything else stays.
func TestSnapshotWithoutUsableTable(t *testing.T) {
	for name, c := range map[string]struct {
		at, n int
		v     uint64
	}{
		"misaligned":           {0, 8, 0x42a00},
		"of 2^28 entries":      {8, 4, 1 << 28},
		"past the end":         {0, 8, 1 << 40},
		"at the largest place": {0, 8, 1<<64 - 4096},
	} {
		t.Run(name, func(t *testing.T) {
			m := withSnapshots(t, qcow.CreateOptions{Size: 256 << 10, ClusterSize: 4096})
			m.patchHeader(int(m.h.SnapshotsOffset)+c.at, c.n, c.v)
			for _, o := range []qcow.Options{{}, {ReadOnly: true}, {ReadOnly: true, Snapshot: "first"}, {ReadOnly: true, Snapshot: "second"}} {
				m.expectRefused(o, qcow.ErrCorrupt, "snapshot")
			}
			f := m.file()
			for _, o := range []qcow.AmendOptions{version2, {RefcountBits: 64}} {
				expectClass(t, "amend", qcow.Amend(t.Context(), f, o), qcow.ErrCorrupt)
			}
			m.expectUnchanged("amend", f)
			if r := m.report(); r.Corruptions != 1 || r.Leaks == 0 {
				t.Error(r)
			}
			_, report := repair.Run(t.Context(), f, repair.Options{Mode: repair.Leaks})
			m.expectUnchanged(fmt.Sprint("the repair of leaks: ", report), f)
			f, all := m.repaired(repair.All)
			if all.Count(repair.SnapshotDropped) != 1 || all.Lost() != 1 {
				t.Error(all)
			}
			change(t, f, func(img *qcow.Image) {
				expectAt(t, img, repeated(3, 4096), 0)
				do(t, img.ApplySnapshot(t.Context(), "second"))
				expectAt(t, img, append(repeated(2, 4096), repeated(1, 252<<10)...), 0)
				do(t, img.DeleteSnapshot(t.Context(), "second"))
			})
			expectClean(t, f.Bytes())
		})
	}
}

// A guest cluster at a place that no file reaches can't get another reference, nor lose one. What is refused for that changes nothing.
func TestSnapshotOfAClusterFarAway(t *testing.T) {
	for _, entry := range []uint64{1<<63 | (1<<56 - 4096), 1 << 40, 1<<62 | 1<<50} {
		m := withSnapshots(t, qcow.CreateOptions{Size: 256 << 10, ClusterSize: 4096})
		m.put(m.l2Entry(9), entry)
		for what, try := range map[string]func(img *qcow.Image) error{
			"create": func(img *qcow.Image) error {
				_, err := img.CreateSnapshot(t.Context(), "x", time.Unix(1, 0))
				return err
			},
			"apply":  func(img *qcow.Image) error { return img.ApplySnapshot(t.Context(), "first") },
			"shrink": func(img *qcow.Image) error { return img.Resize(t.Context(), 4096) },
		} {
			f := m.file()
			img := open(t, f, qcow.Options{})
			expectClass(t, fmt.Sprintf("%s with %#x", what, entry), try(img), qcow.ErrCorrupt)
			expectAt(t, img, repeated(3, 4096), 0)
			expectCorruptOrNil(t, what, img.Close())
			m.expectUnchanged(what, f)
		}
		f, report := m.repaired(repair.All)
		if report.Count(repair.ClusterLost) != 1 {
			t.Error(report)
		}
		change(t, f, func(img *qcow.Image) {
			do(t, img.ApplySnapshot(t.Context(), "first"))
			expectAt(t, img, repeated(1, 256<<10), 0)
		})
	}
}

// Entries of the snapshot table may have any length of extra data. What is known of it is completed when the table is written, what
// is not known stays; version 3 demands the known part, which a check says, and a repair adds.
func TestSnapshotExtraDataOfAnyLength(t *testing.T) {
	require.Tool(t, "qemu-img", "qemu-io")
	for _, version := range []int{2, 3} {
		for _, n := range []int{0, 8, 15, 16, 24, 50} {
			t.Run(fmt.Sprintf("version %d, %d bytes", version, n), func(t *testing.T) {
				m := withSnapshots(t, qcow.CreateOptions{Size: 256 << 10, ClusterSize: 4096, Version: version})
				list, _, err := format.DecodeSnapshots(m.b[m.h.SnapshotsOffset:], 2)
				do(t, err)
				first, second := format.EncodeSnapshots(list[:1]), format.EncodeSnapshots(list[1:])
				binary.BigEndian.PutUint32(first[36:], uint32(n))
				extra := append(bytes.Clone(first[40:64]), "what nobody knows of today"...)
				entry := append(append(first[:40:40], extra[:n]...), first[64:]...)
				entry = append(entry[:40+n+6], make([]byte, -(40+n+6)&7)...) // ID and name have 6 bytes
				copy(m.b[m.h.SnapshotsOffset:], append(entry, second...))

				short := version == 3 && n < 16
				if r := m.report(); short != (r.Corruptions == 1) || r.Clean() == short {
					t.Errorf("%v", r)
				}
				f := m.file()
				if short {
					var report *repair.Report
					if f, report = m.repaired(repair.All); report.Count(repair.SnapshotCorrected) != 1 {
						t.Error(report)
					}
				}
				if version == 2 {
					do(t, qcow.Amend(t.Context(), f, version3))
					expectClean(t, f.Bytes())
				}
				change(t, f, func(img *qcow.Image) { do(t, img.DeleteSnapshot(t.Context(), "second")) })
				expectClean(t, f.Bytes())
				after := at(t, f)
				list, _, err = format.DecodeSnapshots(after.b[after.h.SnapshotsOffset:], 1)
				do(t, err)
				if s := list[0]; s.Incomplete || s.Name != "first" || s.DiskSize != 256<<10 || !bytes.Equal(s.Extra, extra[min(n, 24):n]) {
					t.Errorf("%+v", s)
				}
				change(t, f, func(img *qcow.Image) {
					do(t, img.ApplySnapshot(t.Context(), "first"))
					expectAt(t, img, repeated(1, 256<<10), 0)
				})
				expectClean(t, f.Bytes())
			})
		}
	}
}
