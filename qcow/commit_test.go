package qcow_test

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// committed returns what a file of the chain should hold when the last image was committed into it, and it held this before.
func (c *chain) committed(before []byte) []byte {
	after := make([]byte, max(len(before), len(c.want)))
	copy(after, before)
	copy(after, c.want)
	return after
}

// iotests 019, 020, 097, 098 and 274: chains of every shape are committed into every file of theirs. It holds then what the last image reads
// as, and what it had behind that; the last image reads as before, emptied or not.
func TestCommit(t *testing.T) {
	for name, layers := range chainShapes {
		if layers[0].kind == "compressed" && len(layers) < 2 {
			continue
		}
		for depth := 1; depth < len(layers); depth++ {
			for _, empty := range []bool{false, true} {
				if empty && depth > 1 {
					continue
				}
				for _, seed := range testSeeds(t, 1, 20) {
					t.Run(fmt.Sprintf("%s/depth=%d/empty=%v/seed=%d", name, depth, empty, seed), func(t *testing.T) {
						c := newChain(t, rand.New(rand.NewPCG(seed, 0)), layers...)
						commitCase(c, depth, empty)
					})
				}
			}
		}
	}
}

func commitCase(c *chain, depth int, empty bool) {
	t := c.t
	target := c.names[len(c.names)-1-depth]
	want := c.committed(c.content(target))
	others := c.below()
	delete(others, target)
	img := c.open(qcow.Options{CommitDepth: depth, ReserveBytes: 256 << 10})
	for range 5 {
		c.stepBeforeCommit(img)
	}
	want = c.committed(want)
	last := int64(0)
	err := img.Commit(t.Context(), qcow.CommitOptions{Empty: empty, Progress: func(done, total int64) {
		if done < last || done > total || total != img.Size() {
			t.Errorf("progress from %d to %d of %d", last, done, total)
		}
		last = done
	}})
	if err != nil {
		t.Fatal(err)
	}
	if last != img.Size() {
		t.Errorf("the last progress is %d", last)
	}
	expect(t, "disk", diskOf(t, img), c.want)
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	expect(t, "disk opened again", c.content(c.top()), c.want)
	expect(t, "the file committed to", c.content(target), want)
	if entries := entriesOf(t, c.files[c.top()]); empty != (len(entries) == 0) {
		t.Errorf("%d entries are left in the image", len(entries))
	}
	for name, want := range others {
		expect(t, name, contentOf(t, c.files[name]), want)
	}
	c.expectQEMU()
	img = c.open(qcow.Options{})
	for range 20 {
		c.step(img)
	}
	expect(t, "disk after requests", diskOf(t, img), c.want)
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	c.expectQEMU()
}

// stepBeforeCommit writes or zeroes something.
func (c *chain) stepBeforeCommit(img *qcow.Image) {
	c.t.Helper()
	n := (c.rng.Int64N(img.Size()/8) + sector) / sector * sector
	off := c.rng.Int64N(img.Size()-n+1) / sector * sector
	if c.rng.IntN(3) == 0 {
		clear(c.want[off:][:n])
		if err := img.WriteZeroes(off, n, true); err != nil {
			c.t.Fatal(err)
		}
		return
	}
	p := noise(c.rng, n)
	copy(c.want[off:], p)
	writeAt(c.t, img, p, off)
}

// QEMU's commit of the same chain leaves the same behind.
func TestCommitAsQEMU(t *testing.T) {
	require.Tool(t, "qemu-img")
	for name, layers := range chainShapes {
		if slices.ContainsFunc(layers, func(l layer) bool { return l.kind == "luks" }) {
			continue
		}
		for depth := 1; depth < len(layers); depth++ {
			t.Run(fmt.Sprintf("%s/depth=%d", name, depth), func(t *testing.T) {
				c := newChain(t, rand.New(rand.NewPCG(11, 0)), layers...)
				target := c.names[len(c.names)-1-depth]
				dir := c.store()
				run(t, "qemu-img", "commit", "-q", "-f", "qcow2", "-d", "-b", filepath.Join(dir, target), filepath.Join(dir, c.top()))
				img := c.open(qcow.Options{CommitDepth: depth})
				if err := img.Commit(t.Context(), qcow.CommitOptions{}); err != nil {
					t.Fatal(err)
				}
				if err := img.Close(); err != nil {
					t.Fatal(err)
				}
				form := formatOf(c.kinds[len(c.names)-1-depth])
				if form == "raw" { // QEMU lets raw files end with a sector
					got, want := contentOf(t, c.files[target]), readFile(t, filepath.Join(dir, target))
					n := max(len(got), len(want))
					expect(t, "raw file", append(got, make([]byte, n-len(got))...), append(want, make([]byte, n-len(want))...))
					return
				}
				writeFile(t, filepath.Join(dir, "ours"), contentOf(t, c.files[target]))
				run(t, "qemu-img", "compare", "-f", form, "-F", form, filepath.Join(dir, "ours"), filepath.Join(dir, target))
				if got, want := sizeOf(t, filepath.Join(dir, "ours")), sizeOf(t, filepath.Join(dir, target)); got != want {
					t.Errorf("%d bytes, QEMU's has %d", got, want)
				}
			})
		}
	}
}

// sizeOf returns the virtual size of the image at path.
func sizeOf(t *testing.T, path string) uint64 {
	t.Helper()
	h, err := format.DecodeHeader(readFile(t, path))
	if err != nil {
		t.Fatal(err)
	}
	return h.Size
}

// A commit writes what the image has, and nothing else: the rest of the file is not touched.
func TestCommitTouchesLittle(t *testing.T) {
	base := storage.NewRecorder(storage.NewMemoryFrom(repeated(1, 1<<20)))
	f := files{"base": base, "top": overlay(t, qcow.CreateOptions{Size: 1 << 20, ClusterSize: 4096}, "base", "raw")}
	img := open(t, f["top"], qcow.Options{Gate: f.gate, CommitDepth: 1})
	writeAt(t, img, repeated(2, 4096), 8192)
	writeAt(t, img, make([]byte, 8192), 64<<10)
	if err := img.Discard(512<<10, 256<<10); err != nil {
		t.Fatal(err)
	}
	if err := img.Commit(t.Context(), qcow.CommitOptions{}); err != nil {
		t.Fatal(err)
	}
	want := []string{"write 0x2000+0x1000", "punch 0x10000+0x2000", "punch 0x80000+0x40000", "sync"}
	var got []string
	for _, op := range base.Ops() {
		got = append(got, op.String())
	}
	if !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestCommitRefused(t *testing.T) {
	layers := []layer{{kind: "raw", size: 8192}, {size: 8192}, {size: 8192}}
	c := newChain(t, rand.New(rand.NewPCG(1, 1)), layers...)
	below := c.below()
	try := func(what string, o qcow.Options, commit qcow.CommitOptions, class error) {
		t.Helper()
		img := c.open(o)
		expectClass(t, what, img.Commit(t.Context(), commit), class)
		if err := img.Close(); err != nil {
			t.Fatal(err)
		}
		expectClass(t, what+", closed", img.Commit(t.Context(), commit), qcow.ErrClosed)
	}
	try("without a depth", qcow.Options{}, qcow.CommitOptions{}, qcow.ErrInvalid)
	try("a depth that there is not", qcow.Options{CommitDepth: 3}, qcow.CommitOptions{}, qcow.ErrInvalid)
	try("empty with an image between", qcow.Options{CommitDepth: 2}, qcow.CommitOptions{Empty: true}, qcow.ErrInvalid)
	try("a read-only image", qcow.Options{CommitDepth: 1, ReadOnly: true}, qcow.CommitOptions{}, qcow.ErrReadOnly)
	for name, want := range below {
		if name != "1.qcow2" { // opened for writing
			expect(t, name, contentOf(t, c.files[name]), want)
		}
	}
	snapshot := func(name string, on bool) {
		img := open(t, c.files[name], qcow.Options{Gate: c.files.gate})
		var err error
		if on {
			_, err = img.CreateSnapshot(t.Context(), "s", time.Unix(1, 0))
		} else {
			err = img.DeleteSnapshot(t.Context(), "s")
		}
		if err != nil {
			t.Fatal(err)
		}
		if err := img.Close(); err != nil {
			t.Fatal(err)
		}
	}
	snapshot("2.qcow2", true)
	try("an image with a snapshot", qcow.Options{CommitDepth: 1}, qcow.CommitOptions{}, qcow.ErrInvalid)
	snapshot("2.qcow2", false)
	snapshot("1.qcow2", true)
	try("an image between with a snapshot", qcow.Options{CommitDepth: 2}, qcow.CommitOptions{}, qcow.ErrInvalid)
	// The file that is written into may have some: they keep what they have.
	commitCase(c, 1, true)
	img := open(t, c.files["1.qcow2"], qcow.Options{ReadOnly: true, Snapshot: "s", Gate: c.files.gate})
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
}

// A commit that is cancelled can be done again; meanwhile nothing reads otherwise.
func TestCommitCancelled(t *testing.T) {
	c := newChain(t, rand.New(rand.NewPCG(4, 4)), layer{kind: "raw", size: 64 << 10}, layer{size: 64 << 10}, layer{size: 64 << 10})
	img := c.open(qcow.Options{CommitDepth: 1})
	ctx, cancel := context.WithCancel(t.Context())
	calls := 0
	err := img.Commit(ctx, qcow.CommitOptions{Empty: true, Progress: func(int64, int64) {
		if calls++; calls == 3 {
			cancel()
		}
	}})
	expectClass(t, "commit", err, context.Canceled)
	expectClass(t, "commit", img.Commit(ctx, qcow.CommitOptions{}), context.Canceled)
	expect(t, "disk", diskOf(t, img), c.want)
	c.stepBeforeCommit(img) // writers go on
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	c.expectQEMU()
	commitCase(c, 1, true)
}

// Requests wait for a commit, or read on, and lose nothing.
func TestConcurrentCommit(t *testing.T) {
	const owners, each, shared = 4, 20<<10 + 300, 8 << 10
	for _, seed := range testSeeds(t, 3, 60) {
		rng := rand.New(rand.NewPCG(seed, 9))
		size := (int64(shared+owners*each)/sector + 1) * sector
		c := newChain(t, rng, layer{kind: "raw", size: size})
		raw := contentOf(t, c.files["0.raw"])
		clear(raw[:shared])
		f := files{"base": storage.NewMemoryFrom(raw), "top": overlay(t, qcow.CreateOptions{Size: size, ClusterSize: 1024}, "base", "raw")}
		img := open(t, restless(f["top"]), qcow.Options{Gate: f.gate, CommitDepth: 1, CacheBytes: 1})
		tr := newTraffic(t, img, seed, owners, each, shared)
		for _, o := range tr.owners {
			copy(o.want, raw[o.start:])
		}
		stop := make(chan struct{})
		var wg sync.WaitGroup
		wg.Go(func() {
			for i := 0; ; i++ {
				if err := img.Commit(t.Context(), qcow.CommitOptions{Empty: i%2 == 0}); err != nil {
					t.Errorf("commit: %v", err)
					return
				}
				select {
				case <-stop:
					return
				default:
				}
			}
		})
		tr.run(100)
		close(stop)
		wg.Wait()
		if err := img.Commit(t.Context(), qcow.CommitOptions{}); err != nil {
			t.Fatal(err)
		}
		content := diskOf(t, img)
		if err := img.Close(); err != nil {
			t.Fatal(err)
		}
		expect(t, "base", contentOf(t, f["base"]), content)
		again := open(t, f["top"], qcow.Options{Gate: f.gate, ReadOnly: true})
		for _, o := range tr.owners {
			if err := o.verify(again, 0, int64(len(o.want))); err != nil {
				t.Error(err)
			}
		}
		if err := again.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

var commitShapes = map[string]struct {
	layers []layer
	depth  int
	empty  bool
}{
	"raw":     {[]layer{{kind: "raw", size: 20 << 10}, {size: 32 << 10, cluster: 2048}}, 1, true},
	"qcow2":   {[]layer{{size: 32 << 10, cluster: 4096}, {size: 32 << 10, cluster: 1024}}, 1, true},
	"growing": {[]layer{{size: 12 << 10, cluster: 1024}, {size: 20 << 10, cluster: 2048}}, 1, true},
	"through": {[]layer{{size: 32 << 10, cluster: 2048}, {size: 20 << 10, cluster: 1024}, {size: 28 << 10, cluster: 2048}}, 2, false},
	"old":     {[]layer{{kind: "v2", size: 24 << 10, cluster: 2048}, {kind: "v2", size: 24 << 10, cluster: 1024}}, 1, true},
}

// commitCrash records requests, a commit, and some more. When the commit has returned its target holds what it should, whatever happens.
func commitCrash(t *testing.T, seed uint64, name string) *chainCrash {
	t.Helper()
	x := commitShapes[name]
	top := len(x.layers) - 1
	w := newChainCrash(t, seed, slices.Clone(x.layers), []int{top - x.depth, top}, qcow.Options{CommitDepth: x.depth, ReserveBytes: 8 << 10})
	for range 8 {
		w.random()
	}
	want := diskOf(t, w.img)
	e := w.do("commit", func() error { return w.img.Commit(t.Context(), qcow.CommitOptions{Empty: x.empty}) })
	// What was there is durable when it returns, in the target or, where it keeps that, in the image.
	if x.empty {
		w.flushes = append(w.flushes, e)
	}
	w.also = func(s *storage.GroupCrashState, f files) error {
		if s.Issued < e.end {
			return nil
		}
		got, err := readChain(f, w.names[0], w.kinds[w.names[0]] == "raw")
		if err != nil || len(got) < len(want) || !bytes.Equal(got[:len(want)], want) {
			return fmt.Errorf("the file that was committed to has something else: %w", err)
		}
		return nil
	}
	for range 4 {
		w.random()
	}
	w.do("close", w.img.Close)
	return w
}

// readChain returns what a file of a chain reads as.
func readChain(f files, name string, raw bool) ([]byte, error) {
	if raw {
		size, err := f[name].Size()
		b := make([]byte, size)
		if err == nil {
			_, err = f[name].ReadAt(b, 0)
		}
		return b, err
	}
	img, err := qcow.Open(f[name], qcow.Options{ReadOnly: true, Gate: f.gate})
	if err != nil {
		return nil, err
	}
	b := make([]byte, img.Size())
	_, err = img.ReadAt(b, 0)
	return b, err
}

// TestCrashCommit enumerates what a crash leaves of a commit: no byte of the disk is lost, and both files are valid.
func TestCrashCommit(t *testing.T) {
	require.Tool(t, "qemu-img")
	seeds := uint64(4)
	if long() {
		seeds = 40
	}
	total := 0
	for name := range commitShapes {
		for seed := range seeds {
			t.Run(fmt.Sprintf("%s/seed=%d", name, seed), func(t *testing.T) {
				total += commitCrash(t, seed, name).run(crashOptions(seed), 60)
			})
		}
	}
	t.Logf("%d states", total)
}

// The enumeration finds it when the image is emptied before the target is durable.
func TestCrashCommitFindsMissingSyncs(t *testing.T) {
	for name, x := range commitShapes {
		if !x.empty {
			continue
		}
		t.Run(name, func(t *testing.T) {
			w := commitCrash(t, 1, name)
			ops := w.group.Ops()
			last := -1
			for i, op := range ops {
				if op.Kind == storage.OpSync && op.File == 0 && i < w.flushes[len(w.flushes)-1].end {
					last = i
				}
			}
			if last < 0 {
				t.Fatal("the target was never synced")
			}
			ops[last] = storage.Op{Kind: storage.OpMark, Mark: "no sync"}
			n, err := w.states(ops, crashOptions(0), 1<<30)
			if err == nil && stride == 1 {
				t.Fatalf("none of %d states shows that a sync is missing", n)
			}
			t.Logf("state %d: %v", n, err)
		})
	}
}

// TestFaultCommit lets the k-th change of the image, and of the file that it is committed to, fail.
func TestFaultCommit(t *testing.T) {
	for _, kind := range []string{"raw", ""} {
		for faulty := range 2 {
			layers := []layer{{kind: kind, size: 30 << 10}, {size: 40 << 10, cluster: 1024}}
			eachFault(t, layers, faulty, qcow.Options{CommitDepth: 1, ReserveBytes: 8 << 10}, func(_ *chain, img *qcow.Image) error {
				return img.Commit(t.Context(), qcow.CommitOptions{Empty: true})
			})
		}
	}
}
