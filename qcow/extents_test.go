package qcow_test

import (
	"errors"
	"io"
	"iter"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// newPatchwork makes an image with every kind of cluster, and says for each cluster of what kind it is and where.
func newPatchwork(t *testing.T, o qcow.CreateOptions, rng *rand.Rand) (m *handmade, kinds []qcow.ExtentKind) {
	cluster := int64(o.ClusterSize)
	kinds = make([]qcow.ExtentKind, (o.Size+cluster-1)/cluster)
	m = newHandmade(t, o, func(img *qcow.Image) {
		for range 40 {
			c := rng.Int64N(int64(len(kinds)))
			n := min(1+rng.Int64N(12), int64(len(kinds))-c)
			kind := qcow.ExtentData
			var err error
			if rng.IntN(3) == 0 {
				kind, err = qcow.ExtentUnallocated, img.Discard(c*cluster, min(n*cluster, o.Size-c*cluster))
			} else {
				_, err = img.WriteAt(make([]byte, min(n*cluster, o.Size-c*cluster)), c*cluster)
			}
			if err != nil {
				t.Fatal(err)
			}
			for i := range n {
				kinds[c+i] = kind
			}
		}
	})
	for c, kind := range kinds { // the engine makes no zero clusters; others do, with a host cluster and without
		if format.L1Entry(m.entry(m.l1Entry(uint64(c)))).Offset() != 0 && kind != qcow.ExtentUnallocated && rng.IntN(4) == 0 {
			at := m.l2Entry(uint64(c))
			if m.put(at, m.entry(at)|1); rng.IntN(2) == 0 {
				m.put(at, 1)
			}
			kinds[c] = qcow.ExtentZero
		}
	}
	return m, kinds
}

func TestExtents(t *testing.T) {
	for _, seed := range testSeeds(t, 20, 1000) {
		rng := rand.New(rand.NewPCG(seed, 0))
		o := qcow.CreateOptions{Size: 64<<10*(1+rng.Int64N(3)) + 512*rng.Int64N(3), ClusterSize: 512 << rng.IntN(3)}
		m, kinds := newPatchwork(t, o, rng)
		img := open(t, m.file(), qcow.Options{CacheBytes: 1})
		cluster := int64(o.ClusterSize)
		for range 50 {
			off := rng.Int64N(o.Size)
			n := rng.Int64N(o.Size - off + 1)
			expectExtents(t, img, m, kinds, off, n)
			mapped, unmapped := o.Size, o.Size
			for at := off; at < o.Size; at = (at/cluster + 1) * cluster {
				if kinds[at/cluster] == qcow.ExtentData {
					mapped = min(mapped, at)
				} else {
					unmapped = min(unmapped, at)
				}
			}
			if got, err := img.SeekUnmapped(off); err != nil || got != unmapped {
				t.Fatalf("seed %d: unmapped from %d on: %d, %v; want %d", seed, off, got, err, unmapped)
			}
			if got, err := img.SeekMapped(off); mapped == o.Size && !errors.Is(err, io.EOF) || mapped != o.Size && (err != nil || got != mapped) {
				t.Fatalf("seed %d: mapped from %d on: %d, %v; want %d", seed, off, got, err, mapped)
			}
		}
		if err := img.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// expectExtents holds the extents of n bytes at off against what is known of each cluster.
func expectExtents(t *testing.T, img *qcow.Image, m *handmade, kinds []qcow.ExtentKind, off, n int64) {
	t.Helper()
	cluster := int64(m.h.ClusterSize())
	at := off
	var last qcow.Extent
	for e, err := range img.Extents(off, n) {
		if err != nil {
			t.Fatal(err)
		}
		if e.Offset != at || e.Length <= 0 {
			t.Fatalf("extent %+v follows %+v", e, last)
		}
		neighbours := e.Host == 0 && last.Host == 0 || last.Host != 0 && e.Host == last.Host+format.HostOffset(last.Length)
		if last.Length > 0 && e.Kind == last.Kind && neighbours {
			t.Fatalf("extents %+v and %+v are one", last, e)
		}
		for ; at < e.Offset+e.Length; at = min((at/cluster+1)*cluster, e.Offset+e.Length) {
			c := at / cluster
			if e.Kind != kinds[c] {
				t.Fatalf("cluster %d is in %+v; want %v", c, e, kinds[c])
			}
			host := format.HostOffset(0)
			if e.Kind != qcow.ExtentUnallocated {
				host = m.host(uint64(c))
			}
			if host != 0 && e.Host+format.HostOffset(at-e.Offset) != host+format.HostOffset(at%cluster) || host == 0 && e.Host != 0 {
				t.Fatalf("cluster %d at %#x is in %+v", c, uint64(host), e)
			}
		}
		last = e
	}
	if at != off+n {
		t.Fatalf("the extents of %d bytes at %d end at %d", n, off, at)
	}
}

func TestExtentsOutsideTheDisk(t *testing.T) {
	img := open(t, create(t, qcow.CreateOptions{Size: 64 << 10}), qcow.Options{})
	for _, r := range [][2]int64{{-1, 10}, {0, -1}, {0, 64<<10 + 1}, {64<<10 + 1, 0}, {1, 1<<63 - 1}} {
		calls := 0
		for _, err := range img.Extents(r[0], r[1]) {
			expectClass(t, "extents", err, qcow.ErrInvalid)
			calls++
		}
		if calls != 1 {
			t.Errorf("%d+%d: %d extents", r[0], r[1], calls)
		}
	}
	if off, err := img.SeekMapped(64 << 10); !errors.Is(err, io.EOF) {
		t.Errorf("mapped at the end: %d, %v", off, err)
	}
	if off, err := img.SeekUnmapped(64 << 10); err != nil || off != 64<<10 {
		t.Errorf("unmapped at the end: %d, %v", off, err)
	}
	for _, err := range img.Extents(0, 64<<10) {
		if err != nil {
			t.Error(err)
		}
		break // the receiver may stop
	}
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
}

// A disk of 256 PiB with two clusters in use is described by four extents, and no more tables are read than there are.
func TestExtentsOfAHugeDisk(t *testing.T) {
	const size, cluster = int64(1) << 58, int64(2 << 20)
	f := create(t, qcow.CreateOptions{Size: size, ClusterSize: int(cluster)})
	reads := 0
	counted := &hooked{File: f}
	img := open(t, counted, qcow.Options{ReserveBytes: 1})
	first, second := size/3/cluster*cluster, size-cluster
	writeAt(t, img, []byte{1}, first)
	writeAt(t, img, []byte{1}, second)
	counted.set(func() { counted.beforeRead = func([]byte, int64) error { reads++; return nil } })
	var got []qcow.Extent
	for e, err := range img.Extents(0, size) {
		if err != nil {
			t.Fatal(err)
		}
		e.Host = 0
		got = append(got, e)
	}
	want := []qcow.Extent{
		{Offset: 0, Length: first},
		{Offset: first, Length: cluster, Kind: qcow.ExtentData},
		{Offset: first + cluster, Length: second - first - cluster},
		{Offset: second, Length: cluster, Kind: qcow.ExtentData},
	}
	if len(got) != len(want) {
		t.Fatalf("%d extents: %+v", len(got), got)
	}
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("extent %d is %+v, want %+v", i, got[i], want[i])
		}
	}
	if tables := 2 * int(cluster) / 4096; reads > tables {
		t.Errorf("%d reads for two tables of %d slices", reads, tables)
	}
	if off, err := img.SeekMapped(first + cluster); err != nil || off != second {
		t.Errorf("mapped: %d, %v", off, err)
	}
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
}

// What is stored in any file of a chain is mapped.
func TestSeekOverChain(t *testing.T) {
	for name, layers := range chainShapes {
		for _, seed := range testSeeds(t, 1, 30) {
			rng := rand.New(rand.NewPCG(seed, 0))
			c := newChain(t, rng, layers...)
			img := c.open(qcow.Options{ReadOnly: true, CacheBytes: 1})
			stored := make([]bool, img.Size())
			for e, err := range img.Extents(0, img.Size()) {
				if err != nil {
					t.Fatal(err)
				}
				for i := range stored[e.Offset:][:e.Length] {
					stored[e.Offset+int64(i)] = e.Kind == qcow.ExtentData || e.Kind == qcow.ExtentCompressed
				}
			}
			for i, v := range c.want {
				if v != 0 && !stored[i] {
					t.Fatalf("%s, seed %d: byte %d is in no file", name, seed, i)
				}
			}
			for range 40 {
				off := rng.Int64N(img.Size() + 1)
				if slices.Contains(c.kinds, "raw") {
					off &^= 4095 // a file in memory has holes of pages, and what is left of a page may be one
				}
				next := func(want bool) int64 {
					if i := slices.Index(stored[off:], want); i >= 0 {
						return off + int64(i)
					}
					return img.Size()
				}
				if got, err := img.SeekUnmapped(off); err != nil || got != next(false) {
					t.Fatalf("%s, seed %d: unmapped from %d on: %d, %v; want %d", name, seed, off, got, err, next(false))
				}
				got, err := img.SeekMapped(off)
				if want := next(true); want == img.Size() && !errors.Is(err, io.EOF) || want != img.Size() && (err != nil || got != want) {
					t.Fatalf("%s, seed %d: mapped from %d on: %d, %v; want %d", name, seed, off, got, err, want)
				}
			}
			if err := img.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// Who receives extents slowly holds nobody up: the chain can be exchanged meanwhile.
func TestExtentsWhileStreaming(t *testing.T) {
	c := newChain(t, rand.New(rand.NewPCG(1, 1)), layer{kind: "raw", size: 1 << 20}, layer{size: 1 << 20, cluster: 512})
	img := c.open(qcow.Options{})
	next, stop := iter.Pull2(img.Extents(0, img.Size()))
	defer stop()
	e, err, _ := next()
	at := e.Length
	if err != nil || at == 0 {
		t.Fatal(e, err)
	}
	if err := img.Stream(t.Context(), qcow.StreamOptions{}); err != nil {
		t.Fatal(err)
	}
	for {
		e, err, more := next()
		if !more {
			break
		}
		if err != nil || e.Offset != at {
			t.Fatalf("at %d: %+v, %v", at, e, err)
		}
		at += e.Length
	}
	if at != img.Size() {
		t.Errorf("the extents end at %d", at)
	}
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
}
