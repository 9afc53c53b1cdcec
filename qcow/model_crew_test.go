package qcow_test

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/require"
	"github.com/qcow-csi/qcow-csi/test/seed"
)

// TestModelConcurrent lets many goroutines work on one image while snapshots are made and applied, the disk gets other sizes, the file is
// compacted, and backing files are committed to and pulled in. Whatever is read is something that may be there; each snapshot is one moment
// of the disk.
func TestModelConcurrent(t *testing.T) {
	require.Tool(t, "qemu-img")
	kinds := []string{
		"cluster=512/refcount=16", "cluster=512/refcount=64", "cluster=4096/refcount=8", "cluster=65536/refcount=16", "version2-over-short", "subclusters",
		"subclusters-over-raw", "short-raw", "deep", "encrypted-subclusters", "data-file-raw", "data-file-subclusters",
	}
	base := seed.Of(t)
	for _, k := range modelKinds() {
		if !slices.Contains(kinds, k.name) {
			continue
		}
		seeds := uint64(1)
		if long() {
			seeds = 20
		}
		for seed := base; seed < base+seeds; seed++ {
			t.Run(fmt.Sprintf("%s/seed=%d", k.name, seed), func(t *testing.T) {
				replay := fmt.Sprintf("QCOW_CSI_SEED=%d go test -run '^TestModelConcurrent$/^%s$' ./qcow", seed, strings.ReplaceAll(k.name, "/", "$/^"))
				t.Logf("%d requests", runCrew(t, k, rand.New(rand.NewPCG(seed, 11)), replay))
			})
		}
	}
}

// A crew is hands at work on an image, and what is done to it as a whole meanwhile.
type crew struct {
	*model
	t     *testing.T
	rng   *rand.Rand
	clock atomic.Uint64
	hands []*hand
	work  *traffic // what the hands fight for
	area  int64    // bytes in which they work

	kept    []keptDisk
	dirty   []*crewBitmap
	made    int
	open    bool // the image has the backing file that may be committed to, for sure
	streams sync.WaitGroup
	hurdles atomic.Int64 // what may have stopped a stream
	stop    atomic.Bool
}

// runCrew lets a crew work on an image of the kind, and returns how many requests it did.
func runCrew(t *testing.T, k modelKind, rng *rand.Rand, replay string) uint64 {
	t.Helper()
	const hands = 4
	k.o.ClusterSize = min(max(k.o.ClusterSize, sector), 64<<10)
	k.o.RefcountBits = max(k.o.RefcountBits, 8) // room for every snapshot
	if k.o.Version == 2 {
		k.o.RefcountBits = 0
	}
	cluster := int64(k.o.ClusterSize)
	each, shared := min(30*cluster, 100<<10)+cluster/3/sector*sector, min(12*cluster, 64<<10)
	if !k.luks {
		each += 100
	}
	c := &crew{t: t, rng: rng, area: shared + hands*each}
	k.o.Size = (c.area + sector - 1 + sector*rng.Int64N(200)) / sector * sector
	c.model = newModel(t.Context(), k.start(t, rng), false)
	c.open = len(c.chain) > 0
	open := qcow.Options{
		Gate: c.files.gate, Passphrase: []byte(passphrase), CacheBytes: 1, ReserveBytes: 8 * cluster, CommitDepth: min(len(c.chain), 1), DetectZeroes: rng.IntN(3) == 0,
	}
	if c.journal != nil {
		open.Journal = c.journal
	}
	img, err := qcow.Open(restless(c.file()), open)
	if err != nil {
		t.Fatal(err)
	}
	c.img, c.work = img, &traffic{t: t, img: img, shared: shared}
	do(t, img.WriteZeroes(0, shared, true))
	for i := range int64(hands) {
		o := &owner{traffic: c.work, id: uint64(i + 1), rng: rand.New(rand.NewPCG(rng.Uint64(), 0)), start: shared + i*each}
		c.work.owners = append(c.work.owners, o)
		part := c.want[o.start:][:each]
		c.hands = append(c.hands, &hand{owner: o, c: c, size: each, pasts: []past{{base: slices.Clone(part), now: slices.Clone(part), since: window{0, math.MaxUint64}}}})
	}
	if err := c.run(); err != nil {
		t.Fatalf("%v\n%s\n%+v", err, replay, k)
	}
	return c.clock.Load() / 2
}

// run lets the hands work while it does something to the image again and again.
func (c *crew) run() error {
	var wg sync.WaitGroup
	errs := make([]error, len(c.hands))
	for i, h := range c.hands {
		wg.Go(func() {
			for n := uint64(0); !c.stop.Load() && errs[i] == nil; n++ {
				errs[i] = h.request(n)
			}
			c.stop.Store(true)
		})
	}
	steps := 30
	if long() {
		steps = 300
	}
	var err error
	for i := 0; i < steps && err == nil && !c.stop.Load(); i++ {
		what := c.rng.IntN(len(upkeep))
		if err = upkeep[what].do(c); err != nil {
			err = fmt.Errorf("%s: %w", upkeep[what].what, err)
		}
		for target := c.clock.Load() + c.rng.Uint64N(60); c.clock.Load() < target && !c.stop.Load(); {
			runtime.Gosched()
		}
	}
	c.stop.Store(true)
	wg.Wait()
	c.streams.Wait()
	if err := errors.Join(append(errs, err)...); err != nil {
		return err
	}
	return c.finish()
}

// finish holds the image that nobody works on any more against what must be in it, closes it, and asks QEMU.
func (c *crew) finish() error {
	c.chain = nil
	for _, f := range c.img.Chain() {
		c.chain = append(c.chain, f.Name)
	}
	for _, at := range []string{"at last", "closed"} {
		begun := c.settle()
		content, err := c.read(modelImage, "")
		if err != nil {
			return fmt.Errorf("%s: %w", at, err)
		}
		if err := errors.Join(c.isMoment(content, window{begun, c.clock.Add(1)}), c.lookBack(), c.checkBitmaps()); err != nil {
			return fmt.Errorf("%s: %w", at, err)
		}
		c.want = content
		if at == "at last" {
			if err := c.close(); err != nil {
				return err
			}
			if c.img, err = qcow.Open(c.file(), c.options()); err != nil {
				return err
			}
			c.dirty = slices.DeleteFunc(c.dirty, func(b *crewBitmap) bool { return b.transient })
		}
	}
	if err := c.close(); err != nil {
		return err
	}
	c.disks.kept = c.kept
	return c.askQEMU(c.t.TempDir())
}

// settle forgets what the hands have done so far, and returns the time.
func (c *crew) settle() uint64 {
	for _, h := range c.hands {
		h.settle(func(d *deed) {
			for _, b := range c.dirty {
				if d.begun > b.since && d.n > 0 {
					b.must.note(h.start+d.off, d.n)
				}
			}
		})
	}
	return c.clock.Add(1)
}

// read returns the disk, or the one in a snapshot, from an image file as it is at this moment, up to the end of the area at least. With the disk
// of the image itself, for which nobody works then, goes what is in the journal.
func (c *crew) read(name, snapshot string) ([]byte, error) {
	o := c.options()
	o.ReadOnly, o.Snapshot = true, snapshot
	if name == modelImage && snapshot == "" && c.journal != nil {
		o.ReadOnly, o.Journal = false, c.journal.copied()
	}
	img, err := qcow.Open(storage.NewMemoryFrom(c.files[name].(*storage.Memory).Bytes()), o)
	if err != nil {
		return nil, err
	}
	if img.Size() < c.area {
		return nil, fmt.Errorf("%s has %d bytes", name, img.Size())
	}
	content := make([]byte, img.Size())
	_, err = img.ReadAt(content, 0)
	return content, err
}

// isMoment expects that content is what the disk was at some moment in a window, since when the crew has not settled.
func (c *crew) isMoment(content []byte, in window) error {
	var when, since [][]window
	for _, h := range c.hands {
		w, s := h.match(content[h.start:][:h.size], in)
		if len(w) == 0 {
			return fmt.Errorf("the part of hand %d is not what it was at any moment", h.id)
		}
		when, since = append(when, w), append(since, s)
	}
	switch {
	case !meet(when):
		return fmt.Errorf("what the hands see are different moments: %v", when)
	case !meet(since):
		return fmt.Errorf("a snapshot was applied to the hands at different moments: %v", since)
	}
	return c.legalShared(content)
}

// legalShared expects that each sector that the hands fight for is as one of them wrote it.
func (c *crew) legalShared(content []byte) error {
	for off := int64(0); off < c.work.shared; off += sector {
		if err := c.work.legal(content[off:][:sector], off); err != nil {
			return err
		}
	}
	return nil
}
