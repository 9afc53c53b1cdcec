package qcow_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/luks"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// qemuMeasure returns what qemu-img measure says, or the error it fails with. It repeats a run that failed because
// the clock of the processor time did not move while QEMU measured its hash.
func qemuMeasure(t *testing.T, args ...string) (qcow.Measurement, error) {
	t.Helper()
	args = append([]string{"measure", "--output=json", "-O", "qcow2"}, args...)
	for try := 0; ; try++ {
		out, err := exec.Command("qemu-img", args...).CombinedOutput()
		if err != nil && strings.Contains(string(out), "Unable to get accurate CPU usage") && try < 1000 {
			continue
		}
		if err != nil {
			return qcow.Measurement{}, fmt.Errorf("qemu-img %s: %w: %s", strings.Join(args, " "), err, out)
		}
		var m struct {
			Required       int64 `json:"required"`
			FullyAllocated int64 `json:"fully-allocated"`
		}
		if err := json.Unmarshal(out, &m); err != nil {
			t.Fatal(err)
		}
		return qcow.Measurement{Required: m.Required, FullyAllocated: m.FullyAllocated}, nil
	}
}

// measurePlan is a planned image, and what qemu-img measure is told of it.
type measurePlan struct {
	o      qcow.CreateOptions
	source iter.Seq2[qcow.Extent, error]
	opts   []string
}

func measureLong() bool { return os.Getenv("QCOW_CSI_LONG") == "1" }

// measurePlans returns every cluster size with both formats of L2 entries; refcount widths and preallocations take
// turns, and all meet all in the long form.
func measurePlans() []measurePlan {
	var all []measurePlan
	widths, preallocations := []int{16, 1, 64, 2, 32}, []string{"off", "metadata", "falloc", "full"}
	for bits := 9; bits <= 21; bits++ {
		for _, extended := range []bool{false, true} {
			if extended && bits < 14 {
				continue
			}
			turn := len(all)
			for i, width := range widths {
				for k, prealloc := range preallocations {
					if !measureLong() && (i != turn%len(widths) || k != turn%len(preallocations)) {
						continue
					}
					p := measurePlan{
						o:    qcow.CreateOptions{ClusterSize: 1 << bits, RefcountBits: width, ExtendedL2: extended, Preallocation: qcow.Preallocation(k)},
						opts: []string{fmt.Sprintf("cluster_size=%d,refcount_bits=%d,preallocation=%s", 1<<bits, width, prealloc)},
					}
					if extended {
						p.opts = append(p.opts, "extended_l2=on")
					}
					all = append(all, p)
				}
			}
		}
	}
	return all
}

func (p measurePlan) String() string { return strings.Join(p.opts, ",") }

// compare measures the plan both ways.
func (p measurePlan) compare(t *testing.T, source ...string) {
	t.Helper()
	args := source
	if len(p.opts) > 0 {
		args = append([]string{"-o", p.String()}, source...)
	}
	want, wantErr := qemuMeasure(t, args...)
	got, err := qcow.Measure(p.o, p.source)
	if (err != nil) != (wantErr != nil) || got != want {
		t.Errorf("%v %v, %d bytes: %+v, error %v, want %+v, error %v", p, source, p.o.Size, got, err, want, wantErr)
	}
}

// TestMeasureSizes measures empty images, at sizes around those where a table grows.
func TestMeasureSizes(t *testing.T) {
	require.Tool(t, "qemu-img")
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	for _, p := range measurePlans() {
		cluster := int64(p.o.ClusterSize)
		span := cluster * cluster / 8 // of an L2 table
		for _, size := range []int64{0, 512, cluster, span - 512, span + 512, span / 2 * (cluster / 8), 10 << 30, rng.Int64N(1<<40) &^ 511} {
			p.o.Size = size
			p.compare(t, "--size", fmt.Sprint(size))
		}
	}
}

// rawExtents are the extents of a sparse raw file.
func rawExtents(f *os.File) iter.Seq2[qcow.Extent, error] {
	return func(yield func(qcow.Extent, error) bool) {
		for end := int64(0); ; {
			start, err := f.Seek(end, unix.SEEK_DATA)
			if errors.Is(err, unix.ENXIO) {
				return
			}
			if err == nil {
				end, err = f.Seek(start, unix.SEEK_HOLE)
			}
			if !yield(qcow.Extent{Offset: start, Length: end - start, Kind: qcow.ExtentData}, err) || err != nil {
				return
			}
		}
	}
}

// TestMeasureSources measures images that shall hold sparse raw files.
func TestMeasureSources(t *testing.T) {
	require.Tool(t, "qemu-img")
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	for _, size := range []int64{512, 1 << 20, 300<<20 + 12*512, 5 << 30} {
		path := filepath.Join(t.TempDir(), "raw")
		f, err := os.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := f.Close(); err != nil {
				t.Error(err)
			}
		})
		if err := f.Truncate(size); err != nil {
			t.Fatal(err)
		}
		for range 60 {
			off := rng.Int64N(size)
			if _, err := f.WriteAt(slices.Repeat([]byte{1}, int(min(rng.Int64N(300_000), size-off))), off); err != nil {
				t.Fatal(err)
			}
		}
		for _, p := range measurePlans() {
			p.o.Size, p.source = size, rawExtents(f)
			p.compare(t, "-f", "raw", path)
		}
		backing := measurePlan{o: qcow.CreateOptions{Size: size, BackingFile: "base", BackingFormat: "raw"}, source: rawExtents(f)}
		backing.opts = []string{"backing_file=base,backing_fmt=raw"}
		backing.compare(t, "-f", "raw", path)
		plain := measurePlan{o: qcow.CreateOptions{Size: size}, source: rawExtents(f)}
		plain.compare(t, "-f", "raw", path)
		plain.opts = []string{"compat=0.10"}
		plain.compare(t, "-f", "raw", path)
	}
}

// TestMeasureImage measures copies of an image of the engine, with other cluster sizes.
func TestMeasureImage(t *testing.T) {
	require.Tool(t, "qemu-img")
	path := filepath.Join(t.TempDir(), "image.qcow2")
	f, err := storage.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	const size = 100 << 20
	if err := qcow.Create(f, qcow.CreateOptions{Size: size, ClusterSize: 4096}); err != nil {
		t.Fatal(err)
	}
	img, err := qcow.Open(f, qcow.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for i := range int64(40) {
		if _, err := img.WriteAt(slices.Repeat([]byte{1}, 5000), i*i*60_000); err != nil {
			t.Fatal(err)
		}
	}
	if err := img.Flush(); err != nil {
		t.Fatal(err)
	}
	for _, p := range measurePlans() {
		p.o.Size, p.source = size, img.Extents(0, size)
		p.compare(t, "-U", "-f", "qcow2", path)
	}
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	if got, err := qcow.Measure(qcow.CreateOptions{Size: size}, img.Extents(0, size)); !errors.Is(err, qcow.ErrClosed) {
		t.Errorf("of a closed image: %+v, error %v", got, err)
	}
}

// TestMeasureEncrypted measures with the LUKS header of package luks. It takes QEMU seconds each.
func TestMeasureEncrypted(t *testing.T) {
	require.Tool(t, "qemu-img")
	t.Parallel()
	for _, c := range []struct {
		cluster int
		o       luks.CreateOptions
		opts    string
	}{
		{64 << 10, luks.CreateOptions{}, ""},
		{2 << 20, luks.CreateOptions{Cipher: "aes-128", Mode: "cbc"}, ",encrypt.cipher-alg=aes-128,encrypt.cipher-mode=cbc"},
	} {
		if c.cluster > 64<<10 && !measureLong() {
			continue
		}
		p := measurePlan{
			o:    qcow.CreateOptions{Size: 1 << 30, ClusterSize: c.cluster, Encryption: &qcow.EncryptionOptions{CreateOptions: c.o}},
			opts: []string{fmt.Sprintf("cluster_size=%d,encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10%s", c.cluster, c.opts)},
		}
		p.compare(t, "--object", "secret,id=s,data=pw", "--size", "1G")
	}
}

func TestMeasureRefuses(t *testing.T) {
	require.Tool(t, "qemu-img")
	for _, p := range []measurePlan{ // QEMU too
		{o: qcow.CreateOptions{ClusterSize: 1000}, opts: []string{"cluster_size=1000"}},
		{o: qcow.CreateOptions{ClusterSize: 4 << 20}, opts: []string{"cluster_size=4M"}},
		{o: qcow.CreateOptions{RefcountBits: 3}, opts: []string{"refcount_bits=3"}},
		{o: qcow.CreateOptions{ClusterSize: 8192, ExtendedL2: true}, opts: []string{"cluster_size=8192,extended_l2=on"}},
		{o: qcow.CreateOptions{ClusterSize: 512, Size: 128<<30 + 512}, opts: []string{"cluster_size=512"}},
		{o: qcow.CreateOptions{Size: 1<<50 + 1<<50, ExtendedL2: true}, opts: []string{"extended_l2=on"}},
	} {
		p.compare(t, "--size", fmt.Sprint(p.o.Size))
		if _, err := qcow.Measure(p.o, p.source); !errors.Is(err, qcow.ErrInvalid) {
			t.Errorf("%v: %v", p, err)
		}
	}
	if _, err := qcow.Measure(qcow.CreateOptions{Size: -512}, nil); !errors.Is(err, qcow.ErrInvalid) {
		t.Errorf("negative size: %v", err)
	}
}
