package qcow_test

import (
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/check"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// lengths tells what was done to a file: the lengths of writes, and "sync".
func lengths(ops []storage.Op) (list []string) {
	for _, op := range ops {
		switch op.Kind {
		case storage.OpWrite:
			list = append(list, fmt.Sprint(len(op.Data)))
		case storage.OpMark:
		default:
			list = append(list, op.String())
		}
	}
	return list
}

// A write that maps clusters costs one write of data, with what is copied, one sync, and one write of their entries; where the guest reads zeroes
// so far nothing is copied and nothing synced.
func TestCopyOnWriteOperations(t *testing.T) {
	const k = 1 << 10
	type request struct {
		off, n int64
		want   []string
	}
	for name, x := range map[string]struct {
		layer
		before   func(t *testing.T, img *qcow.Image)
		requests []request
	}{
		// The backing file has data up to 4 MiB, and nothing from there on.
		"clusters": {layer{cluster: 64 * k}, nil, []request{
			{100, 10, []string{"65536", "sync", "8"}},
			{110, 10, []string{"10"}},                                                 // has its cluster now
			{65 * k, 200 * k, []string{"262144", "sync", "32"}},                       // four clusters, both ends copied
			{320 * k, 128 * k, []string{"131072", "sync", "16"}},                      // nothing to copy
			{449 * k, 2046 * k, []string{"65536", "1966080", "65536", "sync", "256"}}, // long: the ends go alone
			{4096*k + 5, 100, []string{"100", "8"}},                                   // nothing there
			{4160 * k, 300 * k, []string{"307200", "40"}},                             // nothing there
			{4000 * k, 80 * k, []string{"131072", "sync", "16"}},
			{4032*k - 1, 1, []string{"1"}},
		}},
		"subclusters": {layer{kind: "extended", cluster: 64 * k}, nil, []request{
			{100, 10, []string{"2048", "sync", "16"}},
			{110, 10, []string{"10"}},
			{2047, 2, []string{"1", "2048", "sync", "16"}},                          // a subcluster that is there, and one that is not
			{20 * k, 8 * k, []string{"8192", "sync", "16"}},                         // nothing to copy
			{63 * k, 66 * k, []string{"2048", "sync", "16", "67584", "sync", "32"}}, // the rest of a cluster, then new ones
			{4097 * k, 10, []string{"10", "16"}},                                    // nothing there
			{4097*k + 500, 10, []string{"10"}},
			{4200 * k, 200 * k, []string{"204800", "64"}}, // nothing there
		}},
		"encrypted": {layer{kind: "luks", cluster: 4 * k}, nil, []request{
			{4 * k, 512, []string{"4096", "sync", "8"}},
			{4*k + 512, 512, []string{"512"}},
			{53 * k, 512, []string{"4096", "sync", "8"}}, // zeroes in the file are none to the guest
		}},
		"zero clusters": {layer{cluster: 4 * k}, func(t *testing.T, img *qcow.Image) {
			if err := img.WriteZeroes(0, 64*k, true); err != nil {
				t.Fatal(err)
			}
		}, []request{
			{100, 10, []string{"10", "8"}},
			{6 * k, 20 * k, []string{"20480", "48"}},
			{62 * k, 4 * k, []string{"2048", "8", "4096", "sync", "8"}}, // half of it on zeroes, half on data
		}},
		"a snapshot's": {layer{cluster: 4 * k}, func(t *testing.T, img *qcow.Image) {
			writeAt(t, img, repeated(7, 64*k), 0)
			if _, err := img.CreateSnapshot(t.Context(), "one", time.Unix(1, 0)); err != nil {
				t.Fatal(err)
			}
		}, []request{
			{100, 10, []string{"4096", "sync", "8"}},
			{6 * k, 20 * k, []string{"24576", "sync", "48"}},
			{100, 10, []string{"10"}},
		}},
	} {
		t.Run(name, func(t *testing.T) {
			size := int64(32 << 20)
			if x.kind == "luks" {
				size = 72 * k
			}
			x.size = size
			f := files{"base": storage.NewMemoryFrom(repeated(5, min(4<<20, size-24*k)))}
			top := x.make(t)
			if err := qcow.RebaseUnsafe(top, "base", "raw"); err != nil {
				t.Fatal(err)
			}
			rec := storage.NewRecorder(top)
			img := open(t, rec, qcow.FilledByTakers(qcow.Options{Gate: f.gate, Passphrase: []byte(passphrase)}))
			fillReserve(t, img, rec)
			if x.before != nil {
				x.before(t, img)
			}
			want := diskOf(t, img)
			for _, r := range x.requests {
				from := len(rec.Ops())
				p := repeated(8, r.n)
				writeAt(t, img, p, r.off)
				copy(want[r.off:], p)
				if got := lengths(rec.Ops()[from:]); r.want != nil && !slices.Equal(got, r.want) {
					t.Errorf("%d bytes at %d: %v, want %v", r.n, r.off, got, r.want)
				}
				expect(t, "disk", diskOf(t, img), want)
			}
			if err := img.Close(); err != nil {
				t.Fatal(err)
			}
			report, err := check.Check(t.Context(), top, check.Options{})
			if err != nil || !report.Clean() {
				t.Fatalf("check: %v, %v", report, err)
			}
		})
	}
}

// fillReserve writes to the last part of the disk until there are tables, and more in reserve than any request here needs.
func fillReserve(t *testing.T, img *qcow.Image, rec *storage.Recorder) {
	t.Helper()
	size, cluster := img.Size(), int64(img.Info().ClusterSize)
	for off := max(size/4, 56<<10); off+cluster <= size; off += cluster {
		writeAt(t, img, repeated(6, 512), off)
		if ops := rec.Ops(); len(ops) > 3 && slices.ContainsFunc(ops[len(ops)-4:], func(op storage.Op) bool {
			return op.Kind == storage.OpPunch && op.Length >= 40*cluster
		}) {
			return
		}
	}
}

// TestConcurrentCopyOnWrite lets many goroutines at an image over a backing file: their requests share clusters and subclusters, and each finds
// what the others, or the backing file, have beside its own.
func TestConcurrentCopyOnWrite(t *testing.T) {
	const owners, each, shared = 6, 24<<10 + 300, 16 << 10
	for _, l := range []layer{{cluster: 512}, {cluster: 4096}, {cluster: 64 << 10}, {kind: "extended"}, {kind: "extended", cluster: 64 << 10}} {
		for _, seed := range testSeeds(t, 1, 50) {
			t.Run(fmt.Sprintf("%s%d/seed=%d", l.kind, l.cluster, seed), func(t *testing.T) {
				rng := rand.New(rand.NewPCG(seed, 3))
				l.size = (int64(shared+owners*each)/sector + 1) * sector
				base := append(make([]byte, shared), noise(rng, l.size-shared-5000)...)
				clear(base[40<<10 : 60<<10])
				f := files{"base": storage.NewMemoryFrom(base), "top": l.make(t)}
				if err := qcow.RebaseUnsafe(f["top"], "base", "raw"); err != nil {
					t.Fatal(err)
				}
				img := open(t, restless(f["top"]), qcow.Options{Gate: f.gate, CacheBytes: 1, ReserveBytes: 128 << 10})
				tr := newTraffic(t, img, seed, owners, each, shared)
				for _, o := range tr.owners {
					copy(o.want, base[min(o.start, int64(len(base))):])
				}
				tr.run(150)
				if err := img.Close(); err != nil {
					t.Fatal(err)
				}
				again := open(t, f["top"], qcow.Options{Gate: f.gate, ReadOnly: true})
				for _, o := range tr.owners {
					if err := o.verify(again, 0, int64(len(o.want))); err != nil {
						t.Error(err)
					}
				}
				if err := again.Close(); err != nil {
					t.Fatal(err)
				}
				report, err := check.Check(t.Context(), f["top"], check.Options{})
				if err != nil || !report.Clean() {
					t.Fatalf("check: %v, %v", report, err)
				}
			})
		}
	}
}

// iotests 027, 037 and 265: parts of clusters, also in descending order, written by this engine and by QEMU, read alike.
func TestPartsOfClusters(t *testing.T) {
	require.Tool(t, "qemu-img", "qemu-io")
	for _, kind := range []string{"", "extended"} {
		l := layer{kind: kind, size: 128 << 10, cluster: 32 << 10}
		dir := t.TempDir()
		base := noise(rand.New(rand.NewPCG(6, 6)), l.size-700)
		writeFile(t, filepath.Join(dir, "base"), base)
		f := files{"base": storage.NewMemoryFrom(base), "top": l.make(t)}
		if err := qcow.RebaseUnsafe(f["top"], "base", "raw"); err != nil {
			t.Fatal(err)
		}
		writeFile(t, filepath.Join(dir, "theirs"), contentOf(t, f["top"]))
		img := open(t, f["top"], qcow.Options{Gate: f.gate})
		args := []string{"-f", "qcow2"}
		for _, x := range [][2]int64{{31 << 10, 512}, {30 << 10, 512}, {1 << 10, 512}, {0, 512}, {33<<10 + 512, 8 << 10}, {60 << 10, 8 << 10}, {100 << 10, 28 << 10}, {97 << 10, 512}, {66 << 10, 512}, {65 << 10, 512}} {
			writeAt(t, img, repeated(9, x[1]), x[0])
			args = append(args, "-c", fmt.Sprintf("write -P 9 %d %d", x[0], x[1]))
		}
		if err := img.Close(); err != nil {
			t.Fatal(err)
		}
		run(t, "qemu-io", append(args, filepath.Join(dir, "theirs"))...)
		writeFile(t, filepath.Join(dir, "ours"), contentOf(t, f["top"]))
		run(t, "qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", filepath.Join(dir, "ours"), filepath.Join(dir, "theirs"))
		run(t, "qemu-img", "check", "-q", "-f", "qcow2", filepath.Join(dir, "ours"))
		if kind == "extended" { // nothing more was copied than QEMU copied
			theirs := entriesOf(t, storage.NewMemoryFrom(readFile(t, filepath.Join(dir, "theirs"))))
			for cluster, e := range entriesOf(t, f["top"]) {
				if e.Subclusters != theirs[cluster].Subclusters {
					t.Errorf("cluster %d has the subclusters %#x, QEMU's %#x", cluster, uint64(e.Subclusters), uint64(theirs[cluster].Subclusters))
				}
			}
		}
	}
}
