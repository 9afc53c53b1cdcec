package qcow_test

import (
	"bytes"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/check"
	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// However many clusters are left before the refcount table is full, whatever is the first to need more of them, a larger one comes without
// giving any cluster two owners or none.
func TestRefcountTableIsFullAtEveryFill(t *testing.T) {
	const cluster = 512
	const reach = 64 * 64 * cluster // of a refcount table of one cluster, with 64 refcounts in a block
	// Of 64 clusters of data each needs a bit more than 66: one for an L2 table, one for refcounts.
	const filled = 3900 * cluster
	f := create(t, qcow.CreateOptions{Size: 2<<20 + 64<<10, ClusterSize: cluster, RefcountBits: 64})
	fillFrom := func(f *storage.Memory, off, n int64) {
		t.Helper()
		img := open(t, f, qcow.Options{ReserveBytes: 1})
		writeAt(t, img, repeated(1, n), off)
		if err := img.Close(); err != nil {
			t.Fatal(err)
		}
	}
	fillFrom(f, 0, filled)
	nearlyFull := f.Bytes()
	for name, needs := range map[string]func(img *qcow.Image) error{
		"data": func(img *qcow.Image) error {
			_, err := img.WriteAt(repeated(2, 8*cluster), 2<<20+8*cluster)
			return err
		},
		"a table of references": func(img *qcow.Image) error {
			_, err := img.WriteAt(repeated(2, cluster), 2<<20+100*cluster)
			return err
		},
		// The old L1 table goes back to the free clusters, before anything else is allocated.
		"a larger L1 table": func(img *qcow.Image) error {
			if err := img.Resize(t.Context(), 5<<20); err != nil {
				return err
			}
			if err := img.Flush(); err != nil {
				return err
			}
			_, err := img.WriteAt(repeated(2, 8*cluster), 4<<20)
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			grown := 0
			for fill := int64(48); fill < 72; fill++ {
				f, n := storage.NewMemoryFrom(bytes.Clone(nearlyFull)), filled+fill*cluster
				fillFrom(f, filled, fill*cluster)
				before := len(f.Bytes())
				img := open(t, f, qcow.Options{ReserveBytes: 1})
				if err := needs(img); err != nil {
					t.Fatal(err)
				}
				expectAt(t, img, repeated(1, n), 0)
				if err := img.Close(); err != nil {
					t.Fatal(err)
				}
				(&chain{t: t, files: files{"image": f}}).expectClean("image")
				if before <= reach && len(f.Bytes()) > reach {
					grown++
				}
			}
			if grown < 2 {
				t.Errorf("the table has grown at %d of the fills only", grown)
			}
		})
	}
}

// All the clusters that a refcount block describes are used before there is another one, and that leaves no hole.
func TestRefcountBlockIsFull(t *testing.T) {
	const cluster = 512
	f := create(t, qcow.CreateOptions{Size: 1 << 20, ClusterSize: cluster})
	write := func(first, n int64) {
		t.Helper()
		img := open(t, f, qcow.Options{ReserveBytes: 1})
		writeAt(t, img, repeated(1, n*cluster), first*cluster)
		closeClean(t, img, f)
	}
	// 256 clusters: the header, three tables, four L2 tables, and data.
	write(0, 248)
	if n := len(f.Bytes()); n != 256*cluster {
		t.Fatalf("the file has %d bytes", n)
	}
	write(248, 1)
	if n := len(f.Bytes()); n != 258*cluster { // a block and the data
		t.Errorf("the file has %d bytes, with one cluster more", n)
	}
	report, err := check.Check(t.Context(), f, check.Options{})
	if err != nil || report.ImageEnd != 258*cluster {
		t.Errorf("%v, %v", report, err)
	}
}

// An allocation for which a part of the refcounts can't be read fails as a whole or where that part begins, links nothing there, and works
// when the refcounts can be read again.
func TestAllocationAcrossUnreadableRefcounts(t *testing.T) {
	const cluster = 1024
	const span, tables = 128 * cluster, 24 // an L2 table maps span bytes; the cache holds 16 tables
	m := newHandmade(t, qcow.CreateOptions{Size: (tables + 2) * span, ClusterSize: cluster, RefcountBits: 64}, func(img *qcow.Image) {
		writeAt(t, img, repeated(1, 124*cluster), 0)
		for i := range int64(tables) {
			writeAt(t, img, repeated(1, cluster), (i+2)*span)
		}
		for _, c := range []int64{121, 123} {
			if err := img.Discard(c*cluster, cluster); err != nil {
				t.Fatal(err)
			}
		}
	})
	second := format.RefcountTableEntry(m.entry(m.h.RefcountTableOffset + format.EntrySize)).Offset()
	if second == 0 {
		t.Fatal("there is no second refcount block")
	}
	f := &hooked{File: m.file()}
	fail := func(_ []byte, off int64) error {
		if off >= int64(second) && off < int64(second)+cluster {
			return errInjected
		}
		return nil
	}
	img := open(t, f, qcow.Options{CacheBytes: 1, ReserveBytes: 1})
	for range 3 { // evict what was read when the image was opened
		diskOf(t, img)
	}
	f.set(func() { f.beforeRead = fail })
	want := repeated(1, 124*cluster)
	clear(want[121*cluster:][:cluster])
	clear(want[123*cluster:])
	n, err := img.WriteAt(repeated(2, 6*cluster), 121*cluster)
	expectClass(t, "write", err, errInjected)
	if n%cluster != 0 || n > 2*cluster {
		t.Errorf("%d bytes written", n)
	}
	copy(want[121*cluster:], repeated(2, int64(n)))
	expectAt(t, img, want, 0)
	if img.Info().Corrupt {
		t.Error("the image is marked corrupt")
	}
	f.set(func() { f.beforeRead = nil })
	writeAt(t, img, repeated(2, 6*cluster), 121*cluster)
	expectAt(t, img, append(want[:121*cluster], repeated(2, 6*cluster)...), 0)
	closeClean(t, img, f.File.(*storage.Memory))
}

// What was unlinked is given back by the next flush, as a whole, and used again: flushes leave nothing behind but the reserve, and with as much
// data as before the file is as long as before, but for the reserve, whose place depends on when it is filled.
func TestFlushesLeaveNothingBehind(t *testing.T) {
	const cluster, size, reserve = 512, 4 << 20, 16
	f := create(t, qcow.CreateOptions{Size: size, ClusterSize: cluster, RefcountBits: 64})
	img := open(t, f, qcow.Options{ReserveBytes: reserve * cluster})
	want := make([]byte, size)
	length := 0
	for i := range int64(150) {
		off := i * 80 * cluster % (size / 2)
		p := repeated(byte(i+1), 200*cluster)
		writeAt(t, img, p, off)
		copy(want[off:], p)
		if err := img.Flush(); err != nil {
			t.Fatal(err)
		}
		if err := img.Discard(0, size); err != nil {
			t.Fatal(err)
		}
		clear(want)
		writeAt(t, img, p[:512], size-512)
		copy(want[size-512:], p[:512])
		switch i {
		case 20: // another L1 table
			if err := img.Resize(t.Context(), 2*size); err != nil {
				t.Fatal(err)
			}
		case 70: // as many tables as there are going to be
			length = len(f.Bytes())
		}
		if err := img.Flush(); err != nil {
			t.Fatal(err)
		}
		report, err := check.Check(t.Context(), f, check.Options{})
		if err != nil || report.Corruptions > 0 || report.Leaks > reserve {
			t.Fatalf("flush %d: %v, %v", i, report, err)
		}
	}
	if n := len(f.Bytes()); n > length+reserve*cluster { // a leak of one cluster for each flush is more
		t.Errorf("the file has %d bytes, before it had %d", n, length)
	}
	expectAt(t, img, want, 0)
	closeClean(t, img, f)
}
