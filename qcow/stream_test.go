package qcow_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/check"
	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// expectChain holds the names of an image's backing files, and what its header says at rest, against what they should be.
func (c *chain) expectChain(img *qcow.Image, want ...string) {
	c.t.Helper()
	var got []string
	for _, f := range img.Chain() {
		got = append(got, f.Name)
	}
	if !slices.Equal(got, want) {
		c.t.Fatalf("chain %q, want %q", got, want)
	}
	h, err := format.DecodeHeader(contentOf(c.t, c.files[c.top()]))
	if err != nil {
		c.t.Fatal(err)
	}
	name, form := "", ""
	if len(want) > 0 {
		name = want[0]
		form = formatOf(c.kinds[slices.Index(c.names, name)])
	}
	if h.BackingFile != name || h.BackingFormat() != form {
		c.t.Fatalf("the header names %q, %q", h.BackingFile, h.BackingFormat())
	}
}

// A stream down to any file of chains of every shape changes nothing that is read, and the image needs the files before that no more.
func TestStream(t *testing.T) {
	for name, layers := range chainShapes {
		for base := range len(layers) {
			for _, seed := range testSeeds(t, 1, 20) {
				t.Run(fmt.Sprintf("%s/base=%d/seed=%d", name, base, seed), func(t *testing.T) {
					c := newChain(t, rand.New(rand.NewPCG(seed, 0)), layers...)
					below := c.below()
					img := c.open(qcow.Options{ReserveBytes: 256 << 10})
					last := int64(0)
					err := img.Stream(t.Context(), qcow.StreamOptions{Base: base, Piece: 1, Progress: func(done, total int64) {
						if done < last || done > total || total != img.Size() {
							t.Errorf("progress from %d to %d of %d", last, done, total)
						}
						last = done
					}})
					if err != nil {
						t.Fatal(err)
					}
					if base != 1 && last != img.Size() {
						t.Errorf("the last progress is %d", last)
					}
					kept := layers[:0]
					var names []string
					if base > 0 {
						kept = layers[:len(layers)-base]
						names = slices.Clone(c.names[:len(kept)])
						slices.Reverse(names)
					}
					c.expectChain(img, names...)
					expect(t, "disk", diskOf(t, img), c.want)
					for range 20 {
						c.step(img)
					}
					expect(t, "disk after requests", diskOf(t, img), c.want)
					if err := img.Close(); err != nil {
						t.Fatal(err)
					}
					for name, want := range below {
						expect(t, name, contentOf(t, c.files[name]), want)
					}
					for _, name := range c.names[len(kept) : len(c.names)-1] {
						delete(c.files, name)
					}
					top := len(c.names) - 1
					c.names = append(slices.Clone(c.names[:len(kept)]), c.names[top])
					c.kinds = append(slices.Clone(c.kinds[:len(kept)]), c.kinds[top])
					c.expectQEMU()
				})
			}
		}
	}
}

// iotest 030: what the image or no file has is not touched: a stream makes clusters for data of backing files alone, and marks zeroes.
func TestStreamTakesWhatIsThere(t *testing.T) {
	const cluster = 64 << 10
	base := create(t, qcow.CreateOptions{Size: 1 << 40})
	change(t, base, func(img *qcow.Image) {
		writeAt(t, img, repeated(1, 2*cluster), 0)
		writeAt(t, img, repeated(1, cluster), 900<<30)
	})
	f := files{"base": base, "middle": overlay(t, qcow.CreateOptions{Size: 1 << 40}, "base", "qcow2")}
	img := open(t, f["middle"], qcow.Options{Gate: f.gate})
	writeAt(t, img, repeated(2, 512), 500<<30)
	if err := img.WriteZeroes(cluster, cluster, true); err != nil {
		t.Fatal(err)
	}
	if err := img.WriteZeroes(100<<30, 1<<30, true); err != nil { // says nothing new: there is nothing
		t.Fatal(err)
	}
	writeAt(t, img, make([]byte, cluster), 600<<30) // zeroes as data
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	for base, want := range map[int]map[uint64]bool{ // cluster: data or zero
		0: {0: true, 1: true, 500 << 30 / cluster: true, 900 << 30 / cluster: true},
		2: {1: false, 500 << 30 / cluster: true},
	} {
		f["top"] = overlay(t, qcow.CreateOptions{Size: 1 << 40}, "middle", "qcow2")
		img := open(t, f["top"], qcow.Options{Gate: f.gate})
		writeAt(t, img, repeated(3, cluster), 0)
		if err := img.Stream(t.Context(), qcow.StreamOptions{Base: base}); err != nil {
			t.Fatal(err)
		}
		if err := img.Close(); err != nil {
			t.Fatal(err)
		}
		want[0], want[600<<30/cluster] = true, false
		if base == 0 {
			want[1] = false // the middle one's zeroes are not the base's: unallocated is as good
			delete(want, 1)
		}
		for c, e := range entriesOf(t, f["top"]) {
			data, wanted := want[c]
			if !wanted || data != (e.L2Entry.Kind() == format.Data) {
				t.Errorf("base %d: cluster %d is %v", base, c, e.L2Entry.Kind())
			}
			delete(want, c)
		}
		if len(want) > 0 {
			t.Errorf("base %d: %v is missing", base, want)
		}
	}
}

// The base may be called otherwise in the header.
func TestStreamBaseName(t *testing.T) {
	c := newChain(t, rand.New(rand.NewPCG(1, 1)), layer{kind: "raw", size: 8192}, layer{size: 8192}, layer{size: 8192})
	img := c.open(qcow.Options{})
	err := img.Stream(t.Context(), qcow.StreamOptions{Base: 2, BaseName: "json:{}"})
	expectClass(t, "a name that is no path", err, qcow.ErrInvalid)
	if err := img.Stream(t.Context(), qcow.StreamOptions{Base: 2, BaseName: "./elsewhere"}); err != nil {
		t.Fatal(err)
	}
	if info := img.Info(); info.BackingFile != "./elsewhere" || info.BackingFormat != "raw" {
		t.Errorf("%+v", info)
	}
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	c.files["./elsewhere"] = c.files["0.raw"]
	delete(c.files, "0.raw")
	expect(t, "disk", c.content(c.top()), c.want)
}

func TestStreamRefused(t *testing.T) {
	c := newChain(t, rand.New(rand.NewPCG(1, 1)), layer{kind: "raw", size: 8192}, layer{size: 8192}, layer{size: 8192})
	img := c.open(qcow.Options{})
	for _, base := range []int{-1, 3, 1 << 40} {
		expectClass(t, "base", img.Stream(t.Context(), qcow.StreamOptions{Base: base}), qcow.ErrInvalid)
	}
	if _, err := img.CreateSnapshot(t.Context(), "s", time.Unix(1, 0)); err != nil {
		t.Fatal(err)
	}
	expectClass(t, "an image with a snapshot", img.Stream(t.Context(), qcow.StreamOptions{}), qcow.ErrInvalid)
	if err := img.DeleteSnapshot(t.Context(), "s"); err != nil {
		t.Fatal(err)
	}
	c.expectChain(img, "1.qcow2", "0.raw")
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	expectClass(t, "a closed image", img.Stream(t.Context(), qcow.StreamOptions{}), qcow.ErrClosed)
	read := c.open(qcow.Options{ReadOnly: true})
	expectClass(t, "a read-only image", read.Stream(t.Context(), qcow.StreamOptions{}), qcow.ErrReadOnly)
	if err := read.Close(); err != nil {
		t.Fatal(err)
	}
	alone := open(t, create(t, qcow.CreateOptions{Size: 512}), qcow.Options{})
	if err := alone.Stream(t.Context(), qcow.StreamOptions{}); err != nil { // nothing to do
		t.Error(err)
	}
	if err := alone.Close(); err != nil {
		t.Fatal(err)
	}
}

// A stream that is cancelled leaves an image as good as before, and the next one goes on where it was.
func TestStreamCancelled(t *testing.T) {
	c := newChain(t, rand.New(rand.NewPCG(5, 5)), layer{kind: "raw", size: 64 << 10}, layer{size: 64 << 10, cluster: 1024}, layer{size: 64 << 10, cluster: 1024})
	img := c.open(qcow.Options{})
	copied := map[string]int64{}
	streamed := func(ctx context.Context, what string, after int) error {
		return img.Stream(ctx, qcow.StreamOptions{Piece: 1024, Throttle: func(ctx context.Context, n int64) error {
			copied[what] += n
			if after--; after == 0 {
				return context.Canceled
			}
			return ctx.Err()
		}})
	}
	expectClass(t, "stream", streamed(t.Context(), "part", 3), context.Canceled)
	expect(t, "disk", diskOf(t, img), c.want)
	c.expectChain(img, "1.qcow2", "0.raw")
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	c.expectQEMU()
	img = c.open(qcow.Options{})
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	expectClass(t, "stream with a dead context", streamed(cancelled, "none", 0), context.Canceled)
	if err := streamed(t.Context(), "rest", 0); err != nil {
		t.Fatal(err)
	}
	if copied["none"] != 0 || copied["part"] == 0 || copied["rest"] == 0 || copied["part"]+copied["rest"] > 64<<10 {
		t.Errorf("copied %v", copied)
	}
	c.expectChain(img)
	expect(t, "disk", diskOf(t, img), c.want)
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
}

// Other operations on the image come between two pieces of a stream. A disk that is cut off and grows again, over zeroes of a file that is
// pulled in, does not show the base's data there.
func TestStreamBesideResize(t *testing.T) {
	const cluster = 1024
	f := files{"base": storage.NewMemoryFrom(repeated(1, 64<<10)), "middle": overlay(t, qcow.CreateOptions{Size: 64 << 10, ClusterSize: cluster}, "base", "raw")}
	img := open(t, f["middle"], qcow.Options{Gate: f.gate})
	if err := img.WriteZeroes(0, 32<<10, true); err != nil {
		t.Fatal(err)
	}
	writeAt(t, img, repeated(2, 16<<10), 40<<10)
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	top := overlay(t, qcow.CreateOptions{Size: 64 << 10, ClusterSize: cluster}, "middle", "qcow2")
	f["top"] = top
	img = open(t, top, qcow.Options{Gate: f.gate})
	want := append(make([]byte, 32<<10), repeated(1, 32<<10)...)
	copy(want[40<<10:], repeated(2, 16<<10))
	calls := 0
	err := img.Stream(t.Context(), qcow.StreamOptions{Base: 2, Piece: cluster, Throttle: func(ctx context.Context, _ int64) error {
		calls++
		if calls%7 == 0 && calls < 50 {
			cut := int64(60-calls) << 10
			if err := errors.Join(img.Resize(ctx, cut), img.Resize(ctx, 64<<10)); err != nil {
				return err
			}
			clear(want[cut:])
		}
		return nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	if calls < 32 {
		t.Errorf("%d pieces", calls)
	}
	expect(t, "disk", diskOf(t, img), want)
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	report, err := check.Check(t.Context(), top, check.Options{})
	if err != nil || !report.Clean() {
		t.Fatalf("check: %v, %v", report, err)
	}
}

// A stream does not outlive the image.
func TestCloseDuringStream(t *testing.T) {
	c := newChain(t, rand.New(rand.NewPCG(5, 5)), layer{kind: "raw", size: 64 << 10}, layer{size: 64 << 10})
	img := c.open(qcow.Options{})
	err := img.Stream(t.Context(), qcow.StreamOptions{Piece: 512, Throttle: func(context.Context, int64) error { return img.Close() }})
	expectClass(t, "stream", err, qcow.ErrClosed)
	c.expectQEMU()
}

// TestConcurrentStream lets many goroutines at an image while backing files are pulled into it.
func TestConcurrentStream(t *testing.T) {
	const owners, each, shared = 6, 20<<10 + 300, 16 << 10
	for _, kind := range []string{"", "extended"} {
		for _, base := range []int{0, 2} {
			for _, seed := range testSeeds(t, 2, 60) {
				t.Run(fmt.Sprintf("%s/base=%d/seed=%d", kind, base, seed), func(t *testing.T) {
					rng := rand.New(rand.NewPCG(seed, 9))
					size := (int64(shared+owners*each)/sector + 1) * sector
					c := newChain(t, rng, layer{kind: "raw", size: size}, layer{size: size - 9<<10, cluster: 1024})
					img := open(t, c.files["1.qcow2"], qcow.Options{Gate: c.files.gate})
					if err := img.WriteZeroes(0, shared, true); err != nil { // everybody writes there
						t.Fatal(err)
					}
					clear(c.want[:shared])
					if err := img.Close(); err != nil {
						t.Fatal(err)
					}
					l := layer{kind: kind, size: size}
					c.files["top"] = l.make(t)
					if err := qcow.RebaseUnsafe(c.files["top"], "1.qcow2", "qcow2"); err != nil {
						t.Fatal(err)
					}
					img = open(t, restless(c.files["top"]), qcow.Options{Gate: c.files.gate, CacheBytes: 1, ReserveBytes: 64 << 10})
					tr := newTraffic(t, img, seed, owners, each, shared)
					content := diskOf(t, img)
					for _, o := range tr.owners {
						copy(o.want, content[o.start:])
					}
					var wg sync.WaitGroup
					wg.Go(func() {
						if err := img.Stream(t.Context(), qcow.StreamOptions{Base: base, Piece: 2048}); err != nil {
							t.Errorf("stream: %v", err)
						}
					})
					tr.run(150)
					wg.Wait()
					tr.run(20)
					if got := len(img.Chain()); got != base/2 {
						t.Errorf("%d backing files", got)
					}
					if err := img.Close(); err != nil {
						t.Fatal(err)
					}
					again := open(t, c.files["top"], qcow.Options{Gate: c.files.gate, ReadOnly: true})
					for _, o := range tr.owners {
						if err := o.verify(again, 0, int64(len(o.want))); err != nil {
							t.Error(err)
						}
					}
					if err := tr.verifyShared(again, 0, shared); err != nil {
						t.Error(err)
					}
					if err := again.Close(); err != nil {
						t.Fatal(err)
					}
					report, err := check.Check(t.Context(), c.files["top"], check.Options{})
					if err != nil || !report.Clean() {
						t.Fatalf("check: %v, %v", report, err)
					}
				})
			}
		}
	}
}

// streamCrash records a stream with requests between its pieces, and some after it.
func streamCrash(t *testing.T, seed uint64, layers []layer, base int) *chainCrash {
	t.Helper()
	top := layers[len(layers)-1]
	w := newChainCrash(t, seed, layers, []int{len(layers) - 1}, qcow.Options{ReserveBytes: 8 * int64(max(top.cluster, 512))})
	for range 4 {
		w.random()
	}
	err := w.img.Stream(t.Context(), qcow.StreamOptions{Base: base, Piece: 2 * w.cluster, Throttle: func(context.Context, int64) error {
		w.random()
		return nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	done := len(w.group.Ops())
	w.also = func(s *storage.GroupCrashState, f files) error { // once it has returned, nothing refers to the files
		if s.Issued < done {
			return nil
		}
		h, err := format.DecodeHeader(contentOf(t, f[w.top]))
		if err == nil && h.BackingFile == w.base(len(layers), base) {
			return nil
		}
		return fmt.Errorf("the header names %q after the stream: %w", h.BackingFile, err)
	}
	for range 4 {
		w.random()
	}
	w.do("close", w.img.Close)
	return w
}

// base returns the name of the file at this depth below the last of n layers.
func (w *chainCrash) base(n, depth int) string {
	for name := range w.kinds {
		if depth > 0 && name[0] == byte('0'+n-1-depth) {
			return name
		}
	}
	return ""
}

var streamShapes = map[string]struct {
	layers []layer
	base   int
}{
	"all":         {[]layer{{kind: "raw", size: 20 << 10}, {size: 14 << 10}, {size: 24 << 10, cluster: 2048}}, 0},
	"base":        {[]layer{{kind: "raw", size: 20 << 10}, {size: 14 << 10}, {size: 24 << 10, cluster: 1024}}, 2},
	"old":         {[]layer{{kind: "raw", size: 20 << 10}, {size: 14 << 10}, {kind: "v2", size: 24 << 10, cluster: 2048}}, 2},
	"subclusters": {[]layer{{kind: "raw", size: 70 << 10}, {size: 60 << 10}, {kind: "extended", size: 80 << 10, cluster: 16 << 10}}, 2},
}

// TestCrashStream enumerates what a crash leaves of a stream with requests in between: the same content with the old chain or the new one.
func TestCrashStream(t *testing.T) {
	require.Tool(t, "qemu-img")
	seeds := uint64(4)
	if long() {
		seeds = 40
	}
	total := 0
	for name, x := range streamShapes {
		for seed := range seeds {
			t.Run(fmt.Sprintf("%s/seed=%d", name, seed), func(t *testing.T) {
				w := streamCrash(t, seed, slices.Clone(x.layers), x.base)
				total += w.run(crashOptions(seed), 60)
			})
		}
	}
	t.Logf("%d states", total)
}

// The enumeration finds it when the header changes before what was copied is durable.
func TestCrashStreamFindsMissingSyncs(t *testing.T) {
	for name, x := range streamShapes {
		t.Run(name, func(t *testing.T) {
			for seed := range uint64(10) {
				w := streamCrash(t, seed, slices.Clone(x.layers), x.base)
				ops := withoutHeaderSyncs(w)
				if n, err := w.states(ops, crashOptions(0), 1<<30); err != nil || stride > 1 {
					t.Logf("seed %d, state %d: %v", seed, n, err)
					return
				}
			}
			t.Fatal("no state shows that a sync is missing")
		})
	}
}

// withoutHeaderSyncs returns the log without the sync before the header cluster changes for the first time, and without those before it does
// for the last time.
func withoutHeaderSyncs(w *chainCrash) []storage.Op {
	ops := w.group.Ops()
	header := func(op storage.Op) bool { return op.Kind == storage.OpWrite && op.Offset < w.cluster }
	first, last := slices.IndexFunc(ops, header), len(ops)-1
	for !header(ops[last]) {
		last--
	}
	for first--; ops[first].Kind != storage.OpSync; first-- {
	}
	for i := first; i < last; i++ {
		if ops[i].Kind == storage.OpSync {
			ops[i] = storage.Op{Kind: storage.OpMark, Mark: "no sync"}
		}
	}
	return ops
}

// chainFaults are the ways in which the k-th change of a file fails.
var chainFaults = map[string]storage.Fault{
	"EIO once":             {Err: syscall.EIO},
	"EIO for ever":         {Err: syscall.EIO, Forever: true},
	"ENOSPC once":          {Err: fmt.Errorf("%w: %w", storage.ErrNoSpace, syscall.ENOSPC)},
	"ENOSPC for ever":      {Err: fmt.Errorf("%w: %w", storage.ErrNoSpace, syscall.ENOSPC), Forever: true},
	"short write once":     {Err: syscall.EIO, Short: true},
	"short write for ever": {Err: syscall.ENOSPC, Short: true, Forever: true},
}

// eachFault calls try with the k-th change of the named file failing, for every k until nothing fails any more. What is read stays the same,
// before and after the image was opened again, and the images stay valid.
func eachFault(t *testing.T, layers []layer, faulty int, o qcow.Options, try func(c *chain, img *qcow.Image) error) {
	t.Helper()
	total := 0
	for name, fault := range chainFaults {
		for at := 0; ; at += stride {
			c := newChain(t, rand.New(rand.NewPCG(7, 7)), slices.Clone(layers)...)
			fault.At = at
			target := c.names[faulty]
			sound := c.files[target]
			faults := storage.NewFaults(sound, &fault)
			c.files[target] = faults
			o.Gate = c.files.gate
			img, err := qcow.Open(c.files[c.top()], qcow.FilledByTakers(o))
			if err == nil {
				if err = try(c, img); err != nil && !errors.Is(err, fault.Err) {
					t.Fatalf("%s at %d surfaced as %v", name, at, err)
				}
				expect(t, fmt.Sprintf("%s at %d", name, at), diskOf(t, img), c.want)
				if closed := img.Close(); closed != nil && !errors.Is(closed, fault.Err) {
					t.Fatalf("%s at %d: close: %v", name, at, closed)
				}
			}
			_, injected := faults.Count()
			if injected > 0 && err == nil && fault.Forever && at < 3 {
				t.Fatalf("%s at %d was not noticed", name, at)
			}
			c.files[target] = sound
			for i, name := range c.names {
				if formatOf(c.kinds[i]) != "qcow2" {
					continue
				}
				report, err := check.Check(t.Context(), c.files[name], check.Options{})
				if err != nil || report.Corruptions > 0 {
					t.Fatalf("fault at %d: check %s: %v, %v", at, name, report, err)
				}
			}
			again := open(t, c.files[c.top()], qcow.Options{Gate: c.files.gate, CommitDepth: o.CommitDepth})
			expect(t, fmt.Sprintf("%s at %d, opened again", name, at), diskOf(t, again), c.want)
			if err := try(c, again); err != nil {
				t.Fatalf("%s at %d: without the fault: %v", name, at, err)
			}
			expect(t, fmt.Sprintf("%s at %d, done again", name, at), diskOf(t, again), c.want)
			if err := again.Close(); err != nil {
				t.Fatal(err)
			}
			if injected == 0 {
				break
			}
			total += injected
		}
	}
	t.Logf("%d faults", total)
}

// TestFaultStream lets the k-th change of the image fail while backing files are pulled in.
func TestFaultStream(t *testing.T) {
	for _, kind := range []string{"", "extended"} {
		layers := []layer{{kind: "raw", size: 40 << 10}, {size: 30 << 10, cluster: 1024}, {kind: kind, size: 48 << 10}}
		eachFault(t, layers, 2, qcow.Options{ReserveBytes: 8 << 10}, func(_ *chain, img *qcow.Image) error {
			return img.Stream(t.Context(), qcow.StreamOptions{Base: min(2, len(img.Chain())), Piece: 8 << 10})
		})
	}
}

// QEMU's own stream of the same chain reads the same.
func TestStreamInQEMU(t *testing.T) {
	require.Tool(t, "qemu-img")
	c := newChain(t, rand.New(rand.NewPCG(2, 2)), layer{kind: "raw", size: 100000}, layer{size: 64 << 10, cluster: 4096}, layer{size: 128 << 10, cluster: 2048})
	dir := c.store()
	run(t, "qemu-img", "rebase", "-f", "qcow2", "-b", "", filepath.Join(dir, c.top()))
	img := c.open(qcow.Options{})
	if err := img.Stream(t.Context(), qcow.StreamOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(dir, "ours"), contentOf(t, c.files[c.top()]))
	run(t, "qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", filepath.Join(dir, "ours"), filepath.Join(dir, c.top()))
}
