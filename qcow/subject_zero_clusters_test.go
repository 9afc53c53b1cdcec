package qcow_test

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// zeroAllocated makes an image of 64 KiB clusters with data in the first eight, and marks those from first to end as zeroes that keep their
// clusters, in which the old data still is.
func zeroAllocated(t *testing.T, size int64, first, end uint64) *handmade {
	t.Helper()
	m := newHandmade(t, qcow.CreateOptions{Size: size}, func(img *qcow.Image) { writeAt(t, img, repeated(0xaa, 512<<10), 0) })
	for c := first; c < end; c++ {
		m.put(m.l2Entry(c), m.entry(m.l2Entry(c))|uint64(format.ZeroPlain))
	}
	expectClean(t, m.b)
	return m
}

// A write into zeroes that keep their clusters shows nothing of what is in these, needs no more space, and leaks nothing.
func TestWriteIntoAllocatedZeroes(t *testing.T) {
	const k, cluster = 1 << 10, 64 << 10
	for name, x := range map[string]struct{ first, end uint64 }{
		"zeroes alone":      {0, 4},
		"between data":      {2, 4},
		"at the end of all": {6, 8},
	} {
		t.Run(name, func(t *testing.T) {
			m := zeroAllocated(t, 64<<20+512, x.first, x.end)
			f := m.file()
			want := repeated(0xaa, 1<<20)
			clear(want[512*k:])
			clear(want[x.first*cluster : x.end*cluster])
			img := open(t, f, qcow.Options{ReserveBytes: 1})
			expectAt(t, img, want, 0)
			off := int64(x.first)*cluster - 40*k // from data, if there is some, into the zeroes
			if x.first == 0 {
				off = 30 * k
			}
			n := int64(x.end)*cluster - 10*k - off
			writeAt(t, img, repeated(0xbb, n), off)
			copy(want[off:], repeated(0xbb, n))
			expectAt(t, img, want, 0)
			if err := img.Flush(); err != nil { // which frees the old clusters
				t.Fatal(err)
			}
			writeAt(t, img, repeated(0xcc, int64(x.end-x.first)*cluster), 10*cluster)
			copy(want[10*cluster:], repeated(0xcc, int64(x.end-x.first)*cluster))
			expectAt(t, img, want, 0)
			closeClean(t, img, f)
			// As many clusters were written to twice: here, and where nothing was.
			if grown := len(f.Bytes()) - len(m.b); grown > int(x.end-x.first)*cluster {
				t.Errorf("the file has grown by %d bytes", grown)
			}
		})
	}
}

// Zeroes that keep their clusters do so in a snapshot too: a write afterwards goes elsewhere, and the snapshot reads zeroes.
func TestAllocatedZeroesUnderSnapshot(t *testing.T) {
	const cluster = 64 << 10
	f := zeroAllocated(t, 1<<20, 2, 4).file()
	want := disks{want: repeated(0xaa, 1<<20)}
	clear(want.want[512<<10:])
	clear(want.want[2*cluster : 4*cluster])
	change(t, f, func(img *qcow.Image) {
		if _, err := img.CreateSnapshot(t.Context(), "s", time.Unix(1, 0)); err != nil {
			t.Fatal(err)
		}
		want.kept = []keptDisk{{"s", slices.Clone(want.want)}}
		writeAt(t, img, repeated(0xbb, cluster), 2*cluster+1000)
		copy(want.want[2*cluster+1000:], repeated(0xbb, cluster))
	})
	expectClean(t, f.Bytes())
	if err := want.matches(f.Bytes()); err != nil {
		t.Fatal(err)
	}
	change(t, f, func(img *qcow.Image) {
		if err := img.DeleteSnapshot(t.Context(), "s"); err != nil {
			t.Fatal(err)
		}
	})
	expectClean(t, f.Bytes())
	want.kept = nil
	if err := want.matches(f.Bytes()); err != nil {
		t.Fatal(err)
	}
}

// Zeroes without clusters have no references to count when snapshots come and go.
func TestPlainZeroesUnderSnapshot(t *testing.T) {
	f := files{"base": storage.NewMemoryFrom(repeated(1, 1<<20))}
	top := overlay(t, qcow.CreateOptions{Size: 1 << 20, RefcountBits: 1}, "base", "raw")
	img := open(t, top, qcow.Options{Gate: f.gate})
	if err := img.WriteZeroes(128<<10, 256<<10, false); err != nil {
		t.Fatal(err)
	}
	const nothing, zero = qcow.ExtentUnallocated, qcow.ExtentZero
	kinds := slices.Concat(slices.Repeat([]qcow.ExtentKind{nothing}, 2), slices.Repeat([]qcow.ExtentKind{zero}, 4), slices.Repeat([]qcow.ExtentKind{nothing}, 10))
	expectKinds(t, img, kinds...)
	if _, err := img.CreateSnapshot(t.Context(), "s", time.Unix(1, 0)); err != nil { // with refcounts of one bit
		t.Fatal(err)
	}
	writeAt(t, img, repeated(2, 64<<10), 100<<10)
	if err := img.ApplySnapshot(t.Context(), "s"); err != nil {
		t.Fatal(err)
	}
	expectKinds(t, img, kinds...)
	expectAt(t, img, make([]byte, 256<<10), 128<<10)
	expectAt(t, img, repeated(1, 128<<10), 0)
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	(&chain{t: t, files: files{"top": top}}).expectClean("top")
}

// A disk that was written, zeroed in place and discarded up to its end, inside a cluster, has nothing left but a table.
func TestDiscardOfEverything(t *testing.T) {
	const size, cluster = 8<<20 + 512, 64 << 10
	f := create(t, qcow.CreateOptions{Size: size})
	empty := len(f.Bytes())
	img := open(t, f, qcow.Options{})
	writeAt(t, img, repeated(1, size), 0)
	if err := img.WriteZeroes(0, size, false); err != nil {
		t.Fatal(err)
	}
	expectAt(t, img, make([]byte, size), 0)
	expectKinds(t, img, slices.Repeat([]qcow.ExtentKind{qcow.ExtentData}, size/cluster+1)...)
	if err := img.Discard(0, size); err != nil {
		t.Fatal(err)
	}
	expectAt(t, img, make([]byte, size), 0)
	expectKinds(t, img, make([]qcow.ExtentKind, size/cluster+1)...)
	closeClean(t, img, f)
	if n := len(f.Bytes()); n > empty+2*cluster {
		t.Errorf("the file has %d bytes, %d when it was empty", n, empty)
	}
}

// Zeroes and discards of units that are no power of two, at places that are none of theirs, as virtual disks with odd limits send
// them: whole clusters inside are dealt with, their neighbours stay.
func TestOddUnits(t *testing.T) {
	const cluster, size = 64 << 10, 8 << 20
	const unit = 15 * cluster
	for _, version := range []int{2, 3} {
		for _, behind := range []string{"", "base"} {
			t.Run(fmt.Sprintf("version=%d/over=%s", version, behind), func(t *testing.T) {
				o := qcow.CreateOptions{Size: size, Version: version, BackingFile: behind}
				f, want := files{"base": storage.NewMemoryFrom(repeated(9, 7*size/8))}, repeated(1, size)
				if behind != "" {
					o.BackingFormat = "raw"
					copy(want[6*size/8:], repeated(9, size/8)) // the rest is the image's own
				}
				top := create(t, o)
				img := open(t, top, qcow.Options{Gate: f.gate})
				writeAt(t, img, want[:6*size/8], 0)
				writeAt(t, img, want[7*size/8:], 7*size/8)
				if behind == "" {
					writeAt(t, img, want[6*size/8:7*size/8], 6*size/8)
				}
				inUnits := func(off, n int64, do func(off, n int64) error) {
					t.Helper()
					for end := off + n; off < end; {
						n := min(end-off, unit-off%unit)
						if err := do(off, n); err != nil {
							t.Fatal(err)
						}
						off += n
					}
				}
				inUnits(500224, 130816, func(off, n int64) error { // inside two clusters and a bit
					clear(want[off:][:n])
					return img.WriteZeroes(off, n, true)
				})
				inUnits(5000001, 30*cluster, func(off, n int64) error {
					if first, end := wholeClusters(img, off, n); first < end && (version == 3 || behind == "") {
						clear(want[first:end])
					}
					return img.Discard(off, n)
				})
				inUnits(size-3*unit/2, 3*unit/2-512, func(off, n int64) error {
					clear(want[off:][:n])
					return img.WriteZeroes(off, n, false)
				})
				expect(t, "disk", diskOf(t, img), want)
				if err := img.Close(); err != nil {
					t.Fatal(err)
				}
				(&chain{t: t, files: files{"top": top}}).expectClean("top")
				img = open(t, top, qcow.Options{Gate: f.gate, ReadOnly: true})
				expect(t, "disk opened again", diskOf(t, img), want)
				if err := img.Close(); err != nil {
					t.Fatal(err)
				}
			})
		}
	}
}
