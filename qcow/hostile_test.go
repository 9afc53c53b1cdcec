package qcow_test

import (
	"bytes"
	"errors"
	"fmt"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

const hostileCluster = 1024

// newHostile makes an image whose first eight guest clusters hold data.
func newHostile(t *testing.T) *handmade {
	return newHandmade(t, qcow.CreateOptions{Size: 256 << 10, ClusterSize: hostileCluster}, func(img *qcow.Image) {
		writeAt(t, img, repeated(1, 8*hostileCluster), 0)
	})
}

func writing(p []byte, off int64) func(img *qcow.Image) error {
	return func(img *qcow.Image) error { _, err := img.WriteAt(p, off); return err }
}

// changes are the requests that change guest cluster 1.
var changes = map[string]func(img *qcow.Image) error{
	"write":           writing(repeated(9, hostileCluster), hostileCluster),
	"write of a part": writing([]byte{9}, hostileCluster+100),
	"write across":    writing(repeated(1, 3*hostileCluster), 0), // what is there already, up to the entry
	"zeroes in place": func(img *qcow.Image) error { return img.WriteZeroes(hostileCluster, hostileCluster, false) },
	"zeroes":          func(img *qcow.Image) error { return img.WriteZeroes(hostileCluster, hostileCluster, true) },
	"discard":         func(img *qcow.Image) error { return img.Discard(hostileCluster, hostileCluster) },
}

// expectUnchanged expects that the file is as the image was, but for the mark that says that it is corrupt.
func (m *handmade) expectUnchanged(what string, f *storage.Memory) {
	m.t.Helper()
	b := f.Bytes()
	b[format.IncompatibleOffset+7] &^= format.IncompatCorrupt
	if !bytes.Equal(b, m.b) {
		m.t.Errorf("%s changed the file", what)
	}
}

// expectCorruptOrNil accepts the error of an image that may be marked corrupt.
func expectCorruptOrNil(t testing.TB, what string, err error) {
	t.Helper()
	if err != nil && !errors.Is(err, qcow.ErrCorrupt) {
		t.Errorf("%s: %v", what, err)
	}
}

// expectChangesRefused expects that every change of guest cluster 1 is refused with the class and leaves the file as it is.
func (m *handmade) expectChangesRefused(class error) {
	m.t.Helper()
	for name, do := range changes {
		f := m.file()
		img := open(m.t, f, qcow.Options{ReserveBytes: hostileCluster})
		expectClass(m.t, name, do(img), class)
		expectCorruptOrNil(m.t, name+": flush", img.Flush())
		expectCorruptOrNil(m.t, name+": close", img.Close())
		m.expectUnchanged(name, f)
	}
}

// No request of the guest reaches metadata, whatever the L2 entry says.
func TestEntryThatPointsAtMetadata(t *testing.T) {
	for name, target := range map[string]func(m *handmade) format.HostOffset{
		"refcount table": func(m *handmade) format.HostOffset { return m.h.RefcountTableOffset },
		"refcount block": func(m *handmade) format.HostOffset { return m.block() },
		"L1 table":       func(m *handmade) format.HostOffset { return m.h.L1Offset },
		"its L2 table":   func(m *handmade) format.HostOffset { return m.l2Table(1) },
	} {
		for _, copied := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s/copied=%v", name, copied), func(t *testing.T) {
				m := newHostile(t)
				m.put(m.l2Entry(1), uint64(format.NewL2Entry(target(m), copied)))
				m.expectChangesRefused(qcow.ErrCorrupt)
				// Allocated zeroes are replaced by a write, and their cluster is given back: this neither.
				m.put(m.l2Entry(1), uint64(format.NewL2Entry(target(m), copied))|1)
				for _, change := range []string{"write", "discard"} {
					f := m.file()
					img := open(t, f, qcow.Options{})
					expectClass(t, change, changes[change](img), qcow.ErrCorrupt)
					expectClass(t, "close", img.Close(), qcow.ErrCorrupt)
					m.expectUnchanged(change+" of allocated zeroes", f)
					if _, err := qcow.Open(f, qcow.Options{}); !errors.Is(err, qcow.ErrCorrupt) {
						t.Errorf("open after the corruption was found: %v", err)
					}
				}
			})
		}
	}
}

// An entry with the offset of the header can only be a zero cluster or an unallocated one.
func TestEntryThatPointsAtTheHeader(t *testing.T) {
	for _, entry := range []uint64{1 << 63, 1<<63 | 1} {
		m := newHostile(t)
		m.put(m.l2Entry(1), entry)
		f := m.file()
		change(t, f, func(img *qcow.Image) {
			expectAt(t, img, make([]byte, hostileCluster), hostileCluster)
			writeAt(t, img, repeated(9, hostileCluster), hostileCluster)
			if err := img.Discard(hostileCluster, hostileCluster); err != nil {
				t.Fatal(err)
			}
		})
		if !bytes.Equal(f.Bytes()[:hostileCluster], m.b[:hostileCluster]) {
			t.Errorf("entry %#x: the header was changed", entry)
		}
	}
}

func TestUnusableEntry(t *testing.T) {
	for name, c := range map[string]struct {
		entry uint64
		class error
	}{
		"past the end":            {1<<63 | 1<<30, qcow.ErrCorrupt},
		"far away":                {1<<63 | (1<<56 - hostileCluster), qcow.ErrCorrupt},
		"misaligned":              {1<<63 | 7*hostileCluster + 512, qcow.ErrCorrupt},
		"reserved bit 1":          {1<<63 | 7*hostileCluster | 2, qcow.ErrCorrupt},
		"reserved bit":            {1<<63 | 1<<61 | 7*hostileCluster, qcow.ErrCorrupt},
		"compressed past the end": {1<<62 | 1<<40, qcow.ErrCorrupt},
	} {
		t.Run(name, func(t *testing.T) {
			m := newHostile(t)
			m.put(m.l2Entry(1), c.entry)
			m.expectChangesRefused(c.class)
			img := open(t, m.file(), qcow.Options{})
			got := make([]byte, 3*hostileCluster)
			n, err := img.ReadAt(got, 0)
			expectClass(t, "read", err, c.class)
			if n != hostileCluster || !bytes.Equal(got[:n], repeated(1, hostileCluster)) {
				t.Errorf("read %d bytes before the entry", n)
			}
			expectAt(t, img, repeated(1, 6*hostileCluster), 2*hostileCluster)
			described := int64(0)
			for e, err := range img.Extents(0, img.Size()) {
				if err != nil {
					expectClass(t, "extents", err, c.class)
					break
				}
				described += e.Length
			}
			if described != hostileCluster {
				t.Errorf("extents of %d bytes before the entry", described)
			}
			_, err = img.SeekUnmapped(0)
			expectClass(t, "seek", err, c.class)
			if err := img.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// The refcount of a cluster in use is not 0: somebody else may have it, too, or get it.
func TestDataClusterWithoutRefcount(t *testing.T) {
	m := newHostile(t)
	m.put(m.l2Entry(1), uint64(format.NewL2Entry(m.host(1), false)))
	m.setRefcount(m.host(1), 0)
	for name, do := range changes {
		f := m.file()
		img := open(t, f, qcow.Options{})
		expectAt(t, img, repeated(1, 8*hostileCluster), 0)
		err := do(img)
		if err == nil { // a cluster that is given up meets its refcount later
			_ = img.Flush()
			err = img.Close()
		}
		expectClass(t, name, err, qcow.ErrCorrupt)
	}
}

// A cluster with a higher refcount has other owners: it is copied, and they keep what they have.
func TestSharedClusterIsCopied(t *testing.T) {
	for _, count := range []uint64{2, 65535} {
		m := newHostile(t)
		m.put(m.l2Entry(1), uint64(format.NewL2Entry(m.host(1), false)))
		m.setRefcount(m.host(1), count)
		for name, do := range changes {
			f := m.file()
			img := open(t, f, qcow.Options{})
			if err := do(img); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if err := img.Close(); err != nil {
				t.Fatalf("%s: close: %v", name, err)
			}
			after := &handmade{t: t, b: f.Bytes(), h: m.h}
			if !bytes.Equal(after.b[m.host(1):][:hostileCluster], repeated(1, hostileCluster)) {
				t.Errorf("%s: the shared cluster was changed", name)
			}
			if name != "write across" && after.host(1) == m.host(1) {
				t.Errorf("%s: the guest still has the shared cluster", name)
			}
			if got := format.Refcount(after.b[m.block():], m.h.RefcountOrder, uint64(m.h.ClusterOf(m.host(1)))); got != count-1 {
				t.Errorf("%s: refcount %d after %d", name, got, count)
			}
		}
	}
}

// A free cluster that holds metadata all the same is not allocated.
func TestRefcountOfMetadata(t *testing.T) {
	for name, at := range map[string]func(m *handmade) format.HostOffset{
		"header":         func(*handmade) format.HostOffset { return 0 },
		"refcount table": func(m *handmade) format.HostOffset { return m.h.RefcountTableOffset },
		"refcount block": func(m *handmade) format.HostOffset { return m.block() },
		"L1 table":       func(m *handmade) format.HostOffset { return m.h.L1Offset },
		"L2 table":       func(m *handmade) format.HostOffset { return m.l2Table(0) },
	} {
		t.Run(name, func(t *testing.T) {
			m := newHostile(t)
			m.setRefcount(at(m), 0)
			f := m.file()
			img := open(t, f, qcow.Options{})
			_, err := img.WriteAt([]byte{1}, 128<<10)
			expectClass(t, "allocating write", err, qcow.ErrCorrupt)
			expectAt(t, img, repeated(1, 8*hostileCluster), 0)
			off := int64(at(m))
			if !bytes.Equal(f.Bytes()[off:][:hostileCluster], m.b[off:][:hostileCluster]) && name != "refcount block" {
				t.Error("the table was changed")
			}
		})
	}
}

// newShared makes an image in which guest clusters 1 and 5 are one host cluster, whose refcount says that only one is.
func newShared(t *testing.T) *handmade {
	m := newHostile(t)
	m.put(m.l2Entry(5), m.entry(m.l2Entry(1)))
	return m
}

func TestSharedClusterIsNotFreedTwice(t *testing.T) {
	m := newShared(t)
	f := m.file()
	img := open(t, f, qcow.Options{})
	for _, c := range []int64{1, 5} {
		if err := img.Discard(c*hostileCluster, hostileCluster); err != nil {
			t.Fatal(err)
		}
	}
	if err := img.Flush(); err != nil { // the un-linking is durable, which is all that Flush promises
		t.Fatal(err)
	}
	if !img.Info().Corrupt {
		t.Error("the image is not marked corrupt")
	}
	_, err := img.WriteAt([]byte{1}, 128<<10)
	expectClass(t, "write", err, qcow.ErrCorrupt)
	expectAt(t, img, repeated(1, hostileCluster), 0)
	expectClass(t, "close", img.Close(), qcow.ErrCorrupt)
}

// Once freed through one of its entries, a cluster may become a table. The other entry does not open it to the guest.
func TestSharedClusterThatBecomesATable(t *testing.T) {
	m := newShared(t)
	shared := m.host(5)
	f := m.file()
	img := open(t, f, qcow.Options{ReserveBytes: hostileCluster}) // the lowest free cluster is the next one that is taken
	if err := img.Discard(hostileCluster, hostileCluster); err != nil {
		t.Fatal(err)
	}
	if err := img.Flush(); err != nil {
		t.Fatal(err)
	}
	writeAt(t, img, repeated(2, hostileCluster), 128<<10) // the first in its part of the disk
	after := &handmade{t: t, b: f.Bytes(), h: m.h}
	if table := after.l2Table(128); table != shared {
		t.Fatalf("the new L2 table is at %#x, not in the freed cluster at %#x", uint64(table), uint64(shared))
	}
	for name, do := range map[string]func() error{
		"write":   func() error { _, err := img.WriteAt([]byte{9}, 5*hostileCluster); return err },
		"discard": func() error { return img.Discard(5*hostileCluster, hostileCluster) },
		"zeroes":  func() error { return img.WriteZeroes(5*hostileCluster, hostileCluster, false) },
	} {
		expectClass(t, name, do(), qcow.ErrCorrupt)
	}
	expectAt(t, img, repeated(2, hostileCluster), 128<<10)
	if !bytes.Equal(f.Bytes()[shared:][:hostileCluster], after.b[shared:][:hostileCluster]) {
		t.Error("the guest changed a table")
	}
}
