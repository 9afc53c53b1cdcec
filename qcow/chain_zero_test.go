package qcow_test

import (
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/check"
	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// iotest 028: behind the end of its backing file an image reads zeroes, and so does what is copied together with a write there.
func TestBehindTheBackingFile(t *testing.T) {
	for _, end := range []int64{0, 1, 511, 512, 513, 4095, 4096, 5000, 65535} {
		for _, cluster := range []int{512, 4096, 65536} {
			f := files{"base": storage.NewMemoryFrom(repeated(9, end))}
			top := overlay(t, qcow.CreateOptions{Size: 128 << 10, ClusterSize: cluster}, "base", "raw")
			img := open(t, top, qcow.Options{Gate: f.gate})
			want := make([]byte, 128<<10)
			copy(want, repeated(9, end))
			expect(t, "before", diskOf(t, img), want)
			for _, off := range []int64{max(end-1, 0), end, end + 700} {
				writeAt(t, img, []byte{1, 2, 3}, off)
				copy(want[off:], []byte{1, 2, 3})
			}
			expect(t, "after", diskOf(t, img), want)
			if err := img.Close(); err != nil {
				t.Fatal(err)
			}
			report, err := check.Check(t.Context(), top, check.Options{})
			if err != nil || !report.Clean() {
				t.Fatalf("check: %v, %v", report, err)
			}
		}
	}
}

// iotests 034 and 154: zeroes over a backing file hide it, need no cluster where whole ones are zeroed, and leave alone what reads as
// zeroes anyway.
func TestZeroesOverBacking(t *testing.T) {
	const cluster = 4096
	base := append(repeated(5, 4*cluster), make([]byte, 4*cluster)...) // data, then a hole
	for _, mayUnmap := range []bool{false, true} {
		f := files{"base": storage.NewMemoryFrom(base)}
		top := overlay(t, qcow.CreateOptions{Size: 10 * cluster, ClusterSize: cluster}, "base", "raw")
		img := open(t, top, qcow.Options{Gate: f.gate})
		want := append(bytes.Clone(base), make([]byte, 2*cluster)...)
		zero := func(off, n int64) {
			t.Helper()
			if err := img.WriteZeroes(off, n, mayUnmap); err != nil {
				t.Fatal(err)
			}
			clear(want[off:][:n])
			expect(t, "disk", diskOf(t, img), want)
		}
		zero(cluster, 2*cluster)           // data
		zero(4*cluster+512, 6*cluster-512) // hole, and behind the end
		if err := img.Close(); err != nil {
			t.Fatal(err)
		}
		entries := entriesOf(t, top)
		if len(entries) != 2 || entries[1].L2Entry != format.ZeroPlain || entries[2].L2Entry != format.ZeroPlain {
			t.Fatalf("entries %v; want the clusters 1 and 2 as zeroes", entries)
		}
		img = open(t, top, qcow.Options{Gate: f.gate})
		zero(3*cluster+100, 200) // inside a cluster
		zero(10, 2*cluster)
		if err := img.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// Zeroing all that a cluster of the backing file has makes the cluster zero, without a place in the file, though not all of it was zeroed.
func TestZeroesCoverData(t *testing.T) {
	for _, kind := range []string{"", "v2", "extended"} {
		l := layer{kind: kind, size: 64 << 10, cluster: 16 << 10}
		content := make([]byte, 64<<10)
		base := create(t, qcow.CreateOptions{Size: 64 << 10, ClusterSize: 512})
		change(t, base, func(img *qcow.Image) {
			for off, n := range map[int64]int64{512: 512, 20 << 10: 1 << 10, 30 << 10: 512, 63 << 10: 1 << 10} {
				writeAt(t, img, repeated(1, n), off)
				copy(content[off:], repeated(1, n))
			}
		})
		f := files{"base": base, "top": l.make(t)}
		if err := qcow.RebaseUnsafe(f["top"], "base", "qcow2"); err != nil {
			t.Fatal(err)
		}
		img := open(t, f["top"], qcow.Options{Gate: f.gate})
		for _, x := range [][2]int64{{500, 530}, {20 << 10, 1 << 10}, {63<<10 - 1, 1025}} {
			if err := img.WriteZeroes(x[0], x[1], true); err != nil {
				t.Fatal(err)
			}
			clear(content[x[0]:][:x[1]])
			expect(t, kind+": disk", diskOf(t, img), content)
		}
		if err := img.Close(); err != nil {
			t.Fatal(err)
		}
		data := map[uint64]bool{}
		for cluster, e := range entriesOf(t, f["top"]) {
			data[cluster] = e.L2Entry.Offset() != 0
		}
		want := map[string]map[uint64]bool{
			"":         {0: false, 1: true, 3: false},
			"v2":       {0: true, 1: true, 3: true},
			"extended": {0: false, 1: false, 3: false},
		}[kind]
		if !maps.Equal(data, want) {
			t.Errorf("%s: clusters with a place: %v, want %v", kind, data, want)
		}
	}
}

// A discard over a backing file reads as zeroes; in an image of version 2, which can't say so, it does nothing.
func TestDiscardOverBacking(t *testing.T) {
	for _, kind := range []string{"", "v2", "extended"} {
		l := layer{kind: kind, size: 256 << 10}
		f := files{"base": storage.NewMemoryFrom(repeated(5, 256<<10)), "top": l.make(t)}
		if err := qcow.RebaseUnsafe(f["top"], "base", "raw"); err != nil {
			t.Fatal(err)
		}
		cluster := int64(l.cluster)
		img := open(t, f["top"], qcow.Options{Gate: f.gate})
		want := repeated(5, l.size)
		writeAt(t, img, repeated(6, cluster+100), 3*cluster)
		copy(want[3*cluster:], repeated(6, cluster+100))
		if err := img.Discard(2*cluster-1, 3*cluster+1); err != nil {
			t.Fatal(err)
		}
		if kind != "v2" {
			clear(want[2*cluster : 5*cluster])
		}
		expect(t, kind+": disk", diskOf(t, img), want)
		if err := img.Close(); err != nil {
			t.Fatal(err)
		}
		img = open(t, f["top"], qcow.Options{Gate: f.gate})
		expect(t, kind+": disk opened again", diskOf(t, img), want)
		if err := img.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// Clusters whose subclusters differ are discarded as a whole, and those behind them too.
func TestDiscardMixedSubclusters(t *testing.T) {
	const cluster, sub = 16 << 10, 512
	for _, how := range []string{"discard", "zero", "zero, with leave"} {
		for pattern := range 3 * 3 * 3 * 3 {
			l := layer{kind: "extended", size: 4 * cluster}
			f := files{"base": storage.NewMemoryFrom(repeated(5, l.size)), "top": l.make(t)}
			if err := qcow.RebaseUnsafe(f["top"], "base", "raw"); err != nil {
				t.Fatal(err)
			}
			img := open(t, f["top"], qcow.Options{Gate: f.gate})
			for i, p := int64(0), pattern; i < 4; i, p = i+1, p/3 {
				var err error
				switch p % 3 {
				case 0: // zeroes in the middle, which have no place
					err = img.WriteZeroes(i*cluster+10*sub, 4*sub, true)
				case 1:
					_, err = img.WriteAt(repeated(6, cluster), i*cluster)
				default:
					_, err = img.WriteAt(repeated(6, 9*sub), i*cluster)
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			err := map[string]func() error{
				"discard":          func() error { return img.Discard(0, l.size) },
				"zero":             func() error { return img.WriteZeroes(0, l.size, false) },
				"zero, with leave": func() error { return img.WriteZeroes(0, l.size, true) },
			}[how]()
			if err != nil {
				t.Fatal(err)
			}
			expect(t, fmt.Sprintf("%s, pattern %d", how, pattern), diskOf(t, img), make([]byte, l.size))
			if err := img.Close(); err != nil {
				t.Fatal(err)
			}
			for i, e := range entriesOf(t, f["top"]) {
				if how != "zero" && e.L2Entry != 0 || e.Subclusters != format.AllZero {
					t.Errorf("pattern %d: cluster %d is %#x, %#x", pattern, i, uint64(e.L2Entry), uint64(e.Subclusters))
				}
			}
		}
	}
}

// A disk that grows over what its backing file has there, aligned or not, shows zeroes (iotests 274 and 292), also after it was
// smaller for a while.
func TestGrowOverBacking(t *testing.T) {
	for _, kind := range []string{"", "v2", "extended"} {
		for _, seed := range testSeeds(t, 3, 100) {
			rng := rand.New(rand.NewPCG(seed, 0))
			l := layer{kind: kind, size: 64<<10 + 1536}
			f := files{"base": storage.NewMemoryFrom(noise(rng, 1<<20)), "top": l.make(t)}
			if err := qcow.RebaseUnsafe(f["top"], "base", "raw"); err != nil {
				t.Fatal(err)
			}
			img := open(t, f["top"], qcow.Options{Gate: f.gate})
			want := contentOf(t, f["base"])[:l.size]
			for range 12 {
				size := (1 + rng.Int64N(2000)) * sector
				if err := img.Resize(t.Context(), size); err != nil {
					t.Fatal(err)
				}
				now := make([]byte, size)
				copy(now, want)
				want = now
				expect(t, fmt.Sprintf("%s, seed %d, %d bytes", kind, seed, size), diskOf(t, img), want)
			}
			if err := img.Close(); err != nil {
				t.Fatal(err)
			}
			report, err := check.Check(t.Context(), f["top"], check.Options{})
			if err != nil || !report.Clean() {
				t.Fatalf("check: %v, %v", report, err)
			}
		}
	}
}

// Growing over a backing file takes tables only where that holds something.
func TestGrowOverSparseBacking(t *testing.T) {
	base := create(t, qcow.CreateOptions{Size: 1 << 40})
	change(t, base, func(img *qcow.Image) { writeAt(t, img, repeated(1, 512), 700<<30) })
	f := files{"base": base}
	top := overlay(t, qcow.CreateOptions{Size: 1 << 20}, "base", "qcow2")
	img := open(t, top, qcow.Options{Gate: f.gate, ReserveBytes: 1})
	if err := img.Resize(t.Context(), 1<<40); err != nil {
		t.Fatal(err)
	}
	expectAt(t, img, make([]byte, 512), 700<<30)
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	entries := entriesOf(t, top)
	if len(entries) > 8192 { // one L2 table at most
		t.Errorf("%d entries", len(entries))
	}
}

// Requests of every alignment on subclusters, each followed by a look at the whole disk.
func TestSubclusterModel(t *testing.T) {
	steps := 500
	if long() {
		steps = 20000
	}
	for name, layers := range map[string][]layer{
		"alone":      {{kind: "extended", size: 80<<10 + 512}},
		"over-raw":   {{kind: "raw", size: 70 << 10}, {kind: "extended", size: 80<<10 + 512}},
		"over-qcow2": {{size: 96 << 10, cluster: 1024}, {kind: "extended", size: 80<<10 + 512}},
	} {
		for _, seed := range testSeeds(t, 1, 10) {
			t.Run(fmt.Sprintf("%s/seed=%d", name, seed), func(t *testing.T) {
				c := newChain(t, rand.New(rand.NewPCG(seed, 0)), layers...)
				img := c.open(qcow.Options{ReserveBytes: 256 << 10})
				for range steps {
					c.step(img)
					expect(t, "disk", diskOf(t, img), c.want)
				}
				if err := img.Close(); err != nil {
					t.Fatal(err)
				}
				c.expectQEMU()
			})
		}
	}
}
