package qcow_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// A disk that ends inside its first cluster grows, preallocated, over what its backing file has there and behind: the old part is the backing
// file's, everything behind is zeroes and stored, and the file holds nothing else.
func TestPreallocatedGrowthInsideACluster(t *testing.T) {
	const cluster = 64 << 10
	for _, old := range []int64{31 << 10, 33 << 10} {
		for _, size := range []int64{96 << 10, 128 << 10} {
			for _, p := range []qcow.Preallocation{qcow.PreallocationMetadata, qcow.PreallocationFull} {
				t.Run(fmt.Sprintf("%d to %d, %v", old, size, p), func(t *testing.T) {
					f := newWorkshop(t)
					f.io("base.qcow2", "write -P 0xaa 0 1M")
					f.create("image", recipe{o: qcow.CreateOptions{Size: old, BackingFile: "base.qcow2", BackingFormat: "qcow2"}})
					f.change("image", func(img *qcow.Image) {
						do(t, img.ResizeWith(t.Context(), size, qcow.ResizeOptions{Preallocation: p}))
						expectAt(t, img, append(repeated(0xaa, old), make([]byte, size-old)...), 0)
						for e, err := range img.Extents(0, size) {
							if err != nil || e.Kind != qcow.ExtentData || e.Depth != 0 {
								t.Errorf("%+v, %v", e, err)
							}
						}
					})
					f.check("image")
					f.io("image", fmt.Sprintf("read -P 0xaa 0 %d", old), fmt.Sprintf("read -P 0 %d %d", old, size-old))
					// The header, refcount table, refcount block, L1 and L2 table, and the data. There may be holes between them.
					m, used := at(t, storage.NewMemoryFrom(readFile(t, f.path("image")))), 0
					for i := range len(m.b) / cluster {
						used += int(m.refcount(format.HostOffset(i * cluster)))
					}
					if used != 7 {
						t.Errorf("%d clusters are in use", used)
					}
				})
			}
		}
	}
}

// A disk shrinks that is empty, or was filled from the start or in any order: it is what a new one of the smaller size is, but for
// what it keeps, and no table is left over.
func TestShrinkLeavesNoTables(t *testing.T) {
	for _, c := range []struct {
		o    qcow.CreateOptions
		size int64
		unit int64 // of writes
	}{
		{o: qcow.CreateOptions{Size: 3 << 20, ClusterSize: 512, RefcountBits: 64}, size: 1 << 20, unit: 4096},
		{o: qcow.CreateOptions{Size: 32 << 20}, size: 10 << 20, unit: 1 << 20},
		{o: qcow.CreateOptions{Size: 32 << 20, ClusterSize: 1 << 20, RefcountBits: 1}, size: 10 << 20, unit: 1 << 20},
		{o: qcow.CreateOptions{Size: 3 << 20, ClusterSize: 512, RefcountBits: 16, Version: 2}, size: 1<<20 - 512, unit: 4096},
	} {
		for _, fill := range []string{"empty", "in order", "in any order"} {
			t.Run(fmt.Sprintf("cluster=%d/refcount=%d/%s", c.o.ClusterSize, c.o.RefcountBits, fill), func(t *testing.T) {
				f := create(t, c.o)
				rng := rand.New(rand.NewPCG(163, 0))
				order := rng.Perm(int(c.o.Size / c.unit))
				if fill == "in order" {
					slices.Sort(order)
				}
				content := make([]byte, c.o.Size)
				change(t, f, func(img *qcow.Image) {
					for _, i := range order {
						if fill == "empty" {
							break
						}
						p := repeated(byte(i%255+1), c.unit)
						copy(content[int64(i)*c.unit:], p)
						writeAt(t, img, p, int64(i)*c.unit)
					}
					do(t, img.Resize(t.Context(), c.size))
				})
				expectClean(t, f.Bytes())
				m := at(t, f)
				for i := m.h.L1EntriesFor(uint64(c.size)); i < uint64(m.h.L1Entries); i++ {
					if e := format.Entry(m.b[m.h.L1Offset:], i); e != 0 {
						t.Errorf("L1 entry %d behind the end is %#x", i, e)
					}
				}
				zero := 0
				for i := range m.h.RefcountTableBytes() / format.EntrySize {
					if block := format.Entry(m.b[m.h.RefcountTableOffset:], i); block != 0 && len(bytes.Trim(m.b[block:][:m.h.ClusterSize()], "\x00")) == 0 {
						zero++
					}
				}
				if zero > 2 { // those of the reserve, which Close has given back
					t.Errorf("%d refcount blocks of zeroes are left", zero)
				}
				img := open(t, f, qcow.Options{ReadOnly: true})
				expect(t, "disk", diskOf(t, img), content[:c.size])
			})
		}
	}
}

// What shrinking cuts off is given back to the file system, however much it is at once and in whatever order it lies in the file.
func TestShrinkByMoreThan2GiB(t *testing.T) {
	const mib, size, moved = 1 << 20, 2100, 10
	f := newWorkshop(t)
	f.create("image", recipe{o: qcow.CreateOptions{Size: size * mib, ClusterSize: mib, Preallocation: qcow.PreallocationMetadata}})
	f.io("image", "write -P 1 0 10M", "write -P 2 2090M 10M")
	h := f.header("image")
	file := f.file("image")
	entry := make([]byte, format.EntrySize)
	_, err := file.ReadAt(entry, int64(h.L1Offset))
	do(t, err)
	// The first clusters trade places with the last ones.
	l2 := int64(format.L1Entry(binary.BigEndian.Uint64(entry)).Offset())
	first, last := make([]byte, moved*format.EntrySize), make([]byte, moved*format.EntrySize)
	for _, p := range []struct {
		b  []byte
		at int64
	}{{first, l2}, {last, l2 + (size-moved)*format.EntrySize}} {
		_, err := file.ReadAt(p.b, p.at)
		do(t, err)
	}
	do(t, file.Close())
	f.patch("image", l2, last)
	f.patch("image", l2+(size-moved)*format.EntrySize, first)
	f.check("image")
	before := f.onDisk("image")
	f.change("image", func(img *qcow.Image) {
		expectAt(t, img, repeated(2, 5*mib), 0)
		do(t, img.Resize(t.Context(), 5*mib))
	})
	f.check("image")
	if freed := before - f.onDisk("image"); freed < 15*mib {
		t.Errorf("%d bytes of %d were given back", freed, before)
	}
	f.io("image", "read -P 2 0 5M")
}

// Whether a discard leaves a cluster unallocated, marked as zeroes, or alone depends on the version of the image and on what is behind it.
func TestDiscardIsAllocation(t *testing.T) {
	const cluster = 64 << 10
	for _, c := range []struct {
		version int
		backing bool
		want    qcow.ExtentKind
		reads   byte
	}{
		{2, false, qcow.ExtentUnallocated, 0},
		{3, false, qcow.ExtentUnallocated, 0},
		{2, true, qcow.ExtentData, 2},
		{3, true, qcow.ExtentZero, 0},
	} {
		f := files{"base": storage.NewMemoryFrom(repeated(1, 1<<20))}
		o := qcow.CreateOptions{Size: 1 << 20, Version: c.version}
		if c.backing {
			f["top"] = overlay(t, o, "base", "raw")
		} else {
			f["top"] = create(t, o)
		}
		img := open(t, f["top"], qcow.Options{Gate: f.gate})
		writeAt(t, img, repeated(2, 4*cluster), 0)
		do(t, img.Discard(cluster, 2*cluster))
		do(t, img.Flush())
		want := slices.Concat(repeated(2, cluster), repeated(c.reads, 2*cluster), repeated(2, cluster))
		expectAt(t, img, want, 0)
		for e, err := range img.Extents(cluster, 2*cluster) {
			if err != nil || e.Kind != c.want || e.Kind == qcow.ExtentZero && (e.Host != 0 || e.Depth != 0) {
				t.Errorf("version %d, backing file %t: %+v, %v", c.version, c.backing, e, err)
			}
		}
		do(t, img.Close())
		at(t, f["top"].(*storage.Memory)).expectSound()
	}
}
