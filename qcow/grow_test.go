package qcow_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/check"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// TestPreallocatedGrowth grows disks, preallocated or not, with preallocation: within an L2 table, to a new one, and beyond the L1 table. What
// is preallocated makes the file neither longer when it is written to nor, where space was reserved, larger on disk.
func TestPreallocatedGrowth(t *testing.T) {
	const (
		off  = qcow.PreallocationOff
		full = qcow.PreallocationFull
	)
	// An L2 table of 512 bytes maps 32 KiB; an L1 table of 512 bytes 2 MiB.
	const old = 2<<20 - 48<<10
	for _, cluster := range []int{512, 64 << 10} {
		for _, gain := range []int64{16 << 10, 48 << 10, 80 << 10} {
			for mode := range 16 {
				created, grown := qcow.Preallocation(mode/4), qcow.Preallocation(mode%4)
				if !long() && (created != off || cluster > 512) && (created != off && created != grown || gain < 80<<10) {
					continue
				}
				name := fmt.Sprintf("cluster=%d/gain=%d/created=%v/grown=%v", cluster, gain, created, grown)
				t.Run(name, func(t *testing.T) {
					f := newWorkshop(t)
					f.create("image", recipe{o: qcow.CreateOptions{Size: old, ClusterSize: cluster, Preallocation: created}})
					f.change("image", func(img *qcow.Image) {
						if err := img.ResizeWith(t.Context(), old+gain, qcow.ResizeOptions{Preallocation: grown}); err != nil {
							t.Fatal(err)
						}
					})
					f.check("image")
					length, taken := f.length("image"), f.onDisk("image")
					grew := func(what string, p qcow.Preallocation) {
						t.Helper()
						if n := f.length("image"); p > off && n > length {
							t.Errorf("%s makes the file %d bytes longer", what, n-length)
						}
						// The file system may need a block for itself.
						if n := f.onDisk("image"); p >= full-1 && n > taken+8<<10 {
							t.Errorf("%s takes %d bytes of disk space", what, n-taken)
						}
						length, taken = f.length("image"), f.onDisk("image")
					}
					f.io("image", fmt.Sprintf("read -P 0 0 %d", old+gain))
					f.io("image", fmt.Sprintf("write -P 1 0 %d", old))
					grew("writing to the old part", created)
					f.io("image", fmt.Sprintf("write -P 2 %d %d", old, gain))
					grew("writing to the new part", grown)
					f.check("image")
				})
			}
		}
	}
}

// TestGrowEveryKind grows a disk of every kind, which has data in its last cluster, with every preallocation.
func TestGrowEveryKind(t *testing.T) {
	const old, size = 1<<20 - 1536, 3<<20 + 512
	for i, r := range recipes(old) {
		if r.o.ClusterSize == 2<<20 && !long() || r.name == "name longer than a sector" {
			continue
		}
		for p := qcow.PreallocationOff; p <= qcow.PreallocationFull; p++ {
			if !long() && i/2%4 != int(p) {
				continue
			}
			t.Run(fmt.Sprintf("%s/grown=%v", r.name, p), func(t *testing.T) {
				f := newWorkshop(t)
				f.create("image", r)
				want := make([]byte, size)
				if r.o.BackingFile != "" {
					copy(want, repeated(0xbb, 64<<10))
				}
				f.change("image", func(img *qcow.Image) {
					copy(want[old-1024:], repeated(7, 1024))
					writeAt(t, img, repeated(7, 1024), old-1024)
					if !r.external {
						if _, err := img.CreateSnapshot(t.Context(), "before", time.Unix(1, 0)); err != nil && r.o.RefcountBits != 1 {
							t.Fatal(err)
						}
					}
					writeAt(t, img, repeated(8, 512), old-512)
					copy(want[old-512:], repeated(8, 512))
					if err := img.ResizeWith(t.Context(), size, qcow.ResizeOptions{Preallocation: p}); err != nil {
						t.Fatal(err)
					}
					expectAt(t, img, want, 0)
				})
				f.check("image")
				f.io("image", fmt.Sprintf("read -P 8 %d 512", old-512), fmt.Sprintf("read -P 0 %d %d", old, size-old))
				if p > qcow.PreallocationOff && !r.external {
					before := f.length("image")
					f.io("image", fmt.Sprintf("write -P 9 %d %d", old, size-old))
					if after := f.length("image"); after > before {
						t.Errorf("writing makes the file %d bytes longer", after-before)
					}
				}
				if r.external && f.length("data") < size && (p > qcow.PreallocationOff || r.o.DataFileRaw) {
					t.Errorf("the data file has %d bytes", f.length("data"))
				}
				if r.o.DataFileRaw && r.o.Encryption == nil {
					f.run("qemu-img", "compare", "-q", "-f", "qcow2", "-F", "raw", "image", "data")
				}
				f.check("image")
			})
		}
	}
}

// TestGrowOverLongerBacking grows a disk whose backing file is longer than it was.
func TestGrowOverLongerBacking(t *testing.T) {
	for _, version := range []int{2, 3} {
		for p := qcow.PreallocationMetadata; p <= qcow.PreallocationFull; p++ {
			f := newWorkshop(t)
			f.io("base.qcow2", "write -P 0xcc 128k 128k", "write -P 0xdd 512k 64k")
			f.create("image", recipe{o: qcow.CreateOptions{Size: 150 << 10, Version: version, BackingFile: "base.qcow2", BackingFormat: "qcow2"}})
			ctx, cancel := context.WithCancel(t.Context())
			f.change("image", func(img *qcow.Image) {
				o := qcow.ResizeOptions{Preallocation: p}
				cancel()
				if err := img.ResizeWith(ctx, 1<<20, o); !errors.Is(err, context.Canceled) {
					t.Fatalf("cancelled: %v", err)
				}
				o.Progress = func(done, total int64) {
					if done > total || total != 1<<20-150<<10 {
						t.Fatalf("progress: %d of %d", done, total)
					}
				}
				if err := img.ResizeWith(t.Context(), 1<<20, o); err != nil {
					t.Fatal(err)
				}
				expectAt(t, img, repeated(0xbb, 64<<10), 0)
				expectAt(t, img, repeated(0, 64<<10), 64<<10)
				expectAt(t, img, repeated(0xcc, 22<<10), 128<<10)
				expectAt(t, img, repeated(0, 1<<20-150<<10), 150<<10)
				for e, err := range img.Extents(192<<10, 1<<20-192<<10) {
					if err != nil {
						t.Fatal(err)
					}
					if e.Kind != qcow.ExtentData || e.Depth != 0 {
						t.Fatalf("version %d, %v: %+v", version, p, e)
					}
				}
			})
			f.check("image")
			f.io("image", "read -P 0xbb 0 64k", "read -P 0xcc 128k 22k", "read -P 0 150k 874k")
		}
	}
}

// TestGrowWithBitmaps grows a disk with bitmaps, of which an enabled one has what the disk gains as dirty, even where it is preallocated.
func TestGrowWithBitmaps(t *testing.T) {
	const old, size = 200<<10 + 512, 900 << 10
	for p := qcow.PreallocationMetadata; p <= qcow.PreallocationFull; p++ {
		mem := create(t, qcow.CreateOptions{Size: old})
		change(t, mem, func(img *qcow.Image) {
			addBitmap(t, img, "on", qcow.BitmapOptions{Granularity: 64 << 10})
			addBitmap(t, img, "off", qcow.BitmapOptions{Granularity: 64 << 10, Disabled: true})
			writeAt(t, img, repeated(1, 512), 0)
			do(t, img.ResizeWith(t.Context(), size, qcow.ResizeOptions{Preallocation: p}))
			expectAt(t, img, make([]byte, size-512), 512)
		})
		expectClean(t, mem.Bytes())
		change(t, mem, func(img *qcow.Image) {
			expectDirty(t, img, "on", []qcow.DirtyExtent{{Offset: 0, Length: 64 << 10}, {Offset: 192 << 10, Length: size - 192<<10}})
			expectDirty(t, img, "off", nil)
		})
	}
}

// TestResizeWithRefuses has what can't be preallocated.
func TestResizeWithRefuses(t *testing.T) {
	f := create(t, qcow.CreateOptions{Size: 1 << 20})
	change(t, f, func(img *qcow.Image) {
		o := qcow.ResizeOptions{Preallocation: qcow.PreallocationFull}
		expectClass(t, "shrink", img.ResizeWith(t.Context(), 512<<10, o), qcow.ErrInvalid)
		expectClass(t, "odd size", img.ResizeWith(t.Context(), 1<<20+1, o), qcow.ErrInvalid)
		expectClass(t, "too large", img.ResizeWith(t.Context(), 1<<62, o), qcow.ErrInvalid)
		expectClass(t, "unknown", img.ResizeWith(t.Context(), 2<<20, qcow.ResizeOptions{Preallocation: 4}), qcow.ErrInvalid)
		if err := img.ResizeWith(t.Context(), 1<<20, o); err != nil {
			t.Errorf("the same size: %v", err)
		}
	})
	expectClean(t, f.Bytes())
}

// TestCrashPreallocatedGrowth enumerates what a crash leaves of growing with preallocation, while the disk is written to.
func TestCrashPreallocatedGrowth(t *testing.T) {
	require.Tool(t, "qemu-img")
	total := 0
	for _, cluster := range []int{512, 4096} {
		for p := qcow.PreallocationMetadata; p <= qcow.PreallocationFull; p++ {
			if !long() && (cluster == 512) == (p == qcow.PreallocationFalloc) {
				continue
			}
			t.Run(fmt.Sprintf("cluster=%d/%v", cluster, p), func(t *testing.T) {
				c := int64(cluster)
				w, initial := newCrashWorkload(t, uint64(p), qcow.CreateOptions{Size: 30*c - 512, ClusterSize: cluster}, 16*c, 9*c)
				grow := func(size int64) {
					e := w.do(fmt.Sprintf("grow %d", size), func() error {
						return w.img.ResizeWith(t.Context(), size, qcow.ResizeOptions{Preallocation: p})
					})
					e.value = uint64(size)
					w.sizes = append(w.sizes, e)
				}
				w.write(25*c, 3*c)
				grow(c*c/8*2 + 512) // another L2 table
				w.write(w.img.Size()-3*c, 3*c)
				if cluster == 512 {
					grow(c*c/8*c/8 + 3*c) // another L1 table
					w.write(w.img.Size()-2*c, 2*c)
				}
				w.discard(20*c, 20*c)
				w.flush()
				w.resize(25 * c)
				w.do("close", w.img.Close)
				o := storage.CrashOptions{Seed: 1, Exhaustive: 4, Random: 2}
				if long() {
					o = storage.CrashOptions{Seed: 1, Exhaustive: 10}
				}
				total += w.run(initial, o, 40)
			})
		}
	}
	t.Logf("%d states", total)
}

// TestFaultPreallocatedGrowth lets the k-th change of the file fail while the disk grows: the disk has its old size and content, unless the
// header could be written, the image stays valid, and what was allocated for nothing is given back.
func TestFaultPreallocatedGrowth(t *testing.T) {
	const old, size = 20<<10 + 512, 70 << 10
	for _, fault := range []storage.Fault{
		{Err: syscall.EIO},
		{Err: syscall.EIO, Forever: true},
		{Err: fmt.Errorf("%w: %w", storage.ErrNoSpace, syscall.ENOSPC)},
		{Err: fmt.Errorf("%w: %w", storage.ErrNoSpace, syscall.ENOSPC), Short: true},
	} {
		injected := 0
		for p := qcow.PreallocationMetadata; p <= qcow.PreallocationFull; p++ {
			for at := 0; ; at++ {
				mem := create(t, qcow.CreateOptions{Size: old, ClusterSize: 512})
				fill(t, mem, old)
				fault.At = at
				faults := storage.NewFaults(mem, &fault)
				img := open(t, faults, qcow.Options{ReserveBytes: 4 << 10}) // changes nothing
				err := img.ResizeWith(t.Context(), size, qcow.ResizeOptions{Preallocation: p})
				expectAt(t, img, sectorsOf(1, old), 0)
				closeErr := img.Close()
				_, n := faults.Count()
				if n == 0 {
					if err != nil || closeErr != nil {
						t.Fatal(err, closeErr)
					}
					break
				}
				injected++
				if err != nil && !errors.Is(err, fault.Err) {
					t.Fatalf("fault at %d surfaced as %v", at, err)
				}
				report, checkErr := check.Check(t.Context(), mem, check.Options{})
				if checkErr != nil || report.Corruptions > 0 || closeErr == nil && report.Leaks > 0 {
					t.Fatalf("fault at %d, %v, %v: %v %v", at, err, closeErr, checkErr, report)
				}
				img = open(t, mem, qcow.Options{})
				if got := img.Size(); got != size && (got != old || err == nil) {
					t.Fatalf("fault at %d, %v: the size is %d", at, err, got)
				}
				want := make([]byte, img.Size())
				copy(want, sectorsOf(1, old))
				expectAt(t, img, want, 0)
				if err := img.Resize(t.Context(), size+4096); err != nil {
					t.Fatal(err)
				}
				expectAt(t, img, make([]byte, size+4096-old), old)
				if err := img.Close(); err != nil {
					t.Fatal(err)
				}
			}
		}
		t.Logf("%v, for ever=%v, short=%v: %d faults", fault.Err, fault.Forever, fault.Short, injected)
	}
}

// TestConcurrentPreallocatedGrowth grows a disk step by step while others write to what it has, to its last cluster above all, discard and flush.
func TestConcurrentPreallocatedGrowth(t *testing.T) {
	const cluster, step, writers = 4096, 40<<10 + 512, 4
	mem := create(t, qcow.CreateOptions{Size: step, ClusterSize: cluster})
	img := open(t, mem, qcow.Options{ReserveBytes: 64 << 10})
	stop := make(chan struct{})
	var group sync.WaitGroup
	for w := range writers {
		group.Go(func() {
			rng := rand.New(rand.NewPCG(1, uint64(w)))
			mine := map[int64]byte{} // sectors that only this writer writes, by number
			for v := byte(1); ; v = v%255 + 1 {
				select {
				case <-stop:
					if len(mine) == 0 {
						t.Error("nothing was written meanwhile")
					}
					for s, v := range mine {
						got := make([]byte, sector)
						if _, err := img.ReadAt(got, s*sector); err != nil || !bytes.Equal(got, repeated(v, sector)) {
							t.Errorf("sector %d is %#x instead of %#x, %v", s, got[0], v, err)
						}
					}
					return
				default:
				}
				sectors := img.Size() / sector
				s := sectors - 1 - rng.Int64N(min(sectors, 20))
				s -= (s%writers + writers - int64(w)) % writers
				if s < 0 {
					continue
				}
				if _, err := img.WriteAt(repeated(v, sector), s*sector); err != nil {
					t.Error(err)
					return
				}
				mine[s] = v
				if rng.IntN(20) == 0 {
					if err := img.Flush(); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	for i := range 150 {
		o := qcow.ResizeOptions{Preallocation: qcow.Preallocation(1 + i%3)}
		if err := img.ResizeWith(t.Context(), int64(i+2)*step, o); err != nil {
			t.Error(err)
		}
	}
	close(stop)
	group.Wait()
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	expectClean(t, mem.Bytes())
}
