package qcow_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/check"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// A traffic is many goroutines at work on one image. Each owns a range of the disk, which nobody else touches, and knows what must
// be there; all of them fight for one more range, of which only that is known that each of its sectors holds a value that
// somebody wrote, as a whole. The ranges end between cluster boundaries, so that neighbours share clusters.
type traffic struct {
	t      *testing.T
	img    *qcow.Image
	owners []*owner
	shared int64 // bytes, at offset 0
	closed bool  // requests may meet a closed image, from some point on all of them
}

// An owner is one goroutine of a traffic, with its range of the disk.
type owner struct {
	*traffic
	id    uint64
	rng   *rand.Rand
	start int64
	want  []byte
}

func newTraffic(t *testing.T, img *qcow.Image, seed uint64, owners int, each, shared int64) *traffic {
	tr := &traffic{t: t, img: img, shared: shared}
	for i := range owners {
		tr.owners = append(tr.owners, &owner{
			traffic: tr,
			id:      uint64(i + 1),
			rng:     rand.New(rand.NewPCG(seed, uint64(i+1))),
			start:   shared + int64(i)*each,
			want:    make([]byte, each),
		})
	}
	return tr
}

// run lets every owner do so many requests at most.
func (tr *traffic) run(requests int) {
	var wg sync.WaitGroup
	for _, o := range tr.owners {
		wg.Go(func() {
			for i := range requests {
				if err := o.request(uint64(i)); err != nil {
					if !tr.closed || !errors.Is(err, qcow.ErrClosed) {
						tr.t.Error(err)
					}
					return
				}
			}
		})
	}
	wg.Wait()
}

func (o *owner) request(serial uint64) error {
	if o.rng.IntN(4) == 0 {
		return o.contest(serial)
	}
	n := 1 + o.rng.Int64N(int64(len(o.want)))
	if o.rng.IntN(3) != 0 {
		n = 1 + o.rng.Int64N(2000)
	}
	at := o.rng.Int64N(int64(len(o.want)) - n + 1)
	off, want := o.start+at, o.want[at:][:n]
	switch o.rng.IntN(10) {
	case 0, 1, 2, 3:
		p := make([]byte, n)
		for i := range p {
			p[i] = byte(o.rng.Uint32())
		}
		if _, err := o.img.WriteAt(p, off); err != nil {
			return fmt.Errorf("write %d+%d: %w", off, n, err)
		}
		copy(want, p)
	case 4:
		if err := o.img.WriteZeroes(off, n, o.rng.IntN(2) == 0); err != nil {
			return fmt.Errorf("zero %d+%d: %w", off, n, err)
		}
		clear(want)
	case 5, 6:
		if err := o.img.Discard(off, n); err != nil {
			return fmt.Errorf("discard %d+%d: %w", off, n, err)
		}
		size := int64(o.img.Info().ClusterSize)
		first, end := (off+size-1)/size*size, (off+n)/size*size
		if first < end {
			clear(o.want[first-o.start : end-o.start])
		}
	case 7:
		if err := o.img.Flush(); err != nil {
			return fmt.Errorf("flush: %w", err)
		}
	default:
		return o.verify(o.img, at, n)
	}
	return nil
}

func (o *owner) verify(img *qcow.Image, at, n int64) error {
	got := make([]byte, n)
	if _, err := img.ReadAt(got, o.start+at); err != nil {
		return fmt.Errorf("read %d+%d: %w", o.start+at, n, err)
	}
	if i := firstDifference(got, o.want[at:][:n]); i >= 0 {
		return fmt.Errorf("owner %d: byte %d of the disk is %#x, not %#x", o.id, o.start+at+int64(i), got[i], o.want[at+int64(i)])
	}
	return nil
}

// contest does a request on the range that everybody fights for, in whole sectors.
func (o *owner) contest(serial uint64) error {
	sectors := o.shared / sector
	first := o.rng.Int64N(sectors)
	n := 1 + o.rng.Int64N(sectors-first)
	off, length := first*sector, n*sector
	switch o.rng.IntN(5) {
	case 0, 1:
		if _, err := o.img.WriteAt(sectorsOf(o.id<<32|serial+1, length), off); err != nil {
			return fmt.Errorf("write shared %d+%d: %w", off, length, err)
		}
	case 2:
		if err := o.img.WriteZeroes(off, length, o.rng.IntN(2) == 0); err != nil {
			return fmt.Errorf("zero shared %d+%d: %w", off, length, err)
		}
	case 3:
		if err := o.img.Discard(off, length); err != nil {
			return fmt.Errorf("discard shared %d+%d: %w", off, length, err)
		}
	default:
		return o.verifyShared(o.img, off, length)
	}
	return nil
}

// verifyShared holds sectors against what some owner may have written there.
func (tr *traffic) verifyShared(img *qcow.Image, off, n int64) error {
	got := make([]byte, n)
	if _, err := img.ReadAt(got, off); err != nil {
		return fmt.Errorf("read shared %d+%d: %w", off, n, err)
	}
	for at := int64(0); at < n; at += sector {
		value := binary.BigEndian.Uint64(got[at:])
		if id := value >> 32; id > uint64(len(tr.owners)) || value != 0 && id == 0 {
			return fmt.Errorf("the shared sector at %d holds %#x, which nobody wrote", off+at, value)
		}
		if i := firstDifference(got[at:][:sector], sectorsOf(value, sector)); i >= 0 {
			return fmt.Errorf("the shared sector at %d is a mixture, from byte %d on", off+at, i)
		}
	}
	return nil
}

// verifyAll opens the closed image again and looks at all of it.
func (tr *traffic) verifyAll(f storage.File) {
	tr.t.Helper()
	img := open(tr.t, f, qcow.Options{})
	for _, o := range tr.owners {
		if err := o.verify(img, 0, int64(len(o.want))); err != nil {
			tr.t.Error(err)
		}
	}
	if err := tr.verifyShared(img, 0, tr.shared); err != nil {
		tr.t.Error(err)
	}
	if err := img.Close(); err != nil {
		tr.t.Error(err)
	}
}

// restless is a file at whose every operation another goroutine gets its turn.
func restless(f storage.File) *hooked {
	yield := func() { runtime.Gosched() }
	return &hooked{
		File:        f,
		beforeRead:  func([]byte, int64) error { yield(); return nil },
		beforeWrite: func([]byte, int64) error { yield(); return nil },
		beforePunch: func(int64, int64) error { yield(); return nil },
		beforeSync:  func() error { yield(); return nil },
	}
}

// trafficShapes make everything interleave: tiny clusters, and a cache of a few tables.
var trafficShapes = []qcow.CreateOptions{
	{ClusterSize: 512, RefcountBits: 16},
	{ClusterSize: 512, RefcountBits: 1},
	{ClusterSize: 512, RefcountBits: 64},
	{ClusterSize: 4096, RefcountBits: 2},
	{ClusterSize: 65536, RefcountBits: 16},
}

// testSeeds returns fresh seeds, so many in a short run and in a long one.
func testSeeds(t *testing.T, short, many int) []uint64 {
	n := short
	if long() {
		n = many
	}
	base := rand.Uint64()
	t.Logf("seeds %d and following, %d of them", base, n)
	seeds := make([]uint64, n)
	for i := range seeds {
		seeds[i] = base + uint64(i)
	}
	return seeds
}

func TestConcurrentRequests(t *testing.T) {
	const (
		owners, requests = 6, 150
		maxRange         = 192 << 10 // bytes that each owner writes to: 3 large clusters
	)
	for _, o := range trafficShapes {
		for _, seed := range testSeeds(t, 1, 50) {
			t.Run(fmt.Sprintf("cluster=%d/refcount=%d/seed=%d", o.ClusterSize, o.RefcountBits, seed), func(t *testing.T) {
				cluster := int64(o.ClusterSize)
				each, shared := min(40*cluster, maxRange)+cluster/3, min(24*cluster, maxRange)
				o.Size = (shared + owners*each + sector) / sector * sector
				f := create(t, o)
				img := open(t, restless(f), qcow.Options{CacheBytes: 1, ReserveBytes: maxRange})
				tr := newTraffic(t, img, seed, owners, each, shared)
				stop := make(chan struct{})
				var wg sync.WaitGroup
				wg.Go(func() { growUntil(t, img, stop, cluster) })
				tr.run(requests)
				close(stop)
				wg.Wait()
				if err := img.Close(); err != nil {
					t.Fatal(err)
				}
				expectClean(t, f.Bytes())
				tr.verifyAll(f)
			})
		}
	}
}

// TestConcurrentRequestsHoldBack is TestConcurrentRequests over a backing file, with a journal so small that it is full again and again.
func TestConcurrentRequestsHoldBack(t *testing.T) {
	const (
		owners, requests = 6, 150
		maxRange         = 192 << 10
	)
	for _, o := range append(trafficShapes, qcow.CreateOptions{ClusterSize: 16 << 10, ExtendedL2: true}) {
		for _, seed := range testSeeds(t, 1, 50) {
			t.Run(fmt.Sprintf("cluster=%d/refcount=%d/seed=%d", o.ClusterSize, o.RefcountBits, seed), func(t *testing.T) {
				cluster := int64(o.ClusterSize)
				each, shared := min(40*cluster, maxRange)+cluster/3, min(24*cluster, maxRange)
				o.Size = (shared + owners*each + sector) / sector * sector
				o.BackingFile, o.BackingFormat = "base", "raw"
				base := append(make([]byte, shared), repeated(0x55, o.Size-shared)...)
				f := files{"base": storage.NewMemoryFrom(base), "top": create(t, o)}
				j := newJournal(17)
				img := open(t, restless(f["top"]), qcow.Options{CacheBytes: 1, ReserveBytes: maxRange, Journal: j, Gate: f.gate})
				tr := newTraffic(t, img, seed, owners, each, shared)
				for _, o := range tr.owners {
					copy(o.want, base[o.start:])
				}
				stop := make(chan struct{})
				var wg sync.WaitGroup
				wg.Go(func() { growUntil(t, img, stop, cluster) })
				tr.run(requests)
				close(stop)
				wg.Wait()
				// As after a kill: nobody flushes.
				again, _ := killed(t, f["top"].(*storage.Memory), j, qcow.Options{Gate: f.gate})
				if r := again.Restored(); r.Lost > 0 {
					t.Errorf("%+v", r)
				}
				for _, image := range []*qcow.Image{again, img} {
					for _, o := range tr.owners {
						if err := o.verify(image, 0, int64(len(o.want))); err != nil {
							t.Error(err)
						}
					}
					if err := image.Close(); err != nil {
						t.Fatal(err)
					}
				}
				report, err := check.Check(t.Context(), f["top"], check.Options{})
				if err != nil || !report.Clean() {
					t.Errorf("%v, %v", report, err)
				}
			})
		}
	}
}

// growUntil lets the disk grow, by parts of clusters and sometimes by many, and uses what it has gained.
func growUntil(t *testing.T, img *qcow.Image, stop <-chan struct{}, cluster int64) {
	for i := int64(1); ; i++ {
		select {
		case <-stop:
			return
		default:
		}
		old := img.Size()
		grow := sector * (1 + i%7)
		if i%20 == 0 {
			grow = 100 * cluster
		}
		if err := img.Resize(context.Background(), old+grow); err != nil {
			t.Errorf("resize to %d: %v", old+grow, err)
			return
		}
		got := make([]byte, min(grow, 3*cluster))
		if _, err := img.ReadAt(got, old); err != nil || firstDifference(got, make([]byte, len(got))) >= 0 {
			t.Errorf("the bytes gained from %d on are not zeroes (%v)", old, err)
			return
		}
		if _, err := img.WriteAt(repeated(0xee, sector), old+grow-sector); err != nil {
			t.Errorf("write at the new end: %v", err)
			return
		}
		if i%3 == 0 { // up to the end, with the part of a cluster that is there
			if err := img.Discard(old, grow); err != nil {
				t.Errorf("discard at the end: %v", err)
				return
			}
		}
	}
}

func TestCloseDuringRequests(t *testing.T) {
	const owners = 4
	for _, seed := range testSeeds(t, 4, 300) {
		o := qcow.CreateOptions{ClusterSize: 512, Size: 256 << 10}
		f := create(t, o)
		img := open(t, restless(f), qcow.Options{CacheBytes: 1})
		tr := newTraffic(t, img, seed, owners, 20<<10, 8<<10)
		tr.closed = true
		var wg sync.WaitGroup
		begun := make(chan struct{})
		wg.Go(func() {
			close(begun)
			tr.run(1 << 30)
		})
		<-begun
		for range seed % 64 {
			if _, err := img.WriteAt([]byte{0}, o.Size-1); err != nil {
				t.Error(err)
			}
		}
		if err := img.Close(); err != nil {
			t.Errorf("seed %d: close: %v", seed, err)
		}
		wg.Wait()
		expectClass(t, "write after close", func() error { _, err := img.WriteAt([]byte{0}, 0); return err }(), qcow.ErrClosed)
		expectClass(t, "read after close", func() error { _, err := img.ReadAt([]byte{0}, 0); return err }(), qcow.ErrClosed)
		expectClass(t, "discard after close", img.Discard(0, o.Size), qcow.ErrClosed)
		expectClass(t, "zero after close", img.WriteZeroes(0, o.Size, true), qcow.ErrClosed)
		expectClass(t, "flush after close", img.Flush(), qcow.ErrClosed)
		expectClass(t, "resize after close", img.Resize(context.Background(), 2*o.Size), qcow.ErrClosed)
		expectClass(t, "close after close", img.Close(), qcow.ErrClosed)
		expectClean(t, f.Bytes())
		tr.verifyAll(f)
	}
}
