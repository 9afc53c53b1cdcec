package qcow_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// snapshotL1 returns where the L1 table of the only snapshot is, and where its entry in the snapshot table.
func (m *handmade) snapshotL1() (l1, entry format.HostOffset) {
	entry = m.h.SnapshotsOffset
	return format.HostOffset(m.entry(entry)), entry
}

// An image whose tables contradict each other in what concerns a snapshot is not made worse.
func TestSnapshotHostile(t *testing.T) {
	const size = 2 << 20 // an L1 table of 64 entries, in one cluster
	create := func(t *testing.T, img *qcow.Image) error {
		_, err := img.CreateSnapshot(t.Context(), "new", time.Unix(1, 0))
		return err
	}
	apply := func(t *testing.T, img *qcow.Image) error { return img.ApplySnapshot(t.Context(), "one") }
	remove := func(t *testing.T, img *qcow.Image) error { return img.DeleteSnapshot(t.Context(), "one") }
	shrink := func(t *testing.T, img *qcow.Image) error { return img.Resize(t.Context(), 512) }
	for _, c := range []struct {
		name  string
		spoil func(m *handmade)
		do    []func(t *testing.T, img *qcow.Image) error
	}{
		{"a snapshot's cluster is a refcount block", func(m *handmade) {
			l1, _ := m.snapshotL1()
			m.put(format.L1Entry(m.entry(l1)).Offset(), uint64(m.block()))
		}, []func(t *testing.T, img *qcow.Image) error{apply, remove}},
		{"a cluster of the disk is the header", func(m *handmade) {
			m.put(m.l2Entry(1), 1<<62) // compressed, at 0
		}, []func(t *testing.T, img *qcow.Image) error{create, apply, shrink}},
		{
			"a cluster in use has no references", func(m *handmade) { m.setRefcount(m.host(1), 0) },
			[]func(t *testing.T, img *qcow.Image) error{create, apply, shrink, remove},
		},
		{
			"an L2 table in use has no references", func(m *handmade) { m.setRefcount(m.l2Table(0), 0) },
			[]func(t *testing.T, img *qcow.Image) error{create, apply, shrink, remove},
		},
		{"the snapshot's L1 table has no references", func(m *handmade) {
			l1, _ := m.snapshotL1()
			m.setRefcount(l1, 0)
		}, []func(t *testing.T, img *qcow.Image) error{remove}},
		{
			"the snapshot table has no references", func(m *handmade) { m.setRefcount(m.h.SnapshotsOffset, 0) },
			[]func(t *testing.T, img *qcow.Image) error{create, remove},
		},
		{"a snapshot has one L2 table everywhere", func(m *handmade) {
			l1, _ := m.snapshotL1()
			for i := range format.HostOffset(64) {
				m.put(l1+8*i, m.entry(l1))
			}
			if len(m.b) >= 64*512 {
				t.Fatalf("a file of %d bytes may have so many tables", len(m.b))
			}
		}, []func(t *testing.T, img *qcow.Image) error{apply, remove}},
		{"a snapshot's disk is larger than its L1 table", func(m *handmade) {
			_, entry := m.snapshotL1()
			binary.BigEndian.PutUint64(m.b[entry+48:], 2*size)
		}, []func(t *testing.T, img *qcow.Image) error{apply}},
		{"a snapshot's L2 entry is not valid", func(m *handmade) {
			l1, _ := m.snapshotL1()
			m.put(format.L1Entry(m.entry(l1)).Offset(), 0x123456)
		}, []func(t *testing.T, img *qcow.Image) error{apply, remove}},
	} {
		for i, do := range c.do {
			t.Run(fmt.Sprintf("%s/%d", c.name, i), func(t *testing.T) {
				m := newHandmade(t, qcow.CreateOptions{Size: size, ClusterSize: 512, RefcountBits: 16}, func(img *qcow.Image) {
					writeAt(t, img, repeated(1, 3*512), 0)
					if _, err := img.CreateSnapshot(t.Context(), "one", time.Unix(1, 0)); err != nil {
						t.Fatal(err)
					}
				})
				c.spoil(m)
				f := m.file()
				img := open(t, f, qcow.Options{})
				expectClass(t, "changed", do(t, img), qcow.ErrCorrupt)
				_ = img.Close() // it may be poisoned
				now := f.Bytes()
				now[format.IncompatibleOffset+7] &^= format.IncompatCorrupt
				if !bytes.Equal(now, m.b) {
					t.Errorf("the image has changed, from byte %d on", firstDifference(now, m.b))
				}
			})
		}
	}
}

// A snapshot that can't be read may still be deleted when its tables are in order.
func TestSnapshotTooSmall(t *testing.T) {
	const size = 2 << 20
	m := newHandmade(t, qcow.CreateOptions{Size: size, ClusterSize: 512}, func(img *qcow.Image) {
		writeAt(t, img, repeated(1, 3*512), 0)
		if _, err := img.CreateSnapshot(t.Context(), "one", time.Unix(1, 0)); err != nil {
			t.Fatal(err)
		}
	})
	_, entry := m.snapshotL1()
	binary.BigEndian.PutUint64(m.b[entry+48:], size+512)
	f := m.file()
	_, err := qcow.Open(f, qcow.Options{ReadOnly: true, Snapshot: "one"})
	expectClass(t, "look back", err, qcow.ErrCorrupt)
	change(t, f, func(img *qcow.Image) {
		if err := img.DeleteSnapshot(t.Context(), "1"); err != nil {
			t.Fatal(err)
		}
	})
	expectClean(t, f.Bytes())
}

// Clusters that a flush is just giving back have a reference that no table mentions. A snapshot that is deleted at that moment must
// not be misled by it: here it is an L2 table that QEMU's snapshot shares with the disk.
func TestFlushWhileSnapshotIsDeleted(t *testing.T) {
	require.Tool(t, "qemu-img", "qemu-io")
	s := newShelf(t, 1, 64<<10, 512, "refcount_bits=16", false)
	s.qemuIO("write -P 1 0 60k") // two L2 tables, the second one behind the data of the first one
	s.qemuIO("write -z -u 0 8k")
	s.run("qemu-img", "snapshot", "-c", "one", s.path)
	f := storage.NewMemoryFrom(s.load())
	h := &hooked{File: f}
	img := open(t, h, qcow.Options{ReserveBytes: 4 * 512})
	writeAt(t, img, repeated(2, 512), 61<<10) // in a cluster before the second L2 table, of which the disk gets a copy
	if err := img.Discard(61<<10, 512); err != nil {
		t.Fatal(err)
	}

	var wg sync.WaitGroup
	synced := make(chan struct{}, 100)
	var once sync.Once
	h.set(func() {
		h.beforePunch = func(int64, int64) error {
			once.Do(func() { // the cluster that was discarded is being given back
				h.set(func() { h.beforeSync = func() error { synced <- struct{}{}; return nil } })
				wg.Go(func() {
					if err := img.DeleteSnapshot(t.Context(), "one"); err != nil {
						t.Error(err)
					}
				})
				<-synced
				<-synced
				for range 10000 { // it has flushed, and must not go on
					runtime.Gosched()
				}
			})
			return nil
		}
	})
	if err := img.Flush(); err != nil {
		t.Error(err)
	}
	wg.Wait()
	writeAt(t, img, repeated(3, 1024), 20000)
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	expectClean(t, f.Bytes())
}
