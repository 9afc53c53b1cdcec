package interop_test

import (
	"errors"
	"fmt"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// fullTable makes an image whose refcount table of so many clusters has an entry for each of its blocks, and whose refcounts are all 1: the
// header, that table, the blocks, the L1 table, L2 tables, and data, which is a hole of the file. It returns how many bytes of the disk have data.
func fullTable(t *testing.T, path string, tables uint64) (data int64) {
	t.Helper()
	const (
		cluster = 512
		size    = 16 << 30
		l1      = size / cluster / 64 * format.EntrySize / cluster // clusters of the L1 table
	)
	var (
		blocks   = tables * cluster / format.EntrySize
		clusters = blocks * cluster * 8 / 64 // a block has 64 refcounts
		firstL1  = 1 + tables + blocks
		firstL2  = firstL1 + l1
		rest     = clusters - firstL2
		l2       = (rest + 64) / 65 // each leads to 64 clusters of data, the last one perhaps to fewer
	)
	b := make([]byte, (firstL2+l2)*cluster)
	h := format.Header{
		Geometry: format.Geometry{ClusterBits: 9, RefcountOrder: 6}, Version: 3, Size: size,
		L1Offset: format.HostOffset(firstL1 * cluster), L1Entries: l1 * cluster / format.EntrySize,
		RefcountTableOffset: cluster, RefcountTableClusters: uint32(tables), HeaderLength: 112,
	}
	header, err := h.Encode()
	if err != nil {
		t.Fatal(err)
	}
	copy(b, header)
	for i := range blocks {
		format.PutEntry(b[cluster:], i, (1+tables+i)*cluster)
		for k := range uint64(cluster / 8) {
			format.PutRefcount(b[(1+tables+i)*cluster:], h.RefcountOrder, k, 1)
		}
	}
	for i := range l2 {
		format.PutEntry(b[firstL1*cluster:], i, uint64(format.NewL1Entry(format.HostOffset((firstL2+i)*cluster), true)))
	}
	for i := range rest - l2 {
		format.PutEntry(b[firstL2*cluster:], i, uint64(format.NewL2Entry(format.HostOffset((firstL2+l2+i)*cluster), true)))
	}
	f, err := storage.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteAt(b, 0)
	if err := errors.Join(err, f.Truncate(int64(clusters*cluster)), f.Close()); err != nil {
		t.Fatal(err)
	}
	return int64(rest-l2) * cluster
}

// TestFullRefcountTable writes to an image whose large refcount table has not a single entry left.
func TestFullRefcountTable(t *testing.T) {
	require.Tool(t, "qemu-img")
	tables := uint64(128)
	if long() {
		tables = 512
	}
	path := imagePath(t)
	data := fullTable(t, path, tables)
	reportOf(t, path)
	img := open(t, path, storage.ReadWrite)
	p := noise()[:1<<20]
	for _, off := range []int64{data + 1<<20, 15 << 30, data - 512} {
		if _, err := img.WriteAt(p, off); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(p))
		if _, err := img.ReadAt(got, off); err != nil {
			t.Fatal(err)
		}
		disk(p).mustEqual(t, got)
	}
	closeImage(t, img)
	mustBeClean(t, path)
}

// TestTablesLargerThanBlocks preallocates a disk whose L1 table and whose refcount table are each longer than what two refcount blocks
// describe, so that some blocks describe nothing but such clusters.
func TestTablesLargerThanBlocks(t *testing.T) {
	require.Tool(t, "qemu-img")
	const size = 256 << 20
	path := imagePath(t)
	create(t, path, qcow.CreateOptions{Size: size, ClusterSize: 512, RefcountBits: 64, Preallocation: qcow.PreallocationMetadata})
	report := reportOf(t, path)
	if report.TotalClusters != size/512 || report.AllocatedClusters != size/512 {
		t.Errorf("%d of %d clusters are allocated", report.AllocatedClusters, report.TotalClusters)
	}
	before := report.ImageEnd
	img := open(t, path, storage.ReadWrite)
	if _, err := img.WriteAt(noise()[:1<<20], size-1<<20); err != nil {
		t.Fatal(err)
	}
	if n := img.Info().FileSize; n != before {
		t.Errorf("the file has %d bytes, before the write it had %d", n, before)
	}
	closeImage(t, img)
	mustBeClean(t, path)
}

// TestRefcountTableGrowsWithItsOwnBlock grows a preallocated disk over the end of what its refcount table leads to: the block that comes next describes
// itself, and the table that takes it in.
func TestRefcountTableGrowsWithItsOwnBlock(t *testing.T) {
	require.Tool(t, "qemu-img")
	const k = 1 << 10
	for _, old := range []int64{64512 * k, 64513 * k} {
		for _, theirs := range []bool{true, false} {
			if theirs && old != 64512*k && !long() { // it takes QEMU seconds
				continue
			}
			t.Run(fmt.Sprintf("size=%d/by QEMU=%v", old, theirs), func(t *testing.T) {
				path := imagePath(t)
				if theirs {
					run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=1k,preallocation=metadata", path, fmt.Sprint(old))
				} else {
					create(t, path, qcow.CreateOptions{Size: old, ClusterSize: k, Preallocation: qcow.PreallocationMetadata})
				}
				img := open(t, path, storage.ReadWrite)
				const size = 65 << 20
				if err := img.Resize(t.Context(), size); err != nil {
					t.Fatal(err)
				}
				p := noise()[:3<<20]
				for off := int64(62 << 20); off < size; off += 130 * k {
					n := min(130*k, size-off)
					if _, err := img.WriteAt(p[off-62<<20:][:n], off); err != nil {
						t.Fatal(err)
					}
				}
				got := make([]byte, len(p))
				if _, err := img.ReadAt(got, 62<<20); err != nil {
					t.Fatal(err)
				}
				disk(p).mustEqual(t, got)
				closeImage(t, img)
				mustBeClean(t, path)
				mustMapAlike(t, path)
			})
		}
	}
}

// TestDirectRequests does requests of any alignment on a file that takes only whole pages, or sectors, past the page cache: with clusters that
// are smaller than these too.
func TestDirectRequests(t *testing.T) {
	require.Tool(t, "qemu-img")
	rng := random(t)
	for _, s := range []shape{{512, 16}, {2048, 16}, {65536, 16}} {
		t.Run(s.String(), func(t *testing.T) {
			path, d := imagePath(t), make(disk, 1<<20+512)
			create(t, path, qcow.CreateOptions{Size: int64(len(d)), ClusterSize: s.clusterSize})
			for range 2 {
				f, err := storage.OpenWith(path, storage.Options{Mode: storage.ReadWrite, Direct: true})
				require.Feature(t, !errors.Is(err, storage.ErrUnsupported), "needs a temporary directory with direct I/O")
				if err != nil {
					t.Fatal(err)
				}
				img, err := qcow.Open(f, qcow.Options{})
				if err != nil {
					t.Fatal(err)
				}
				copy(d[777*512:], noise()[:512])
				if _, err := img.WriteAt(noise()[:512], 777*512); err != nil { // perhaps where nothing is
					t.Fatal(err)
				}
				aligned := storage.AlignedBuffer(64<<10, max(f.DirectAlignment(), 512))
				copy(aligned, noise())
				copy(d[256<<10:], aligned)
				if _, err := img.WriteAt(aligned, 256<<10); err != nil {
					t.Fatal(err)
				}
				scribble(t, rng, img, d, s.clusterSize, 60)
				if n, err := img.ReadAt(aligned, 256<<10); err != nil {
					t.Fatal(n, err)
				}
				d[256<<10:][:64<<10].mustEqual(t, aligned)
				closeImage(t, img)
				mustBeClean(t, path)
				d.mustEqualHere(t, path)
			}
			d.mustEqualThere(t, path)
		})
	}
}
