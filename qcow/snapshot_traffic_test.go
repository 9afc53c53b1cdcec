package qcow_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// A relay is writers that pass a baton: who has it writes the next number to the next slot, in whatever cluster that is, and hands it
// on when the write has been answered. So at any moment the slots say which numbers were written: all up to some number,
// and each slot the last one that went to it. A content that says anything else is no moment of the disk.
type relay struct {
	img   *qcow.Image
	slots []int64       // offsets of sectors
	begun atomic.Uint64 // numbers whose write has begun
	baton chan uint64
}

func newRelay(img *qcow.Image, rng *rand.Rand, slots int, area int64) *relay {
	r := &relay{img: img, baton: make(chan uint64, 1)}
	for _, s := range rng.Perm(int(area / sector))[:slots] {
		r.slots = append(r.slots, int64(s)*sector)
	}
	r.baton <- 1
	return r
}

// run is one of the writers.
func (r *relay) run(t *testing.T, stop <-chan struct{}) {
	for {
		select {
		case <-stop:
			return
		case n := <-r.baton:
			r.begun.Store(n)
			if _, err := r.img.WriteAt(sectorsOf(n, sector), r.slots[n%uint64(len(r.slots))]); err != nil {
				t.Errorf("write number %d: %v", n, err)
				return
			}
			r.baton <- n + 1
		}
	}
}

// watch reads slots: there must be a number in each that belongs there, whatever content a read meets. Every slot has had one.
func (r *relay) watch(t *testing.T, rng *rand.Rand, stop <-chan struct{}) {
	p := make([]byte, sector)
	for {
		select {
		case <-stop:
			return
		default:
		}
		i := rng.IntN(len(r.slots))
		if _, err := r.img.ReadAt(p, r.slots[i]); err != nil {
			t.Error(err)
			return
		}
		v := binary.BigEndian.Uint64(p)
		if v == 0 || v%uint64(len(r.slots)) != uint64(i) || v > r.begun.Load() || firstDifference(p, sectorsOf(v, sector)) >= 0 {
			t.Errorf("slot %d says %d", i, v)
			return
		}
	}
}

// await returns when so many numbers more have begun.
func (r *relay) await(t *testing.T, more int) {
	for target := r.begun.Load() + uint64(more); r.begun.Load() < target && !t.Failed(); {
		runtime.Gosched()
	}
}

// A moment is what the slots may say after a snapshot was applied.
type moment struct {
	slots         []uint64 // what they said in the snapshot
	before, after uint64   // numbers begun before and after it was applied
}

// read returns what the slots say, each of which must be one number as a whole.
func (r *relay) read(img *qcow.Image) ([]uint64, error) {
	said := make([]uint64, len(r.slots))
	for i, off := range r.slots {
		p := make([]byte, sector)
		if _, err := img.ReadAt(p, off); err != nil {
			return nil, err
		}
		said[i] = binary.BigEndian.Uint64(p)
		if firstDifference(p, sectorsOf(said[i], sector)) >= 0 {
			return nil, fmt.Errorf("slot %d is torn", i)
		}
	}
	return said, nil
}

// verify holds what the slots say against what they said when a snapshot was applied last, and the numbers since.
func (r *relay) verify(said []uint64, m moment) error {
	last := m.before
	for _, v := range said {
		last = max(last, v)
	}
	slots := uint64(len(said))
	for i, got := range said {
		// The last number up to `last` that went to the slot.
		want := last - (last-uint64(i))%slots
		if last < uint64(i) {
			want = 0
		}
		switch {
		case want > m.after && got == want: // written since for sure
		case want <= m.after && (got == m.slots[i] || got > m.before && got <= want && got%slots == uint64(i)):
		default:
			return fmt.Errorf("slot %d says %d; the last number is %d, so it is %d, or %d in the snapshot that was applied between %d and %d",
				i, got, last, want, m.slots[i], m.before, m.after)
		}
	}
	return nil
}

// keeper makes, applies and deletes snapshots and changes the size of the disk while the relay runs.
type keeper struct {
	*relay
	t    *testing.T
	f    *storage.Memory
	rng  *rand.Rand
	area int64 // that the disk always has
	kept []keptMoment
	now  moment
	made int
}

type keptMoment struct {
	name string
	said []uint64
	moment
}

// look reads a snapshot from the file as it is.
func (k *keeper) look(name string) ([]uint64, error) {
	img, err := qcow.Open(storage.NewMemoryFrom(k.f.Bytes()), qcow.Options{ReadOnly: true, Snapshot: name})
	if err != nil {
		return nil, err
	}
	return k.read(img)
}

func (k *keeper) step() error {
	ctx := k.t.Context()
	n := len(k.kept)
	switch what := k.rng.IntN(8); {
	case n == 0 || what < 3 && n < 4:
		return k.create()
	case what < 5:
		kept := k.kept[k.rng.IntN(n)]
		before := k.begun.Load()
		if err := k.img.ApplySnapshot(ctx, kept.name); err != nil {
			return err
		}
		// The number that was begun last may come before or after.
		k.now = moment{slots: kept.said, before: before - 1, after: k.begun.Load()}
		return nil
	case what < 6:
		i := k.rng.IntN(n)
		name := k.kept[i].name
		k.kept = append(k.kept[:i:i], k.kept[i+1:]...)
		return k.img.DeleteSnapshot(ctx, name)
	case what < 7:
		return k.img.Resize(ctx, k.area+sector*k.rng.Int64N(200))
	}
	return k.checkKept()
}

// create makes a snapshot, which must be a moment of the disk.
func (k *keeper) create() error {
	k.made++
	name := fmt.Sprint("moment ", k.made)
	if _, err := k.img.CreateSnapshot(k.t.Context(), name, time.Now()); err != nil {
		return err
	}
	said, err := k.look(name)
	if err != nil {
		return err
	}
	k.kept = append(k.kept, keptMoment{name, said, k.now})
	return k.verify(said, k.now)
}

// checkKept looks whether the snapshots are what they were.
func (k *keeper) checkKept() error {
	for _, kept := range k.kept {
		said, err := k.look(kept.name)
		if err != nil {
			return err
		}
		for i, v := range said {
			if v != kept.said[i] {
				return fmt.Errorf("%s has changed: slot %d says %d instead of %d", kept.name, i, v, kept.said[i])
			}
		}
	}
	return nil
}

// disturb writes, discards and reads behind the slots, and up to the end of the disk, wherever that is just now.
func disturb(t *testing.T, img *qcow.Image, rng *rand.Rand, area int64, stop <-chan struct{}) {
	for {
		select {
		case <-stop:
			return
		default:
		}
		n := (1 + rng.Int64N(12)) * sector
		off := area + rng.Int64N(120)*sector
		var err error
		switch rng.IntN(8) {
		case 0:
			err = img.Discard(off, n)
		case 1:
			err = img.WriteZeroes(off, n, true)
		case 2:
			err = img.Flush()
		case 3:
			cluster := int64(img.Info().ClusterSize)
			err = img.WriteCompressed(sectorsOf(rng.Uint64(), cluster), area+rng.Int64N(60)*sector/cluster*cluster)
		case 4:
			p := make([]byte, n)
			if _, err = img.ReadAt(p, off); err != nil {
				break
			}
			for s := int64(0); s < n; s += sector {
				if v := binary.BigEndian.Uint64(p[s:]); firstDifference(p[s:][:sector], sectorsOf(v, sector)) >= 0 {
					t.Errorf("the sector at %d is torn", off+s)
				}
			}
		default:
			_, err = img.WriteAt(sectorsOf(rng.Uint64(), n), off)
		}
		if err != nil && !errors.Is(err, qcow.ErrInvalid) && !errors.Is(err, io.EOF) { // behind the end of the disk
			t.Error(err)
			return
		}
	}
}

// TestSnapshotTraffic makes, applies and deletes snapshots and changes the size of the disk while others write: each snapshot is one
// moment of the disk, and stays that.
func TestSnapshotTraffic(t *testing.T) {
	const slots = 40
	steps := 60
	if long() {
		steps = 600
	}
	for i, o := range trafficShapes {
		if o.RefcountBits < 8 {
			o.RefcountBits = 8 // room for every snapshot
		}
		for _, seed := range testSeeds(t, 1, 20) {
			t.Run(fmt.Sprintf("cluster=%d/refcount=%d/seed=%d", o.ClusterSize, o.RefcountBits, seed), func(t *testing.T) {
				rng := rand.New(rand.NewPCG(seed, 0))
				area := min(60*int64(o.ClusterSize), 400<<10)
				o.Size = area + 100*sector
				f := create(t, o)
				options := qcow.Options{CacheBytes: 1, ReserveBytes: 8 * int64(o.ClusterSize)}
				if (uint64(i)+seed)%2 == 0 {
					options.Journal = newJournal(50)
				}
				img := open(t, restless(f), options)
				k := &keeper{relay: newRelay(img, rng, slots, area), t: t, f: f, rng: rng, area: area, now: moment{slots: make([]uint64, slots)}}
				stop := make(chan struct{})
				var wg sync.WaitGroup
				for range 3 {
					wg.Go(func() { k.run(t, stop) })
				}
				for i := range 2 {
					wg.Go(func() { disturb(t, img, rand.New(rand.NewPCG(seed, uint64(i+1))), area, stop) })
				}
				k.await(t, slots+1)
				for i := range 2 {
					wg.Go(func() { k.watch(t, rand.New(rand.NewPCG(seed, uint64(i+8))), stop) })
				}
				for i := range steps {
					k.await(t, rng.IntN(30))
					if err := k.step(); err != nil {
						t.Errorf("step %d: %v", i, err)
						break
					}
				}
				close(stop)
				wg.Wait()
				if err := k.checkKept(); err != nil {
					t.Error(err)
				}
				t.Logf("%d numbers, %d snapshots", k.begun.Load(), k.made)
				said, err := k.read(img)
				if err == nil {
					err = k.verify(said, k.now)
				}
				if err != nil {
					t.Errorf("at last: %v", err)
				}
				if err := img.Close(); err != nil {
					t.Fatal(err)
				}
				expectClean(t, f.Bytes())
			})
		}
	}
}
