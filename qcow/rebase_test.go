package qcow_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/check"
	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// The files that an image is rebased onto.
var rebaseTargets = map[string][]layer{
	"nothing": nil,
	"raw":     {{kind: "raw", size: 50001}},
	"long":    {{kind: "raw", size: 400000}},
	"qcow2":   {{size: 90 << 10, cluster: 2048}},
	"chain":   {{kind: "raw", size: 200 << 10}, {size: 60 << 10, cluster: 1024}, {size: 130 << 10}},
	"secret":  {{kind: "luks", size: 72 << 10, cluster: 4096}},
}

// rename gives the files of a chain that is made apart other names.
func (c *chain) rename() {
	c.t.Helper()
	for i, name := range c.names {
		now := "new" + name
		c.files[now] = c.files[name]
		delete(c.files, name)
		if c.names[i] = now; i > 0 {
			if err := qcow.RebaseUnsafe(c.files[now], c.names[i-1], formatOf(c.kinds[i-1])); err != nil {
				c.t.Fatal(err)
			}
		}
	}
}

// join makes the last image of c stand on another chain, as far as the names are concerned.
func (c *chain) join(other *chain) {
	top, kind := c.top(), c.kinds[len(c.kinds)-1]
	maps.Copy(c.files, other.files)
	for _, name := range c.names[:len(c.names)-1] {
		delete(c.files, name)
	}
	c.names, c.kinds = slices.Concat(other.names, []string{top}), slices.Concat(other.kinds, []string{kind})
}

// iotests 024, 050 and 252: images of every shape are rebased onto other files, or none. They read as before, and as QEMU's rebase leaves them.
func TestRebase(t *testing.T) {
	for name, layers := range chainShapes {
		for target, onto := range rebaseTargets {
			for _, seed := range testSeeds(t, 1, 10) {
				t.Run(fmt.Sprintf("%s/onto=%s/seed=%d", name, target, seed), func(t *testing.T) {
					rng := rand.New(rand.NewPCG(seed, 0))
					c := newChain(t, rng, layers...)
					other := newChain(t, rng, onto...)
					other.rename()
					o := qcow.RebaseOptions{Passphrase: []byte(passphrase), Gate: other.files.gate}
					if len(onto) > 0 {
						o.BackingFile, o.BackingFormat = other.top(), formatOf(other.kinds[len(onto)-1])
					}
					last := int64(0)
					o.Progress = func(done, total int64) {
						if done < last || done > total || total != int64(len(c.want)) {
							t.Errorf("progress from %d to %d of %d", last, done, total)
						}
						last = done
					}
					img := c.open(qcow.Options{ReserveBytes: 256 << 10})
					if err := img.Rebase(t.Context(), o); err != nil {
						t.Fatal(err)
					}
					if last != img.Size() {
						t.Errorf("the last progress is %d", last)
					}
					c.join(other)
					var names []string
					for _, name := range slices.Backward(other.names) {
						names = append(names, name)
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
					c.expectQEMU()
				})
			}
		}
	}
}

// An image without a backing file gets one, and hides it where it has nothing, unless both are zero.
func TestRebaseFromNothing(t *testing.T) {
	for _, kind := range []string{"", "v2", "extended"} {
		c := newChain(t, rand.New(rand.NewPCG(3, 3)), layer{kind: kind, size: 192 << 10})
		c.files["base"] = storage.NewMemoryFrom(append(repeated(1, 64<<10), make([]byte, 64<<10)...))
		img := c.open(qcow.Options{})
		if err := img.Discard(0, 32<<10); err != nil {
			t.Fatal(err)
		}
		clear(c.want[:32<<10])
		if err := img.Rebase(t.Context(), qcow.RebaseOptions{BackingFile: "base", BackingFormat: "raw", Gate: c.files.gate}); err != nil {
			t.Fatal(err)
		}
		expect(t, kind+": disk", diskOf(t, img), c.want)
		if err := img.Close(); err != nil {
			t.Fatal(err)
		}
		expect(t, kind+": disk opened again", c.content(c.top()), c.want)
		for cluster, e := range entriesOf(t, c.files[c.top()]) {
			if at := int64(cluster) * 16 << 10; kind == "extended" && at >= 64<<10 && e.Subclusters&format.AllZero != 0 && isZeroes(c.want[at:at+16<<10]) && e.L2Entry == 0 {
				t.Errorf("cluster %d is marked for nothing: %#x", cluster, uint64(e.Subclusters))
			}
		}
	}
}

func isZeroes(b []byte) bool { return len(bytes.Trim(b, "\x00")) == 0 }

// What is alike in both chains is not copied.
func TestRebaseCopiesLittle(t *testing.T) {
	base := noise(rand.New(rand.NewPCG(1, 1)), 1<<20)
	other := bytes.Clone(base)
	other[300<<10] ^= 1
	clear(other[500<<10:][:8<<10])
	f := files{"base": storage.NewMemoryFrom(base), "other": storage.NewMemoryFrom(other)}
	top := overlay(t, qcow.CreateOptions{Size: 2 << 20, ClusterSize: 4096}, "base", "raw")
	img := open(t, top, qcow.Options{Gate: f.gate})
	if err := img.Rebase(t.Context(), qcow.RebaseOptions{BackingFile: "other", BackingFormat: "raw", Gate: f.gate}); err != nil {
		t.Fatal(err)
	}
	expect(t, "disk", diskOf(t, img), append(bytes.Clone(base), make([]byte, 1<<20)...))
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	entries := entriesOf(t, top)
	if len(entries) != 3 || entries[75].L2Entry.Kind() != format.Data || entries[125].L2Entry.Kind() != format.Data || entries[126].L2Entry.Kind() != format.Data {
		t.Errorf("entries %v", entries)
	}
}

func TestRebaseRefused(t *testing.T) {
	c := newChain(t, rand.New(rand.NewPCG(1, 1)), layer{kind: "raw", size: 8192}, layer{size: 8192})
	c.files["garbage"] = storage.NewMemoryFrom(repeated(3, 4096))
	img := c.open(qcow.Options{})
	for what, x := range map[string]struct {
		o     qcow.RebaseOptions
		class error
	}{
		"no gate":              {qcow.RebaseOptions{BackingFile: "0.raw", BackingFormat: "raw"}, qcow.ErrUnsupported},
		"no format":            {qcow.RebaseOptions{BackingFile: "0.raw", Gate: c.files.gate}, qcow.ErrInvalid},
		"a format alone":       {qcow.RebaseOptions{BackingFormat: "raw", Gate: c.files.gate}, qcow.ErrInvalid},
		"another format":       {qcow.RebaseOptions{BackingFile: "0.raw", BackingFormat: "vmdk", Gate: c.files.gate}, qcow.ErrInvalid},
		"a protocol":           {qcow.RebaseOptions{BackingFile: "nbd:x", BackingFormat: "raw", Gate: c.files.gate}, qcow.ErrInvalid},
		"a long name":          {qcow.RebaseOptions{BackingFile: strings.Repeat("x", 1024), BackingFormat: "raw", Gate: c.files.gate}, qcow.ErrInvalid},
		"no room in a cluster": {qcow.RebaseOptions{BackingFile: strings.Repeat("x", 500), BackingFormat: "raw", Gate: c.files.gate}, qcow.ErrInvalid},
		"not an image":         {qcow.RebaseOptions{BackingFile: "garbage", BackingFormat: "qcow2", Gate: c.files.gate}, qcow.ErrCorrupt},
	} {
		expectClass(t, what, img.Rebase(t.Context(), x.o), x.class)
		expect(t, what, diskOf(t, img), c.want)
		c.expectChain(img, "0.raw")
	}
	if _, err := img.CreateSnapshot(t.Context(), "s", time.Unix(1, 0)); err != nil {
		t.Fatal(err)
	}
	expectClass(t, "an image with a snapshot", img.Rebase(t.Context(), qcow.RebaseOptions{}), qcow.ErrInvalid)
	if err := img.DeleteSnapshot(t.Context(), "s"); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	expectClass(t, "rebase", img.Rebase(ctx, qcow.RebaseOptions{Progress: func(int64, int64) { cancel() }}), context.Canceled)
	expectClass(t, "rebase", img.Rebase(ctx, qcow.RebaseOptions{}), context.Canceled)
	expect(t, "disk", diskOf(t, img), c.want)
	c.expectChain(img, "0.raw")
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	expectClass(t, "closed", img.Rebase(t.Context(), qcow.RebaseOptions{}), qcow.ErrClosed)
	c.expectQEMU()
}

// The unsafe rebase changes the header and nothing else: not even whether the files exist is asked.
func TestRebaseUnsafe(t *testing.T) {
	clusters := map[string]int{"": 2048, "v2": 4096, "extended": 16 << 10, "luks": 4096}
	for kind := range clusters {
		c := newChain(t, rand.New(rand.NewPCG(1, 1)), layer{kind: kind, size: 72 << 10, cluster: clusters[kind]})
		f := c.files[c.top()]
		before := contentOf(t, f)
		h, err := format.DecodeHeader(before)
		if err != nil {
			t.Fatal(err)
		}
		for _, x := range [][2]string{{"a", "raw"}, {strings.Repeat("b", 1023), "qcow2"}, {"c", "raw"}, {"c", "raw"}, {"", ""}, {"", ""}} {
			if err := qcow.RebaseUnsafe(f, x[0], x[1]); err != nil {
				t.Fatalf("%s: %q: %v", kind, x, err)
			}
			now := contentOf(t, f)
			got, err := format.DecodeHeader(now)
			if err != nil {
				t.Fatal(err)
			}
			if got.BackingFile != x[0] || got.BackingFormat() != x[1] || !bytes.Equal(got.EncodeSwitch(), h.EncodeSwitch()) || got.Incompatible != h.Incompatible {
				t.Fatalf("%s: %q: the header says %q, %q", kind, x, got.BackingFile, got.BackingFormat())
			}
			if !bytes.Equal(now[h.ClusterSize():], before[h.ClusterSize():]) {
				t.Fatalf("%s: something behind the header has changed", kind)
			}
		}
		expect(t, "disk", c.content(c.top()), c.want)
	}
	f := create(t, qcow.CreateOptions{Size: 512})
	expectClass(t, "a long name", qcow.RebaseUnsafe(f, strings.Repeat("x", 1024), "raw"), qcow.ErrInvalid)
	expectClass(t, "no format", qcow.RebaseUnsafe(f, "x", ""), qcow.ErrInvalid)
	expectClass(t, "garbage", qcow.RebaseUnsafe(storage.NewMemoryFrom(repeated(1, 4096)), "x", "raw"), qcow.ErrCorrupt)
	expectClass(t, "nothing", qcow.RebaseUnsafe(storage.NewMemory(), "x", "raw"), qcow.ErrCorrupt)
}

// A crash inside an unsafe rebase leaves the old name or the new one.
func TestCrashRebaseUnsafe(t *testing.T) {
	rng := rand.New(rand.NewPCG(9, 9))
	states := 0
	for _, o := range []qcow.CreateOptions{{ClusterSize: 512}, {ClusterSize: 1024, Version: 2}, {ClusterSize: 4096}, {ClusterSize: 64 << 10}} {
		rec := storage.NewRecorder(create(t, o))
		initial := contentOf(t, rec)
		names, ends := []string{""}, []int{0}
		for len(names) < 40 {
			name, form := strings.Repeat(string(rune('a'+rng.IntN(26))), rng.IntN(min(o.ClusterSize-150, format.MaxBackingName))), "raw"
			if name == "" {
				form = ""
			}
			err := qcow.RebaseUnsafe(rec, name, form)
			if errors.Is(err, qcow.ErrInvalid) { // there is no room beside the old name
				continue
			}
			if err != nil {
				t.Fatal(err)
			}
			names, ends = append(names, name), append(ends, len(rec.Ops()))
		}
		for s := range storage.CrashStates(initial, rec.Ops(), storage.CrashOptions{}) {
			h, err := format.DecodeHeader(s.Content)
			if err != nil {
				t.Fatalf("%s: %v", s.Name, err)
			}
			at := 0 // the last name that was durable
			for i, end := range ends {
				if end <= s.Issued {
					at = i
				}
			}
			if h.BackingFile != names[at] && (at+1 == len(names) || h.BackingFile != names[at+1]) {
				t.Fatalf("%s: the backing file is %q", s.Name, h.BackingFile)
			}
			states++
		}
	}
	t.Logf("%d states", states)
}

var rebaseShapes = map[string][2][]layer{
	"raw":         {{{kind: "raw", size: 30 << 10}, {size: 40 << 10, cluster: 1024}}, {{kind: "raw", size: 35 << 10}}},
	"nothing":     {{{kind: "raw", size: 30 << 10}, {size: 40 << 10, cluster: 2048}}, nil},
	"qcow2":       {{{size: 20 << 10, cluster: 2048}, {size: 40 << 10, cluster: 1024}}, {{size: 40 << 10, cluster: 2048}}},
	"old":         {{{kind: "raw", size: 30 << 10}, {kind: "v2", size: 40 << 10, cluster: 1024}}, {{kind: "raw", size: 40 << 10}}},
	"subclusters": {{{kind: "raw", size: 70 << 10}, {kind: "extended", size: 80 << 10, cluster: 16 << 10}}, {{kind: "raw", size: 80 << 10}}},
}

// rebaseCrash records requests, a rebase, and some more.
func rebaseCrash(t *testing.T, seed uint64, name string) *chainCrash {
	t.Helper()
	x := rebaseShapes[name]
	w := newChainCrash(t, seed, append([]layer(nil), x[0]...), []int{len(x[0]) - 1}, qcow.Options{ReserveBytes: 32 << 10})
	o := qcow.RebaseOptions{Gate: w.live.gate}
	for i := range x[1] {
		l := x[1][i]
		f := files{}
		o.BackingFile, o.BackingFormat = fmt.Sprintf("new%d.%s", i, l.format()), l.format()
		w.kinds[o.BackingFile] = l.kind
		w.addLayer(f, o.BackingFile, &l, nil)
		w.live[o.BackingFile], w.still[o.BackingFile] = f[o.BackingFile], f[o.BackingFile]
	}
	for range 4 {
		w.random()
	}
	e := w.do("rebase", func() error { return w.img.Rebase(t.Context(), o) })
	w.also = func(s *storage.GroupCrashState, f files) error {
		h, err := format.DecodeHeader(contentOf(t, f[w.top]))
		if err != nil || s.Issued >= e.end && h.BackingFile != o.BackingFile {
			return fmt.Errorf("the header names %q: %w", h.BackingFile, err)
		}
		return nil
	}
	for range 4 {
		w.random()
	}
	w.do("close", w.img.Close)
	return w
}

// TestCrashRebase enumerates what a crash leaves of a rebase: the same content on the old chain or the new one.
func TestCrashRebase(t *testing.T) {
	require.Tool(t, "qemu-img")
	seeds := uint64(4)
	if long() {
		seeds = 40
	}
	total := 0
	for name := range rebaseShapes {
		for seed := range seeds {
			t.Run(fmt.Sprintf("%s/seed=%d", name, seed), func(t *testing.T) {
				total += rebaseCrash(t, seed, name).run(crashOptions(seed), 60)
			})
		}
	}
	t.Logf("%d states", total)
}

// The enumeration finds it when the header changes before what was copied is durable.
func TestCrashRebaseFindsMissingSyncs(t *testing.T) {
	for name := range rebaseShapes {
		t.Run(name, func(t *testing.T) {
			w := rebaseCrash(t, 1, name)
			n, err := w.states(withoutHeaderSyncs(w), crashOptions(0), 1<<30)
			if err == nil && stride == 1 {
				t.Fatalf("none of %d states shows that syncs are missing", n)
			}
			t.Logf("state %d: %v", n, err)
		})
	}
}

// TestFaultRebase lets the k-th change of the image fail while it is rebased.
func TestFaultRebase(t *testing.T) {
	for _, kind := range []string{"", "extended"} {
		layers := []layer{{kind: "raw", size: 40 << 10}, {kind: kind, size: 48 << 10}}
		other := storage.NewMemoryFrom(noise(rand.New(rand.NewPCG(8, 8)), 30<<10))
		eachFault(t, layers, 1, qcow.Options{ReserveBytes: 8 << 10}, func(c *chain, img *qcow.Image) error {
			c.files["other"] = other
			return img.Rebase(t.Context(), qcow.RebaseOptions{BackingFile: "other", BackingFormat: "raw", Gate: c.files.gate})
		})
	}
}

// QEMU's rebase of the same image reads the same.
func TestRebaseInQEMU(t *testing.T) {
	require.Tool(t, "qemu-img")
	for seed := range uint64(4) {
		rng := rand.New(rand.NewPCG(seed, 2))
		c := newChain(t, rng, layer{kind: "raw", size: 100000}, layer{size: 64 << 10, cluster: 4096}, layer{size: 128 << 10, cluster: 2048})
		c.files["other.raw"] = storage.NewMemoryFrom(noise(rng, 80<<10))
		dir := c.store()
		run(t, "qemu-img", "rebase", "-f", "qcow2", "-b", "other.raw", "-F", "raw", filepath.Join(dir, c.top()))
		img := c.open(qcow.Options{})
		if err := img.Rebase(t.Context(), qcow.RebaseOptions{BackingFile: "other.raw", BackingFormat: "raw", Gate: c.files.gate}); err != nil {
			t.Fatal(err)
		}
		if err := img.Close(); err != nil {
			t.Fatal(err)
		}
		report, err := check.Check(t.Context(), c.files[c.top()], check.Options{})
		if err != nil || !report.Clean() {
			t.Fatalf("check: %v, %v", report, err)
		}
		writeFile(t, filepath.Join(dir, "ours"), contentOf(t, c.files[c.top()]))
		run(t, "qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", filepath.Join(dir, "ours"), filepath.Join(dir, c.top()))
	}
}
