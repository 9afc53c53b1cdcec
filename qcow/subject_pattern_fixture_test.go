package qcow_test

import (
	"maps"
	"slices"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow"
)

// grain is the unit in which a sparseDisk knows its bytes: a quarter of the smallest cluster that patterns are made for.
const grain = 256

// A sparseDisk is what a large disk must hold: the value of each grain that does not read as zeroes.
type sparseDisk map[int64]byte

// write gives n bytes at off, whole grains, values that depend on where they are and on the salt. It returns them.
func (d sparseDisk) write(off, n int64, salt byte) []byte {
	for i := off / grain; i < (off+n)/grain; i++ {
		v := byte(i) ^ byte(i>>8)*5 ^ salt
		d[i] = max(v, 1)
	}
	return d.bytes(off, n)
}

// zero makes n bytes at off, whole grains, zeroes.
func (d sparseDisk) zero(off, n int64) {
	for i := off / grain; i < (off+n)/grain; i++ {
		delete(d, i)
	}
}

// bytes returns n bytes at off, whole grains.
func (d sparseDisk) bytes(off, n int64) []byte {
	p := make([]byte, n)
	for i := int64(0); i < n; i += grain {
		if v := d[(off+i)/grain]; v != 0 {
			copy(p[i:], repeated(v, grain))
		}
	}
	return p
}

// expect reads all that img has stored, and expects zeroes everywhere else.
func (d sparseDisk) expect(t testing.TB, img *qcow.Image) {
	t.Helper()
	const most = 1 << 20
	seen := 0
	for e, err := range img.Extents(0, img.Size()) {
		if err != nil {
			t.Fatal(err)
		}
		if e.Kind != qcow.ExtentData && e.Kind != qcow.ExtentCompressed {
			continue
		}
		first := e.Offset / grain * grain
		end := min((e.Offset+e.Length+grain-1)/grain*grain, img.Size())
		for off := first; off < end; off += most {
			want := d.bytes(off, min(most, end-off))
			expectAt(t, img, want, off)
			for i := 0; i < len(want); i += grain {
				if want[i] != 0 {
					seen++
				}
			}
		}
	}
	if seen != len(d) {
		t.Fatalf("%d grains of data are stored, the disk has %d", seen, len(d))
	}
}

func (d sparseDisk) clone() sparseDisk { return maps.Clone(d) }

// A span is n bytes at off.
type span struct{ off, n int64 }

// pattern returns spans that meet clusters in every way, behind base: whole clusters, their ends, their starts, their middles, two at
// half a cluster's phase, and three across the end of an L2 table. n is how many of the first; of most others there are more.
func pattern(cluster, base, n int64) (list []span) {
	at := base
	for _, p := range []struct{ first, size, step, count int64 }{
		{0, cluster, cluster, n},
		{cluster / 2, cluster / 2, cluster, n * n},
		{0, cluster / 2, cluster, n * n},
		{cluster / 4, cluster / 2, cluster, n * n},
		{cluster / 2, 2 * cluster, 3 * cluster, 4 * n * n},
	} {
		for i := range p.count {
			list = append(list, span{at + p.first + i*p.step, p.size})
		}
		at += p.count * p.step
	}
	table := cluster * cluster / 8 // bytes that an L2 table maps
	for at = (at + table) / table * table; n > 0; at, n = at+table, n-1 {
		list = append(list, span{at - 3*cluster/2, 3 * cluster})
	}
	return list
}

// writePattern writes the spans and reads each back at once, with a cluster before and behind it.
func (d sparseDisk) writePattern(t testing.TB, img *qcow.Image, spans []span, salt byte) {
	t.Helper()
	cluster := int64(img.Info().ClusterSize)
	for _, s := range spans {
		writeAt(t, img, d.write(s.off, s.n, salt), s.off)
		first := max(s.off-cluster, 0)
		end := min(s.off+s.n+cluster, img.Size())
		expectAt(t, img, d.bytes(first, end-first), first)
	}
}

// mixedPeriod is how the clusters of a mixed pattern are used, over and over again.
var mixedPeriod = []byte("dd.dcc..c") // data, nothing, compressed

// writeMixed writes so many periods of clusters at base, the compressed ones first.
func (d sparseDisk) writeMixed(t testing.TB, img *qcow.Image, base, periods int64, salt byte) {
	t.Helper()
	cluster := int64(img.Info().ClusterSize)
	for _, kind := range []byte("cd") {
		for i := range periods * int64(len(mixedPeriod)) {
			if mixedPeriod[i%int64(len(mixedPeriod))] != kind {
				continue
			}
			off := base + i*cluster
			p := d.write(off, cluster, salt)
			if kind == 'd' {
				writeAt(t, img, p, off)
			} else if err := img.WriteCompressed(p, off); err != nil {
				t.Fatal(err)
			}
		}
	}
	d.expect(t, img)
}

// kindsOf returns of what kind each cluster of the disk is in the image itself, as its first byte has it.
func kindsOf(t testing.TB, img *qcow.Image) (kinds []qcow.ExtentKind) {
	t.Helper()
	cluster := int64(img.Info().ClusterSize)
	for e, err := range img.Extents(0, img.Size()) {
		if err != nil {
			t.Fatal(err)
		}
		if e.Depth > 0 {
			e.Kind = qcow.ExtentUnallocated
		}
		for off := (e.Offset + cluster - 1) / cluster * cluster; off < e.Offset+e.Length; off += cluster {
			kinds = append(kinds, e.Kind)
		}
	}
	return kinds
}

// expectKinds expects the clusters of the disk to be of these kinds.
func expectKinds(t testing.TB, img *qcow.Image, want ...qcow.ExtentKind) {
	t.Helper()
	if got := kindsOf(t, img); !slices.Equal(got, want) {
		t.Fatalf("the clusters are %v, want %v", got, want)
	}
}

// closeClean closes an image, which must be without findings afterwards.
func closeClean(t testing.TB, img *qcow.Image, f interface{ Bytes() []byte }) {
	t.Helper()
	if err := img.Close(); err != nil {
		t.Fatalf("close: %v", err)
	}
	expectClean(t, f.Bytes())
}
