package qcow_test

import (
	"bytes"
	"errors"
	"testing"
	"time"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/repair"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// newDamaged makes an image to be damaged: guest clusters 0 to 6 have ones, of which 4 and behind are shared with a snapshot "kept", that has ones
// in 7 as well, where the disk has twos; 200, in another L2 table, has threes.
func newDamaged(t testing.TB) *handmade {
	return newHandmade(t, qcow.CreateOptions{Size: 256 << 10, ClusterSize: hostileCluster}, func(img *qcow.Image) {
		writeAt(t, img, repeated(1, 8*hostileCluster), 0)
		_, err := img.CreateSnapshot(t.Context(), "kept", time.Unix(1, 0))
		do(t, err)
		writeAt(t, img, repeated(1, 4*hostileCluster), 0)
		writeAt(t, img, repeated(2, hostileCluster), 7*hostileCluster)
		writeAt(t, img, repeated(3, hostileCluster), 200*hostileCluster)
	})
}

// expectDamaged reads an image of newDamaged, whose guest cluster 1 may have become another, and its snapshot.
func expectDamaged(t testing.TB, img *qcow.Image, cluster1 []byte) {
	t.Helper()
	expectAt(t, img, repeated(1, hostileCluster), 0)
	expectAt(t, img, cluster1, hostileCluster)
	expectAt(t, img, repeated(1, 5*hostileCluster), 2*hostileCluster)
	expectAt(t, img, repeated(2, hostileCluster), 7*hostileCluster)
	expectAt(t, img, repeated(3, hostileCluster), 200*hostileCluster)
}

// expectMended repairs the image, in whose guest cluster 1 that is found then, writes to it, and goes back to the snapshot.
func (m *handmade) expectMended(cluster1 []byte, kinds ...repair.Kind) {
	m.t.Helper()
	f, report := m.repaired(repair.All)
	for _, k := range kinds {
		if report.Count(k) == 0 {
			m.t.Errorf("not reported: %v in %v", k, report)
		}
	}
	change(m.t, f, func(img *qcow.Image) {
		expectDamaged(m.t, img, cluster1)
		writeAt(m.t, img, repeated(4, hostileCluster), hostileCluster)
		writeAt(m.t, img, repeated(5, hostileCluster), 100*hostileCluster)
		expectDamaged(m.t, img, repeated(4, hostileCluster))
	})
	at(m.t, f).expectSound()
	change(m.t, f, func(img *qcow.Image) {
		do(m.t, img.ApplySnapshot(m.t.Context(), "kept"))
		expectAt(m.t, img, repeated(1, 8*hostileCluster), 0)
	})
	at(m.t, f).expectSound()
}

// tables are where the metadata of such an image lies.
var tables = map[string]func(m *handmade) format.HostOffset{
	"refcount table":      func(m *handmade) format.HostOffset { return m.h.RefcountTableOffset },
	"refcount block":      func(m *handmade) format.HostOffset { return m.block() },
	"L1 table":            func(m *handmade) format.HostOffset { return m.h.L1Offset },
	"its L2 table":        func(m *handmade) format.HostOffset { return m.l2Table(1) },
	"another L2 table":    func(m *handmade) format.HostOffset { return m.l2Table(200) },
	"snapshot table":      func(m *handmade) format.HostOffset { return m.h.SnapshotsOffset },
	"snapshot's L1 table": func(m *handmade) format.HostOffset { l1, _ := m.snapshotL1(); return l1 },
	"L2 table of a snapshot": func(m *handmade) format.HostOffset {
		l1, _ := m.snapshotL1()
		return format.L1Entry(m.entry(l1)).Offset()
	},
}

// A guest cluster that lies on a table is not written, zeroed, discarded or given up. The first attempt marks the image; from then on it is
// only read, until a repair gives the table a place of its own.
func TestGuestClusterOnATable(t *testing.T) {
	for name, table := range tables {
		for kind, flags := range map[string]uint64{"data": 1 << 63, "shared data": 0, "allocated zeroes": 1<<63 | 1, "compressed": 1 << 62} {
			t.Run(name+"/"+kind, func(t *testing.T) {
				m := newDamaged(t)
				target := table(m)
				m.put(m.l2Entry(1), uint64(target)|flags)
				found := bytes.Clone(m.b[target:][:hostileCluster])
				for what, request := range changes {
					if kind == "allocated zeroes" && (what == "zeroes in place" || what == "zeroes") {
						continue // nothing needs to be done
					}
					if kind == "compressed" && (what == "write of a part" || what == "write across") {
						continue // the data can't be decompressed, which is found first
					}
					f := m.file()
					img := open(t, f, qcow.Options{})
					expectClass(t, what, request(img), qcow.ErrCorrupt)
					expectClass(t, what+": another change", writing([]byte{1}, 120*hostileCluster)(img), qcow.ErrCorrupt)
					expectCorruptOrNil(t, what, img.Close())
					m.expectUnchanged(what, f)
					if f.Bytes()[format.IncompatibleOffset+7] != format.IncompatCorrupt {
						t.Errorf("%s: the image is not marked", what)
					}
					_, err := qcow.Open(f, qcow.Options{})
					expectClass(t, what+": open", err, qcow.ErrCorrupt)
					if err := open(t, f, qcow.Options{ReadOnly: true}).Close(); err != nil {
						t.Error(err)
					}
				}
				m.patchHeader(atIncompatible, 8, format.IncompatCorrupt)
				switch kind {
				case "allocated zeroes":
					m.expectMended(make([]byte, hostileCluster), repair.MarkCleared)
				case "compressed": // what the table has for a stream of compressed data nobody can tell
					f, _ := m.repaired(repair.All)
					img := open(t, f, qcow.Options{ReadOnly: true})
					expectAt(t, img, repeated(1, hostileCluster), 0)
					expectAt(t, img, repeated(1, 5*hostileCluster), 2*hostileCluster)
				default:
					m.expectMended(found, repair.MarkCleared)
				}
			})
		}
	}
}

// An entry between clusters is an error for whoever reads or changes its guest cluster, with or without data, and for the amendment to version
// 2, which would have to give zeroes up. Reading changes nothing. Data that can't be found is lost, and a repair says so.
func TestGuestClusterBetweenClusters(t *testing.T) {
	for name, flags := range map[string]uint64{"data": 1 << 63, "allocated zeroes": 1<<63 | 1} {
		t.Run(name, func(t *testing.T) {
			m := newDamaged(t)
			m.put(m.l2Entry(1), uint64(m.host(1)+512)|flags)
			m.expectChangesRefused(qcow.ErrCorrupt)
			for _, readOnly := range []bool{true, false} {
				f := m.file()
				img := open(t, f, qcow.Options{ReadOnly: readOnly})
				_, err := img.ReadAt(make([]byte, 1), hostileCluster+5)
				expectClass(t, "read", err, qcow.ErrCorrupt)
				expectAt(t, img, repeated(1, 5*hostileCluster), 2*hostileCluster)
				do(t, img.Close())
				if !bytes.Equal(f.Bytes(), m.b) {
					t.Error("reading has changed the image")
				}
			}
			f := m.file()
			expectClass(t, "amend", qcow.Amend(t.Context(), f, version2), qcow.ErrCorrupt)
			m.expectUnchanged("amend", f)
			if r := m.report(); r.Corruptions != 1 || r.Leaks != 1 {
				t.Error(r)
			}
			m.expectMended(make([]byte, hostileCluster))
		})
	}
}

// Where the refcounts can't be trusted nothing is allocated, nor given up, and no size changes.
func TestUntrustworthyRefcounts(t *testing.T) {
	requests := map[string]func(t *testing.T, img *qcow.Image) error{
		"allocate": func(_ *testing.T, img *qcow.Image) error { return writing(repeated(9, 1), 120*hostileCluster)(img) },
		"compress": func(_ *testing.T, img *qcow.Image) error {
			return img.WriteCompressed(repeated(9, 2*hostileCluster), 120*hostileCluster)
		},
		"shrink": func(t *testing.T, img *qcow.Image) error { return img.Resize(t.Context(), 64<<10) },
		"snapshot": func(t *testing.T, img *qcow.Image) error {
			_, err := img.CreateSnapshot(t.Context(), "new", time.Unix(1, 0))
			return err
		},
	}
	for name, c := range map[string]struct {
		spoil func(m *handmade)
		open  bool     // it can be opened for writing
		works []string // requests that do no harm
	}{
		"a block of zeroes":             {func(m *handmade) { clear(m.b[m.block():][:hostileCluster]) }, true, nil},
		"no block":                      {func(m *handmade) { m.put(m.h.RefcountTableOffset, 0) }, false, nil},
		"a block between clusters":      {func(m *handmade) { m.put(m.h.RefcountTableOffset, uint64(m.block())+512) }, false, nil},
		"a block behind the end":        {func(m *handmade) { m.put(m.h.RefcountTableOffset+8, 1<<40) }, false, nil},
		"a block that has no reference": {func(m *handmade) { m.setRefcount(m.block(), 0) }, true, nil},
		"a table that has no reference": {func(m *handmade) { m.setRefcount(m.h.RefcountTableOffset, 0) }, true, nil},
		"no table":                      {func(m *handmade) { m.patchHeader(atRefTable, 8, 0) }, false, nil},
		"a table without clusters":      {func(m *handmade) { m.patchHeader(atRefTableLength, 4, 0) }, false, nil},
		"marked dirty, block between clusters": {func(m *handmade) {
			m.put(m.h.RefcountTableOffset, uint64(m.block())+512)
			m.patchHeader(atIncompatible, 8, 1)
		}, true, []string{"allocate", "compress", "shrink", "snapshot"}},
	} {
		t.Run(name, func(t *testing.T) {
			m := newDamaged(t)
			c.spoil(m)
			if !c.open {
				m.expectRefused(qcow.Options{}, qcow.ErrCorrupt, "")
			}
			for what, request := range requests {
				if !c.open {
					break
				}
				f := m.file()
				img := open(t, f, qcow.Options{ReserveBytes: hostileCluster})
				err := request(t, img)
				if c.works != nil {
					do(t, err)
					do(t, img.Close())
					expectClean(t, f.Bytes())
					continue
				}
				expectClass(t, what, err, qcow.ErrCorrupt)
				if img.Size() != 256<<10 {
					t.Errorf("%s: the disk has %d bytes", what, img.Size())
				}
				expectDamaged(t, img, repeated(1, hostileCluster))
				expectCorruptOrNil(t, what, img.Close())
				m.expectTablesUnchanged(what, f)
			}
			m.expectMended(repeated(1, hostileCluster))
			f, _ := m.mended(repair.All)
			change(t, f, func(img *qcow.Image) { do(t, img.Resize(t.Context(), 64<<10)) })
			expectClean(t, f.Bytes())
		})
	}
}

// Clusters in use that have no references are not cut off when an image is closed, even at the end of the file and whatever was done before, nor are
// they when the disk grows, which needs nothing but new clusters there.
func TestCloseKeepsClustersWithoutReferences(t *testing.T) {
	requests := map[string]func(img *qcow.Image) error{
		"nothing":        func(*qcow.Image) error { return nil },
		"flush":          (*qcow.Image).Flush,
		"write in place": writing(repeated(1, hostileCluster), 2*hostileCluster),
		"grow":           func(img *qcow.Image) error { return img.Resize(t.Context(), 64<<20) },
	}
	for name, spoil := range map[string]func(m *handmade){
		"all": func(m *handmade) { clear(m.b[m.block():][:hostileCluster]) },
		"the last ones": func(m *handmade) {
			for off := 0; off < 4*hostileCluster; off += hostileCluster {
				m.setRefcount(format.HostOffset(len(m.b)-hostileCluster-off), 0)
			}
		},
	} {
		for what, request := range requests {
			m := newDamaged(t)
			spoil(m)
			f := m.file()
			img := open(t, f, qcow.Options{})
			do(t, request(img))
			expectCorruptOrNil(t, what, img.Close()) // growing gives the old L1 table up, which is seen to have no references
			if what != "grow" && !bytes.Equal(f.Bytes(), m.b) {
				t.Fatalf("%s has no references, %s: the file has changed, and has %d bytes instead of %d", name, what, len(f.Bytes()), len(m.b))
			}
			at(t, f).expectMended(repeated(1, hostileCluster))
		}
	}
}

// expectTablesUnchanged expects that no byte of any table, nor of guest data, has changed, but refcounts.
func (m *handmade) expectTablesUnchanged(what string, f *storage.Memory) {
	m.t.Helper()
	got, block := f.Bytes(), int(m.block())
	got[format.IncompatibleOffset+7] &^= format.IncompatCorrupt
	if len(got) < len(m.b) || !bytes.Equal(got[:block], m.b[:block]) || !bytes.Equal(got[block+hostileCluster:len(m.b)], m.b[block+hostileCluster:]) {
		m.t.Errorf("%s: the image has changed", what)
	}
}

// A request is under way, with its data written to a new cluster and not linked yet, when another one finds the image corrupt. Neither harms
// the other: what is acknowledged is there, and what is refused is not.
func TestDamageFoundDuringAnotherRequest(t *testing.T) {
	m := newDamaged(t)
	m.put(m.l2Entry(1), uint64(format.NewL2Entry(m.block(), true)))
	file := m.file()
	f := &hooked{File: file}
	img := open(t, f, qcow.Options{})
	reached, goOn := make(chan struct{}), make(chan struct{})
	f.set(func() {
		f.beforeWrite = func(p []byte, _ int64) error {
			if bytes.Contains(p, repeated(9, 100)) {
				close(reached)
				<-goOn
			}
			return nil
		}
	})
	done := make(chan error)
	// Shared with the snapshot: the rest of the cluster is copied.
	go func() { done <- writing(repeated(9, 100), 5*hostileCluster+50)(img) }()
	<-reached
	expectClass(t, "write", writing([]byte{1}, hostileCluster)(img), qcow.ErrCorrupt)
	close(goOn)
	err := <-done
	expectCorruptOrNil(t, "copy on write", err)
	want := repeated(1, hostileCluster)
	if err == nil {
		copy(want[50:], repeated(9, 100))
	}
	expectAt(t, img, want, 5*hostileCluster)
	expectCorruptOrNil(t, "close", img.Close())
	if !errors.Is(err, qcow.ErrCorrupt) {
		t.Log("the request that was under way has succeeded")
	}
	mended, _ := at(t, file).repaired(repair.All)
	img = open(t, mended, qcow.Options{})
	expectAt(t, img, want, 5*hostileCluster)
	do(t, img.ApplySnapshot(t.Context(), "kept"))
	expectAt(t, img, repeated(1, 8*hostileCluster), 0)
	do(t, img.Close())
}
