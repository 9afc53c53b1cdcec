package qcow_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/qcow-csi/qcow-csi/qcow"
)

// Requests that meet clusters in every way, at the start of a large disk and behind 4 GiB, are read back among their neighbours. A
// compressed copy of the disk reads the same, also after requests that begin a sector inside its clusters.
func TestPatterns(t *testing.T) {
	for _, x := range []struct {
		cluster int
		n       int64
	}{{1 << 10, 4}, {4 << 10, 4}, {16 << 10, 3}, {64 << 10, 2}} {
		t.Run(fmt.Sprintf("cluster=%d", x.cluster), func(t *testing.T) {
			cluster := int64(x.cluster)
			o := qcow.CreateOptions{Size: 8 << 30, ClusterSize: x.cluster}
			f, want := create(t, o), sparseDisk{}
			spans := append(pattern(cluster, 0, x.n), pattern(cluster, 4<<30, x.n)...)
			img := open(t, f, qcow.Options{})
			want.writePattern(t, img, spans, 0)
			want.expect(t, img)

			packed := create(t, o)
			copied := open(t, packed, qcow.Options{})
			if err := qcow.Copy(t.Context(), copied, img, qcow.CopyOptions{Compress: true, TargetIsZero: true}); err != nil {
				t.Fatal(err)
			}
			closeClean(t, img, f)
			want.expect(t, copied)
			closeClean(t, copied, packed)

			copied = open(t, packed, qcow.Options{})
			for i := range spans {
				spans[i].off += 512
			}
			want.writePattern(t, copied, spans, 0x55)
			want.expect(t, copied)
			closeClean(t, copied, packed)
		})
	}
}

// Compressed clusters, others and none at all side by side stay what they are in every snapshot, while the disk goes on changing.
func TestMixedPatternUnderSnapshots(t *testing.T) {
	for _, x := range []struct {
		cluster          int
		n, periods, many int64
	}{{1 << 10, 2, 16, 1}, {4 << 10, 3, 64, 3}, {16 << 10, 2, 8, 1}, {64 << 10, 2, 3, 1}} {
		t.Run(fmt.Sprintf("cluster=%d", x.cluster), func(t *testing.T) {
			cluster := int64(x.cluster)
			f, want := create(t, qcow.CreateOptions{Size: 8 << 30, ClusterSize: x.cluster}), sparseDisk{}
			img := open(t, f, qcow.Options{ReserveBytes: 64 * cluster})
			var kept []sparseDisk
			want.writeMixed(t, img, 0, x.periods, 1)
			want.writeMixed(t, img, 4<<30, x.periods, 2)
			for i := range x.many {
				if _, err := img.CreateSnapshot(t.Context(), fmt.Sprint("s", i), time.Unix(1, 0)); err != nil {
					t.Fatal(err)
				}
				kept = append(kept, want.clone())
				want.writePattern(t, img, pattern(cluster, 4<<30, x.n), byte(10+i))
			}
			want.expect(t, img)
			closeClean(t, img, f)
			for i, disk := range kept {
				img := open(t, f, qcow.Options{ReadOnly: true, Snapshot: fmt.Sprint("s", i)})
				disk.expect(t, img)
				if err := img.Close(); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// What is written wherever a sector, a page or a cluster borders on a cluster, an L2 table or the ends of the disk is read back alone,
// and a discard makes it zero again.
func TestBordersOfEverything(t *testing.T) {
	const cluster, disk = 64 << 10, 1 << 40
	const table = cluster * cluster / 8
	for _, size := range []int64{512, 4096, cluster} {
		f, want := create(t, qcow.CreateOptions{Size: disk}), sparseDisk{}
		img := open(t, f, qcow.Options{ReserveBytes: 1})
		var spans []span
		for _, border := range []int64{0, cluster, table, 3 * table, disk} {
			for _, by := range []int64{0, 512, 4096, cluster} {
				for _, off := range []int64{border - by, border - by - size, border + by, border + 2*by, border - size/2/512*512} {
					if off >= 0 && off+size <= disk {
						spans = append(spans, span{off, size})
					}
				}
			}
		}
		for i, s := range spans {
			writeAt(t, img, want.write(s.off, s.n, byte(i)), s.off)
			first, end := max(s.off-4096, 0), min(s.off+s.n+4096, disk)
			expectAt(t, img, want.bytes(first, end-first), first)
		}
		want.expect(t, img)
		for i := 0; i < len(spans); i += 2 {
			s := spans[i]
			if err := img.Discard(s.off, s.n); err != nil {
				t.Fatal(err)
			}
			if first, end := wholeClusters(img, s.off, s.n); first < end {
				want.zero(first, end-first)
			}
		}
		want.expect(t, img)
		closeClean(t, img, f)
	}
}
