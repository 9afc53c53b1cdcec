package qcow_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// What free clusters held before, inside the file or behind what it needs, does not show around a write to a part of a cluster.
func TestFreshClusterShowsNothingOld(t *testing.T) {
	const cluster = 4096
	m := newHandmade(t, qcow.CreateOptions{Size: 1 << 20, ClusterSize: cluster}, func(img *qcow.Image) {
		writeAt(t, img, repeated(1, 16*cluster), 0)
		if err := img.Discard(4*cluster, 8*cluster); err != nil {
			t.Fatal(err)
		}
	})
	block, end := m.b[m.block():], uint64(len(m.b))/cluster
	m.b = append(m.b, repeated(0xff, 8*cluster)...)
	for c := range end {
		if format.Refcount(block, m.h.RefcountOrder, c) == 0 {
			copy(m.b[c*cluster:], repeated(0xff, cluster))
		}
	}
	f := m.file()
	img := open(t, f, qcow.Options{ReserveBytes: 4 * cluster})
	want := append(repeated(1, 16*cluster), make([]byte, 1<<20-16*cluster)...)
	clear(want[4*cluster : 12*cluster])
	for c := int64(4); c < 28; c++ { // more clusters than were free
		off := c*cluster + 1024
		writeAt(t, img, repeated(2, 2048), off)
		copy(want[off:], repeated(2, 2048))
	}
	expectAt(t, img, want, 0)
	closeClean(t, img, f)
	img = open(t, f, qcow.Options{ReadOnly: true})
	expectAt(t, img, want, 0)
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
}

// A write of any length at any phase leaves the rest of the clusters that it touches to what was there before, which every sector has
// otherwise, in a backing file or in a snapshot.
func TestEveryPhase(t *testing.T) {
	const cluster, size = 4096, 64 << 10
	base := make([]byte, size)
	for i := range base {
		base[i] = byte(i/sector) + 1
	}
	f := files{"base": storage.NewMemoryFrom(base)}
	over := map[string]func() *storage.Memory{
		"a raw file": func() *storage.Memory {
			return overlay(t, qcow.CreateOptions{Size: size, ClusterSize: cluster}, "base", "raw")
		},
		"a snapshot": func() *storage.Memory {
			f := create(t, qcow.CreateOptions{Size: size, ClusterSize: cluster})
			change(t, f, func(img *qcow.Image) {
				writeAt(t, img, base, 0)
				if _, err := img.CreateSnapshot(t.Context(), "s", time.Unix(1, 0)); err != nil {
					t.Fatal(err)
				}
			})
			return f
		},
	}
	for name, image := range over {
		for phase := int64(0); phase < cluster; phase += sector {
			for _, n := range []int64{cluster / 2, cluster * 3 / 2, 4*cluster - sector} {
				top, want := image(), bytes.Clone(base)
				img := open(t, top, qcow.Options{Gate: f.gate, ReserveBytes: 1})
				for _, off := range []int64{phase, 5*cluster + phase, size - n} {
					writeAt(t, img, repeated(0xee, n), off)
					copy(want[off:], repeated(0xee, n))
				}
				expect(t, fmt.Sprintf("over %s: %d bytes at phase %d", name, n, phase), diskOf(t, img), want)
				if err := img.Close(); err != nil {
					t.Fatal(err)
				}
				img = open(t, top, qcow.Options{Gate: f.gate, ReadOnly: true})
				expect(t, "opened again", diskOf(t, img), want)
				if err := img.Close(); err != nil {
					t.Fatal(err)
				}
				(&chain{t: t, files: files{"top": top}}).expectClean("top")
			}
		}
	}
}

// Clusters of every kind beside those of every other kind, read in one request, from any place inside the first one.
func TestNeighboursOfEveryKind(t *testing.T) {
	require.Tool(t, "qemu-img")
	const cluster = 4096
	const kinds = ".dcza" // nothing, data, compressed, zeroes without and with a cluster
	var row []byte
	for _, a := range []byte(kinds) {
		for _, b := range []byte(kinds) {
			row = append(row, a, b)
		}
	}
	size := int64(len(row)) * cluster
	base := noise(rand.New(rand.NewPCG(7, 3)), size)
	f := files{"base.raw": storage.NewMemoryFrom(base)}
	top := overlay(t, qcow.CreateOptions{Size: size, ClusterSize: cluster}, "base.raw", "raw")
	img := open(t, top, qcow.Options{Gate: f.gate})
	want := bytes.Clone(base)
	for i, kind := range row {
		off := int64(i) * cluster
		p := repeated(byte(i+1), cluster)
		var err error
		switch kind {
		case '.':
			continue
		case 'd', 'a':
			_, err = img.WriteAt(p, off)
		case 'c':
			err = img.WriteCompressed(p, off)
		case 'z':
			err = img.WriteZeroes(off, cluster, true)
		}
		if err != nil {
			t.Fatal(err)
		}
		if kind == 'z' || kind == 'a' {
			clear(p)
		}
		copy(want[off:], p)
	}
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	m := &handmade{t: t, b: top.Bytes()}
	var err error
	if m.h, err = format.DecodeHeader(m.b); err != nil {
		t.Fatal(err)
	}
	for i, kind := range row {
		if kind == 'a' { // the engine leaves no such clusters behind, QEMU does
			m.put(m.l2Entry(uint64(i)), m.entry(m.l2Entry(uint64(i)))|uint64(format.ZeroPlain))
		}
	}
	f["top"] = m.file()
	img = open(t, f["top"], qcow.Options{Gate: f.gate, ReadOnly: true})
	expect(t, "the whole disk", diskOf(t, img), want)
	for off := int64(0); off < size-2*cluster; off += cluster / 2 {
		for _, n := range []int64{cluster, 2 * cluster, 2*cluster - 100} {
			expectAt(t, img, want[off:][:n], off)
		}
	}
	expected := map[byte]qcow.ExtentKind{'.': qcow.ExtentUnallocated, 'd': qcow.ExtentData, 'c': qcow.ExtentCompressed, 'z': qcow.ExtentZero, 'a': qcow.ExtentZero}
	var list []qcow.ExtentKind
	for _, kind := range row {
		list = append(list, expected[kind])
	}
	expectKinds(t, img, list...)
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	(&chain{t: t, files: f, names: []string{"base.raw", "top"}, kinds: []string{"raw", ""}, want: want}).expectQEMU()
}

// Requests at the same time, from the end of the disk to its start, each to the middle of a cluster of its own; then three to each cluster.
func TestMiddlesAtTheSameTime(t *testing.T) {
	const cluster, size, middle = 4096, 1 << 20, 1024
	f := create(t, qcow.CreateOptions{Size: size, ClusterSize: cluster})
	img := open(t, restless(f), qcow.Options{ReserveBytes: 8 * cluster})
	want := make([]byte, size)
	together := func(request func(off int64) error) {
		t.Helper()
		var wg sync.WaitGroup
		for off := int64(size - cluster); off >= 0; off -= cluster {
			wg.Go(func() {
				if err := request(off); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		expectAt(t, img, want, 0)
	}
	write := func(v byte, off, n int64) error {
		copy(want[off:], repeated(v, n))
		_, err := img.WriteAt(repeated(v, n), off)
		return err
	}
	together(func(off int64) error { return write(1, off+middle, 2*middle) })
	together(func(off int64) error {
		clear(want[off:][:middle])
		return img.WriteZeroes(off, middle, true)
	})
	together(func(off int64) error { return write(2, off+middle, 2*middle) })
	together(func(off int64) error {
		clear(want[off+3*middle:][:middle])
		return img.WriteZeroes(off+3*middle, middle, false)
	})
	closeClean(t, img, f)
}
