package qcow_test

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/check"
	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/repair"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// What was allocated first is not lost when clusters before and behind it are, under the same L2 table or another one, and is found in the
// middle of a longer read.
func TestAllocationInAnyOrder(t *testing.T) {
	const k, mib, table = 1 << 10, 1 << 20, 512 << 20 // an L2 table maps 512 MiB
	for name, offsets := range map[string][]int64{
		"the first table after another": {2 * mib, 4 * k, 9 * mib},
		"before and behind":             {2 * mib, 64 * k, 9 * mib, 2*mib - 4*k, 8 * mib},
		"from the end":                  {6<<30 - 4*k, table + 2*mib, table + 2*mib - 4*k, table, table - 4*k, 0},
		"tables from the end":           {11 * table, 3 * table, 2 * table, 0, table},
	} {
		t.Run(name, func(t *testing.T) {
			f, want := create(t, qcow.CreateOptions{Size: 6 << 30}), sparseDisk{}
			img := open(t, f, qcow.Options{ReserveBytes: 1})
			for i, off := range offsets {
				writeAt(t, img, want.write(off, 4*k, byte(i)), off)
				for _, off := range offsets[:i+1] {
					first, end := max(off-8*k, 0), min(off+12*k, img.Size())
					expectAt(t, img, want.bytes(first, end-first), first)
				}
			}
			want.expect(t, img)
			closeClean(t, img, f)
		})
	}
}

// The first allocation of a disk writes one entry of its L1 table, and nothing behind that.
func TestAllocationWritesOneL1Entry(t *testing.T) {
	f := create(t, qcow.CreateOptions{Size: 64 << 10})
	m := &handmade{t: t, b: f.Bytes()}
	var err error
	if m.h, err = format.DecodeHeader(m.b); err != nil {
		t.Fatal(err)
	}
	l1 := int64(m.h.L1Offset)
	rec := storage.NewRecorder(f)
	img := open(t, rec, qcow.Options{})
	writeAt(t, img, repeated(1, 512), 0)
	closeClean(t, img, f)
	var writes []string
	for _, op := range rec.Ops() {
		if op.Kind == storage.OpWrite && op.Offset < l1+64<<10 && op.Offset+int64(len(op.Data)) > l1 {
			writes = append(writes, op.String())
		}
	}
	if want := []string{fmt.Sprintf("write %#x+0x8", l1)}; !slices.Equal(writes, want) {
		t.Errorf("writes to the L1 table: %v, want %v", writes, want)
	}
	if b := f.Bytes(); format.Entry(b[l1:], 0) == 0 || !isZeroes(b[l1+8:][:64<<10-8]) {
		t.Errorf("the L1 table begins with % x", b[l1:][:32])
	}
}

// The disk is filled, and filled again, while snapshots keep what was: the refcount table grows many times. Each comes back whole.
func TestTableGrowthUnderSnapshots(t *testing.T) {
	const size = 5 << 20 // a refcount table of one cluster leads to 2 MiB
	f := create(t, qcow.CreateOptions{Size: size, ClusterSize: 512, RefcountBits: 64})
	img := open(t, f, qcow.Options{CacheBytes: 1})
	for i, name := range []string{"first", "second"} {
		writeAt(t, img, repeated(byte(i+1), size), 0)
		if _, err := img.CreateSnapshot(t.Context(), name, time.Unix(1, 0)); err != nil {
			t.Fatal(err)
		}
	}
	closeClean(t, img, f)
	for i, name := range []string{"first", "second"} {
		img = open(t, f, qcow.Options{CacheBytes: 1})
		if err := img.ApplySnapshot(t.Context(), name); err != nil {
			t.Fatal(err)
		}
		expectAt(t, img, repeated(byte(i+1), size), 0)
		closeClean(t, img, f)
	}
}

// Ten snapshots, with something written between them, are kept, with the narrowest refcounts that can count them and with wide ones, and go one by one.
func TestTenSnapshots(t *testing.T) {
	for _, width := range []int{4, 16, 64} {
		t.Run(fmt.Sprintf("refcount=%d", width), func(t *testing.T) {
			f := create(t, qcow.CreateOptions{Size: 256 << 10, ClusterSize: 4096, RefcountBits: width})
			want := disks{want: make([]byte, 256<<10)}
			step := func(what string, do func(img *qcow.Image) error) {
				t.Helper()
				img := open(t, f, qcow.Options{})
				if err := errors.Join(do(img), img.Close()); err != nil {
					t.Fatalf("%s: %v", what, err)
				}
				(&chain{t: t, files: files{"image": f}}).expectClean("image")
				if err := want.matches(f.Bytes()); err != nil {
					t.Fatalf("%s: %v", what, err)
				}
			}
			for i := range 10 {
				p := repeated(byte(i+1), 64<<10)
				off := int64(i%4) * 50000
				name := fmt.Sprint("s", i)
				copy(want.want[off:], p)
				want.kept = append(want.kept, keptDisk{name, bytes.Clone(want.want)})
				step("create "+name, func(img *qcow.Image) error {
					_, err := img.WriteAt(p, off)
					_, err2 := img.CreateSnapshot(t.Context(), name, time.Unix(int64(i), 0))
					return errors.Join(err, err2)
				})
			}
			expectClean(t, f.Bytes())
			for _, i := range []int{9, 0, 4, 4, 0, 1, 3, 2, 1, 0} {
				name := want.kept[i].name
				want.want = bytes.Clone(want.kept[i].content)
				want.kept = slices.Delete(want.kept, i, i+1)
				step("apply and delete "+name, func(img *qcow.Image) error {
					return errors.Join(img.ApplySnapshot(t.Context(), name), img.DeleteSnapshot(t.Context(), name))
				})
			}
			expectClean(t, f.Bytes())
		})
	}
}

// The largest refcounts of 64 bits count like all others, up to the last one, which no snapshot can go beyond.
func TestRefcountsUpToTheLargest(t *testing.T) {
	const cluster = 1024
	newImage := func(count uint64) *handmade {
		m := newHandmade(t, qcow.CreateOptions{Size: 64 << 10, ClusterSize: cluster, RefcountBits: 64}, func(img *qcow.Image) {
			writeAt(t, img, repeated(1, 4*cluster), 0)
		})
		m.put(m.l2Entry(1), uint64(format.NewL2Entry(m.host(1), false)))
		m.setRefcount(m.host(1), count)
		return m
	}
	const largest = 1<<64 - 1
	for _, count := range []uint64{1 << 63, largest} {
		m := newImage(count)
		f := m.file()
		change(t, f, func(img *qcow.Image) {
			writeAt(t, img, repeated(2, cluster), cluster)
			expectAt(t, img, slices.Concat(repeated(1, cluster), repeated(2, cluster), repeated(1, 2*cluster)), 0)
		})
		after := &handmade{t: t, b: f.Bytes(), h: m.h}
		if after.host(1) == m.host(1) || !bytes.Equal(after.b[m.host(1):][:cluster], repeated(1, cluster)) {
			t.Errorf("a cluster with %d references was written to", count)
		}
		if got := format.Refcount(after.b[m.block():], m.h.RefcountOrder, uint64(m.h.ClusterOf(m.host(1)))); got != count-1 {
			t.Errorf("refcount %#x after %#x", got, count)
		}
	}
	for _, count := range []uint64{largest - 1, largest} {
		m := newImage(count)
		f := m.file()
		img := open(t, f, qcow.Options{})
		_, err := img.CreateSnapshot(t.Context(), "s", time.Unix(1, 0))
		if count == largest {
			expectClass(t, "one reference more than the largest refcount", err, qcow.ErrInvalid)
		} else if err != nil {
			t.Fatal(err)
		}
		expectAt(t, img, repeated(1, 4*cluster), 0)
		if err := img.Close(); err != nil {
			t.Fatal(err)
		}
		if count == largest && !bytes.Equal(f.Bytes(), m.b) {
			t.Error("a refused snapshot has changed the image")
		}
	}
}

// Two guest clusters in one host cluster, which a refcount of one bit can't say: a repair gives each its own, with what it had.
func TestRepairWhereOneBitIsTooLittle(t *testing.T) {
	const cluster = 1024
	m := newHandmade(t, qcow.CreateOptions{Size: 64 << 10, ClusterSize: cluster, RefcountBits: 1}, func(img *qcow.Image) {
		for c := range int64(4) {
			writeAt(t, img, repeated(byte(c+1), cluster), c*cluster)
		}
	})
	m.put(m.l2Entry(3), m.entry(m.l2Entry(1)))
	f := m.file()
	report, err := check.Check(t.Context(), f, check.Options{})
	if err != nil || report.Corruptions == 0 {
		t.Fatal(report, err)
	}
	if _, err := repair.Run(t.Context(), f, repair.Options{Mode: repair.All}); err != nil {
		t.Fatal(err)
	}
	expectClean(t, f.Bytes())
	after := &handmade{t: t, b: f.Bytes()}
	if after.h, err = format.DecodeHeader(after.b); err != nil {
		t.Fatal(err)
	}
	if after.host(1) == after.host(3) {
		t.Error("the clusters are in the same place still")
	}
	change(t, f, func(img *qcow.Image) {
		expectAt(t, img, slices.Concat(repeated(1, cluster), repeated(2, cluster), repeated(3, cluster), repeated(2, cluster)), 0)
		writeAt(t, img, repeated(9, cluster), cluster)
		expectAt(t, img, repeated(2, cluster), 3*cluster)
	})
	expectClean(t, f.Bytes())
}

// Three requests at a time to one sector, in one L2 table after the other, with a cache that holds a few of them: each is evicted while it is
// in use.
func TestAllocationUnderEviction(t *testing.T) {
	const distance, size, each = 64 << 20, 6 << 30, 3
	f := create(t, qcow.CreateOptions{Size: size, ClusterSize: 512})
	img := open(t, restless(f), qcow.Options{CacheBytes: 1, ReserveBytes: 16 << 10})
	var wg sync.WaitGroup
	for i := range each {
		wg.Go(func() {
			for off := int64(0); off < size; off += distance {
				if _, err := img.WriteAt(repeated(byte(i+1), 512), off); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	for off := int64(0); off < size; off += distance {
		got := make([]byte, 1024)
		if _, err := img.ReadAt(got, off); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, append(repeated(got[0], 512), make([]byte, 512)...)) || got[0] == 0 || got[0] > each {
			t.Fatalf("at %d: % x ... % x", off, got[:4], got[512:516])
		}
	}
	closeClean(t, img, f)
}
