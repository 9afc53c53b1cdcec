package qcow_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/check"
	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/repair"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// at reads the image at rest in f.
func at(t testing.TB, f *storage.Memory) *handmade {
	t.Helper()
	m := &handmade{t: t, b: f.Bytes()}
	var err error
	if m.h, err = format.DecodeHeader(m.b); err != nil {
		t.Fatal(err)
	}
	return m
}

// refcount returns the refcount of the host cluster at off, which the first block describes.
func (m *handmade) refcount(off format.HostOffset) uint64 {
	return format.Refcount(m.b[m.block():], m.h.RefcountOrder, uint64(m.h.ClusterOf(off)))
}

// report checks the image.
func (m *handmade) report() *check.Report {
	m.t.Helper()
	r, err := check.Check(m.t.Context(), m.file(), check.Options{})
	if err != nil {
		m.t.Fatal(err)
	}
	return r
}

// repaired returns a file with the image after its repair, which leaves nothing to complain of, as QEMU sees it too.
func (m *handmade) repaired(mode repair.Mode) (*storage.Memory, *repair.Report) {
	m.t.Helper()
	f, report := m.mended(mode)
	expectClean(m.t, f.Bytes())
	return f, report
}

// mended is repaired without QEMU.
func (m *handmade) mended(mode repair.Mode) (*storage.Memory, *repair.Report) {
	m.t.Helper()
	f := m.file()
	report, err := repair.Run(m.t.Context(), f, repair.Options{Mode: mode})
	if err != nil {
		m.t.Fatal(err)
	}
	at(m.t, f).expectSound()
	return f, report
}

// expectSound is expectClean without QEMU.
func (m *handmade) expectSound() {
	m.t.Helper()
	if r := m.report(); !r.Clean() || r.Dirty || r.MarkedCorrupt {
		m.t.Fatalf("dirty %t, marked corrupt %t, %v", r.Dirty, r.MarkedCorrupt, r)
	}
}

// Compressed clusters that share a host cluster are given up one by one: the other stays what it is, and the host cluster goes with the
// last one.
func TestCompressedNeighboursAreDiscarded(t *testing.T) {
	const cluster = 64 << 10
	f := create(t, qcow.CreateOptions{Size: 1 << 20, ClusterSize: cluster})
	change(t, f, func(img *qcow.Image) {
		if err := img.WriteCompressed(append(repeated(1, cluster), repeated(2, cluster)...), 0); err != nil {
			t.Fatal(err)
		}
	})
	m := at(t, f)
	var hosts [2]format.HostOffset
	for i := range hosts {
		off, _ := format.L2Entry(m.entry(m.l2Entry(uint64(i)))).CompressedRange(m.h.Geometry)
		hosts[i] = m.h.OffsetOf(m.h.ClusterOf(off))
	}
	if hosts[0] != hosts[1] || m.refcount(hosts[0]) != 2 {
		t.Fatalf("the clusters lie at %#x, with %d references", hosts, m.refcount(hosts[0]))
	}
	for i, left := range []uint64{1, 0} {
		change(t, f, func(img *qcow.Image) {
			if err := img.Discard(int64(i)*cluster, cluster); err != nil {
				t.Fatal(err)
			}
			expectAt(t, img, make([]byte, cluster), int64(i)*cluster)
			if left == 1 {
				expectAt(t, img, repeated(2, cluster), cluster)
			}
		})
		expectClean(t, f.Bytes())
		if got := at(t, f).refcount(hosts[0]); got != left {
			t.Errorf("%d references after %d discards, want %d", got, i+1, left)
		}
	}
}

// A descriptor says in sectors how long the compressed data is. One that says too little makes its cluster unreadable, which no table
// tells; one that says too much does no harm to readers, even where other data or the end of the file lies in its range, but
// those clusters have too few references then, which a repair corrects.
func TestCompressedDescriptorOfAnotherLength(t *testing.T) {
	for _, bits := range []uint32{16, 21} {
		t.Run(fmt.Sprintf("cluster=%d", 1<<bits), func(t *testing.T) {
			cluster := int64(1) << bits
			rng := rand.New(rand.NewPCG(214, uint64(bits)))
			content := make([]byte, 3*cluster)
			for i := range content { // a random byte in four: a few hundred sectors each
				if content[i] = byte(i >> bits); i%4 == 0 {
					content[i] = byte(rng.Uint32())
				}
			}
			m := newHandmade(t, qcow.CreateOptions{Size: 8 * cluster, ClusterSize: int(cluster)}, func(img *qcow.Image) {
				if err := img.WriteCompressed(content, 0); err != nil {
					t.Fatal(err)
				}
			})
			entry := m.entry(m.l2Entry(1))
			shift := 62 - (bits - 8) // of the number of sectors
			m.put(m.l2Entry(1), entry-1<<shift)
			if r := m.report(); r.Corruptions > 0 || r.CompressedClusters != 3 {
				t.Errorf("too short: %v", r)
			}
			img := open(t, m.file(), qcow.Options{ReadOnly: true})
			n, err := img.ReadAt(make([]byte, 3*cluster), 0)
			expectClass(t, "too short", err, qcow.ErrCorrupt)
			if int64(n) != cluster {
				t.Errorf("%d bytes were read", n)
			}
			expectAt(t, img, content[2*cluster:], 2*cluster)

			for c := range uint64(3) { // the last one's range exceeds the file then
				m.put(m.l2Entry(c), m.entry(m.l2Entry(c))|(1<<62-1)&^(1<<shift-1))
			}
			f := m.file()
			change(t, f, func(img *qcow.Image) {
				expectAt(t, img, content, 0)
				writeAt(t, img, repeated(7, 2*cluster), 5*cluster) // where the ranges end now
				expectAt(t, img, content, 0)
			})
			m = at(t, f)
			low := 0
			for _, finding := range m.report().Findings {
				if finding.Kind == check.RefcountTooLow {
					low++
				}
			}
			if low == 0 {
				t.Errorf("no refcount is too low: %v", m.report())
			}
			f, report := m.repaired(repair.All)
			if report.Raised() == 0 || report.Lost() > 0 {
				t.Error(report)
			}
			change(t, f, func(img *qcow.Image) {
				expectAt(t, img, content, 0)
				expectAt(t, img, repeated(7, 2*cluster), 5*cluster)
				writeAt(t, img, repeated(8, cluster), 0)
				expectAt(t, img, content[cluster:], cluster)
			})
			expectClean(t, f.Bytes())
		})
	}
}

// A holed file does not store the n bytes at from, which nobody looks at: what lies behind them can be as far away as the format
// allows.
type holed struct {
	*storage.Memory
	from, n int64
}

func (h holed) place(off int64) int64 {
	if off < h.from {
		return off
	}
	if off < h.from+h.n {
		panic(fmt.Sprintf("somebody looks at %#x, into the hole", off))
	}
	return off - h.n
}

func (h holed) ReadAt(p []byte, off int64) (int, error) { return h.Memory.ReadAt(p, h.place(off)) }

func (h holed) WriteAt(p []byte, off int64) (int, error) { return h.Memory.WriteAt(p, h.place(off)) }

func (h holed) WriteSync(p []byte, off int64) (int, error) { return h.Memory.WriteAt(p, h.place(off)) }

func (h holed) PunchHole(off, n int64) error { return h.Memory.PunchHole(h.place(off), n) }

func (h holed) Truncate(size int64) error { return h.Memory.Truncate(h.place(size)) }

func (h holed) Size() (int64, error) {
	n, err := h.Memory.Size()
	return n + h.n, err
}

// A descriptor of a compressed cluster has fewer bits for the place than other entries have: with clusters of 2 MiB it reaches 512 TiB.
// Where the next free cluster is there, data can be written only uncompressed, and what could not be written has changed nothing.
func TestCompressedDataCannotLieSoFar(t *testing.T) {
	const (
		cluster  = 2 << 20
		reach    = 1 << 49
		perBlock = 4 * cluster // refcounts of two bits
	)
	m := newHandmade(t, qcow.CreateOptions{Size: 16 * cluster, ClusterSize: cluster, RefcountBits: 2}, nil)
	m.b = m.b[:(uint64(m.h.L1Offset)+cluster)&^(cluster-1)]
	for i := range uint64(reach / cluster / perBlock) { // refcounts of 1 for all clusters up to there
		block := uint64(m.block())
		if i > 0 {
			block = uint64(len(m.b))
			m.put(m.h.RefcountTableOffset+format.HostOffset(8*i), block)
			m.b = append(m.b, make([]byte, cluster)...)
		}
		copy(m.b[block:], bytes.Repeat([]byte{0x55}, cluster))
	}
	stored := int64(len(m.b))
	f := holed{storage.NewMemoryFrom(m.b), stored, reach - stored}
	img := open(t, f, qcow.Options{ReserveBytes: 1})
	compressible := repeated(1, 2*cluster)
	expectClass(t, "compressed", img.WriteCompressed(compressible, 0), qcow.ErrNoSpace)
	expectAt(t, img, make([]byte, 2*cluster), 0)
	writeAt(t, img, compressible, 0)
	expectClass(t, "compressed, over data", img.WriteCompressed(repeated(2, cluster), 0), qcow.ErrNoSpace)
	do(t, img.Flush())
	do(t, img.Close())
	img = open(t, f, qcow.Options{ReadOnly: true})
	expectAt(t, img, compressible, 0)
	for e, err := range img.Extents(0, 2*cluster) {
		if err != nil || e.Kind != qcow.ExtentData || e.Host < reach {
			t.Errorf("%+v, %v", e, err)
		}
	}
}

// Places behind 4 GiB have more bits than an int: compressed clusters there are none of those before.
func TestCompressedDataBehind4GiB(t *testing.T) {
	require.Tool(t, "qemu-img", "qemu-io")
	const cluster, far = 2 << 20, 4 << 30
	m := newHandmade(t, qcow.CreateOptions{Size: 64 * cluster, ClusterSize: cluster, RefcountBits: 2}, nil)
	used := m.report().ImageEnd / cluster
	for off := format.HostOffset(0); off < far; off += cluster {
		m.setRefcount(off, 1)
	}
	path := filepath.Join(t.TempDir(), "image.qcow2")
	writeFile(t, path, m.b)
	do(t, os.Truncate(path, far))
	f, err := storage.Open(path, storage.ReadWrite)
	do(t, err)
	content := append(repeated(1, cluster), repeated(2, cluster)...)
	img := open(t, f, qcow.Options{ReserveBytes: 1})
	do(t, img.WriteCompressed(content, 0))
	do(t, img.Close())
	run(t, "qemu-io", "-f", "qcow2", "-c", "write -c -P 3 4M 2M", path)

	f, err = storage.Open(path, storage.ReadOnly)
	do(t, err)
	report, err := check.Check(t.Context(), f, check.Options{MaxFindings: 1 << 12})
	do(t, err)
	if report.Corruptions > 0 || int64(report.Leaks) != far/cluster-used || report.CompressedClusters != 3 || report.ImageEnd < far {
		t.Errorf("%d leaks, %d corruptions, %d compressed clusters, ends at %#x", report.Leaks, report.Corruptions, report.CompressedClusters, report.ImageEnd)
	}
	img = open(t, f, qcow.Options{ReadOnly: true})
	expectAt(t, img, append(content, repeated(3, cluster)...), 0)
	do(t, img.Close())
	run(t, "qemu-io", "-f", "qcow2", "-r", "-c", "read -P 1 0 2M", "-c", "read -P 2 2M 2M", path)
	run(t, "qemu-img", "check", "-q", "-r", "leaks", "-f", "qcow2", path)
	run(t, "qemu-io", "-f", "qcow2", "-r", "-c", "read -P 1 0 2M", "-c", "read -P 2 2M 2M", "-c", "read -P 3 4M 2M", path)
}
