package qcow_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// zeroPlaces is an image of clusters of eight sectors on a backing file whose clusters are sectors, some of which have data.
type zeroPlaces struct {
	disk   int64   // bytes
	behind []int64 // sectors of the backing file with data
	own    bool    // the image has data in cluster 1
}

// zeroCluster is the size of a cluster in sectors.
const zeroCluster = 8

// kind returns of what kind a cluster is when sectors from first on and before end are zeroed. One that reads as zeroes anyway, and is zeroed as
// a whole, may be marked all the same.
func (z *zeroPlaces) kind(cluster, first, end int64, mayUnmap bool) qcow.ExtentKind {
	start, stop := cluster*zeroCluster, min((cluster+1)*zeroCluster, z.disk/sector)
	first, end = max(first, start), min(end, stop)
	if z.own && cluster == 1 {
		if first == start && end == stop && mayUnmap {
			return qcow.ExtentZero
		}
		return qcow.ExtentData
	}
	inside, outside := false, false
	for _, s := range z.behind {
		inside = inside || s >= first && s < end
		outside = outside || s >= start && s < stop && (s < first || s >= end)
	}
	switch {
	case !inside: // it reads as zeroes anyway
		return qcow.ExtentUnallocated
	case outside:
		return qcow.ExtentData
	}
	return qcow.ExtentZero
}

// Zeroes of any number of sectors at any place take a cluster where something else of the backing file is to be read in it, and nowhere else.
func TestZeroesAtEveryPlace(t *testing.T) {
	whole := make([]int64, 3*zeroCluster)
	for i := range whole {
		whole[i] = int64(i)
	}
	for _, z := range []zeroPlaces{
		{24 * sector, nil, false},
		{24 * sector, []int64{0}, false},
		{24 * sector, []int64{7}, true},
		{24 * sector, []int64{8}, false},
		{24 * sector, []int64{10}, true},
		{24 * sector, []int64{15, 16}, false},
		{24 * sector, []int64{5, 18, 20}, true},
		{24 * sector, whole, false},
		{20 * sector, whole[:20], true},
		{20 * sector, []int64{17}, false},
		{20 * sector, []int64{19}, false},
	} {
		f := files{"base": create(t, qcow.CreateOptions{Size: z.disk, ClusterSize: sector})}
		content := make([]byte, z.disk)
		change(t, f["base"], func(img *qcow.Image) {
			for _, s := range z.behind {
				copy(content[s*sector:], repeated(byte(s+1), sector))
				writeAt(t, img, repeated(byte(s+1), sector), s*sector)
			}
		})
		top := overlay(t, qcow.CreateOptions{Size: z.disk, ClusterSize: zeroCluster * sector}, "base", "qcow2")
		if z.own {
			copy(content[zeroCluster*sector:], repeated(0xee, zeroCluster*sector))
			img := open(t, top, qcow.Options{Gate: f.gate})
			writeAt(t, img, repeated(0xee, zeroCluster*sector), zeroCluster*sector)
			if err := img.Close(); err != nil {
				t.Fatal(err)
			}
		}
		for first := int64(0); first < z.disk/sector; first++ {
			for end := first + 1; end <= z.disk/sector; end++ {
				z.test(t, f, top.Bytes(), content, first, end, (first+end)%2 == 0)
			}
		}
	}
}

func (z *zeroPlaces) test(t *testing.T, f files, image, content []byte, first, end int64, mayUnmap bool) {
	t.Helper()
	what := fmt.Sprintf("%+v: sectors %d to %d, unmap %v", *z, first, end, mayUnmap)
	top, want := storage.NewMemoryFrom(image), bytes.Clone(content)
	img := open(t, top, qcow.Options{Gate: f.gate, ReserveBytes: 1})
	if err := img.WriteZeroes(first*sector, (end-first)*sector, mayUnmap); err != nil {
		t.Fatal(err)
	}
	clear(want[first*sector : end*sector])
	expect(t, what, diskOf(t, img), want)
	for c, got := range kindsOf(t, img) {
		start := int64(c) * zeroCluster
		marked := got == qcow.ExtentZero && first <= start && end >= min(start+zeroCluster, z.disk/sector)
		if want := z.kind(int64(c), first, end, mayUnmap); got != want && !(want == qcow.ExtentUnallocated && marked) {
			t.Errorf("%s: cluster %d is %v, want %v", what, c, got, want)
		}
	}
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	(&chain{t: t, files: files{"top": top}}).expectClean("top")
}

// Zeroes at the end of a disk that ends inside a cluster, which a backing file may have data in.
func TestZeroesAtTheEnd(t *testing.T) {
	const cluster, size = 4096, 128<<20 + 2048
	const nothing, zero, data = qcow.ExtentUnallocated, qcow.ExtentZero, qcow.ExtentData
	for name, x := range map[string]struct {
		base      int64           // length of the backing file; 0: none
		write     span            // data in it
		half, all qcow.ExtentKind // the last cluster, when the second half of what the disk has of it is zeroed, and when all is
	}{
		"alone":                {0, span{}, nothing, nothing},
		"over a shorter file":  {128 << 20, span{127 << 20, 1 << 20}, nothing, nothing},
		"over nothing":         {size, span{0, 4096}, nothing, nothing},
		"over data":            {size, span{size - 2048, 2048}, data, zero},
		"over the second half": {size, span{size - 1024, 1024}, zero, zero},
		"over the first half":  {size, span{size - 2048, 1024}, nothing, zero},
		"over a longer file":   {size + 8192, span{size - 2048, 8192}, data, zero},
		"over data behind it":  {size + 8192, span{size, 8192}, nothing, nothing},
	} {
		t.Run(name, func(t *testing.T) {
			f, o := files{}, qcow.CreateOptions{Size: size, ClusterSize: cluster}
			want := sparseDisk{}
			if x.base > 0 {
				base := create(t, qcow.CreateOptions{Size: x.base, ClusterSize: sector})
				change(t, base, func(img *qcow.Image) {
					writeAt(t, img, want.write(x.write.off, x.write.n, 0), x.write.off)
				})
				want.zero(size, 8192)
				f["base"], o.BackingFile, o.BackingFormat = base, "base", "qcow2"
			}
			top := create(t, o)
			img := open(t, top, qcow.Options{Gate: f.gate, ReserveBytes: 1})
			for _, x := range []struct {
				off, n int64
				kind   qcow.ExtentKind
			}{{size - 1024, 1024, x.half}, {size - 2048, 2048, x.all}} {
				if err := img.WriteZeroes(x.off, x.n, true); err != nil {
					t.Fatal(err)
				}
				want.zero(x.off, x.n)
				expectAt(t, img, want.bytes(size-4096, 4096), size-4096)
				kinds := kindsOf(t, img)
				if got := kinds[len(kinds)-1]; got != x.kind {
					t.Fatalf("%d bytes zeroed: the last cluster is %v, want %v", x.n, got, x.kind)
				}
			}
			if err := img.Close(); err != nil {
				t.Fatal(err)
			}
			(&chain{t: t, files: files{"top": top}}).expectClean("top")
		})
	}
}

// Zeroes hide the backing file for good: what is written into them stands among zeroes, and they can be zeroed again.
func TestZeroesThenParts(t *testing.T) {
	require.Tool(t, "qemu-img")
	const k, size = 1 << 10, 4 << 20
	base := append(noise(rand.New(rand.NewPCG(3, 4)), 1<<20), make([]byte, 3<<20)...)
	for _, mayUnmap := range []bool{false, true} {
		c := &chain{
			t: t, files: files{"base": storage.NewMemoryFrom(base)}, names: []string{"base", "top"}, kinds: []string{"raw", ""},
			want: bytes.Clone(base),
		}
		c.files["top"] = overlay(t, qcow.CreateOptions{Size: size, ClusterSize: 4096}, "base", "raw")
		for i, s := range []struct {
			zero   bool
			off, n int64
		}{
			{true, 64 * k, 192 * k},
			{true, 513 * k, 13 * k},
			{false, 64 * k, 8 * k}, // aligned
			{false, 130*k + 512, 7 * k},
			{false, 254 * k, 4 * k}, // across the end of the zeroes
			{false, 512*k + 512, 1 * k},
			{true, 65 * k, 1 * k},
			{true, 64 * k, 192 * k},
			{true, 513 * k, 13 * k},
			{false, 200 * k, 512},
		} {
			img := c.open(qcow.Options{ReserveBytes: 1})
			p := make([]byte, s.n)
			var err error
			if s.zero {
				err = img.WriteZeroes(s.off, s.n, mayUnmap)
			} else {
				p = repeated(byte(i+1), s.n)
				_, err = img.WriteAt(p, s.off)
			}
			if err != nil {
				t.Fatal(err)
			}
			copy(c.want[s.off:], p)
			expect(t, fmt.Sprintf("step %d", i), diskOf(t, img), c.want)
			if err := img.Close(); err != nil {
				t.Fatal(err)
			}
			c.expectClean("top")
		}
		c.expectQEMU()
	}
}

// A zeroable is a cluster of some kind, in an image over a backing file of some kind.
type zeroable struct {
	kind   byte   // of the cluster, as in TestNeighboursOfEveryKind
	behind string // "", "data" or "hole"
	unmap  bool
}

// after returns what the cluster is when all of it was zeroed, and whether it has a place then.
func (z zeroable) after() (qcow.ExtentKind, bool) {
	stays := !z.unmap && z.kind == 'a'
	switch {
	case z.kind == 'd' && !z.unmap:
		return qcow.ExtentData, true
	case z.kind == 'z' || stays:
		return qcow.ExtentZero, stays
	case z.behind == "", z.kind == '.' && z.behind == "hole":
		return qcow.ExtentUnallocated, false
	}
	return qcow.ExtentZero, false
}

// Zeroing a cluster of any kind, in whole or in two parts, over anything, gives it back or keeps it, as is asked for. Doing so again changes
// no table.
func TestZeroesOverEveryKind(t *testing.T) {
	for _, kind := range []byte(".dcza") {
		for _, behind := range []string{"", "data", "hole"} {
			for _, mayUnmap := range []bool{false, true} {
				z := zeroable{kind, behind, mayUnmap}
				t.Run(fmt.Sprintf("%c/over=%s/unmap=%v", kind, behind, mayUnmap), func(t *testing.T) {
					z.test(t, []span{{4096, 4096}})
					z.test(t, []span{{4096, 1024}, {5120, 3072}})
				})
			}
		}
	}
}

// image makes the image, in which cluster 1 is the one that z speaks of.
func (z zeroable) image(t *testing.T) (*storage.Memory, files) {
	t.Helper()
	const cluster, size = 4096, 16 << 10
	f := files{"base": storage.NewMemoryFrom(make([]byte, size))}
	o := qcow.CreateOptions{Size: size, ClusterSize: cluster}
	if z.behind != "" {
		o.BackingFile, o.BackingFormat = "base", "raw"
	}
	if z.behind == "data" {
		f["base"] = storage.NewMemoryFrom(repeated(5, size))
	}
	m := newHandmade(t, o, nil)
	top := m.file()
	img := open(t, top, qcow.Options{Gate: f.gate, ReserveBytes: 1})
	writeAt(t, img, repeated(1, cluster), 0) // so that there is a table
	p := repeated(7, cluster)
	var err error
	switch z.kind {
	case 'd', 'a':
		_, err = img.WriteAt(p, cluster)
	case 'c':
		err = img.WriteCompressed(p, cluster)
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	m.b = top.Bytes()
	switch z.kind {
	case 'z':
		m.put(m.l2Entry(1), uint64(format.ZeroPlain))
	case 'a':
		m.put(m.l2Entry(1), m.entry(m.l2Entry(1))|uint64(format.ZeroPlain))
	}
	return m.file(), f
}

func (z zeroable) test(t *testing.T, requests []span) {
	t.Helper()
	top, f := z.image(t)
	rec := storage.NewRecorder(top)
	img := open(t, rec, qcow.Options{Gate: f.gate, ReserveBytes: 1})
	zero := func() {
		t.Helper()
		for _, s := range requests {
			if err := img.WriteZeroes(s.off, s.n, z.unmap); err != nil {
				t.Fatal(err)
			}
		}
	}
	zero()
	want := make([]byte, 16<<10)
	if z.behind == "data" {
		copy(want, repeated(5, 16<<10))
	}
	copy(want, repeated(1, 4096))
	clear(want[4096:8192])
	expect(t, "disk", diskOf(t, img), want)
	var e qcow.Extent
	for got, err := range img.Extents(4096, 4096) {
		if err != nil {
			t.Fatal(err)
		}
		if e = got; e.Depth > 0 {
			e.Kind = qcow.ExtentUnallocated
		}
	}
	kind, placed := z.after()
	if whole := len(requests) == 1; whole && (e.Kind != kind || placed != (e.Host != 0)) {
		t.Errorf("the cluster is %+v, want %v, with a place: %v", e, kind, placed)
	} else if !whole && z.kind == '.' && e.Kind == qcow.ExtentData && z.behind != "data" {
		t.Errorf("zeroes take a cluster: %+v", e)
	}
	before := len(rec.Ops())
	zero()
	for _, op := range rec.Ops()[before:] { // data may be written to, where it is
		if at := op.Offset - int64(e.Host); op.Kind != storage.OpWrite || e.Kind != qcow.ExtentData || at < 0 || at >= 4096 {
			t.Errorf("zeroes in place of zeroes: %v", op)
		}
	}
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	(&chain{t: t, files: files{"top": top}}).expectClean("top")
}
