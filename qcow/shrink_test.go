package qcow_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"testing"
	"time"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// resize lets the engine or QEMU change the size of the disk. When a disk grows that ends inside a cluster, QEMU shows what was cut off
// there before.
func (s *shelf) resize(qemu bool, size int64) {
	s.t.Helper()
	if qemu && (size < int64(len(s.want)) || int64(len(s.want))%s.cluster == 0) {
		s.run("qemu-img", "resize", "-q", "--shrink", "-f", "qcow2", s.path, fmt.Sprint(size))
	} else {
		s.engine(func(img *qcow.Image) error { return img.Resize(s.t.Context(), size) })
	}
	s.want = append(s.want[:min(size, int64(len(s.want)))], make([]byte, max(size-int64(len(s.want)), 0))...)
}

// TestShrinkWithQEMU lets the disk shrink and grow, by turns of the engine and of QEMU, with snapshots that keep what is cut off.
func TestShrinkWithQEMU(t *testing.T) {
	require.Tool(t, "qemu-img", "qemu-io")
	steps := 8
	if long() {
		steps = 80
	}
	for _, shape := range []struct {
		cluster, clusters int64
		options           string
		compressed        bool
		qemu              bool // whether QEMU may change the size
	}{
		{512, 200, "refcount_bits=1", false, true},
		{512, 150, "refcount_bits=64", true, true},
		{4096, 40, "compat=0.10", true, false}, // QEMU changes no size where there are snapshots
		{65536, 20, "refcount_bits=8", false, true},
		{16384, 40, "extended_l2=on", false, true},
		{65536, 20, "extended_l2=on", true, true},
		{2 << 20, 6, "refcount_bits=16", false, true},
	} {
		t.Run(fmt.Sprintf("cluster=%d,%s,compressed=%v", shape.cluster, shape.options, shape.compressed), func(t *testing.T) {
			t.Parallel()
			seed := rand.Uint64()
			t.Logf("seed %d", seed)
			most := shape.cluster * shape.clusters
			s := newShelf(t, seed, most, shape.cluster, shape.options, shape.compressed)
			for i := range steps {
				for range 3 {
					s.write(s.rng.IntN(2) == 0)
				}
				if i%4 == 1 {
					s.create(false)
				}
				qemu := shape.qemu && s.rng.IntN(3) == 0
				s.resize(qemu, s.rng.Int64N(most/sector)*sector)
				s.verify()
				if qemu = shape.qemu && s.rng.IntN(3) == 0; s.rng.IntN(3) > 0 {
					s.resize(qemu, most-s.rng.Int64N(shape.cluster/sector)*sector)
					s.verify()
				}
				if len(s.want) == 0 {
					s.resize(false, most)
				}
			}
			for len(s.kept) > 0 {
				s.apply(false)
				s.remove(false)
				s.verify()
			}
		})
	}
}

// dataIn returns how many bytes of a file are not in holes.
func dataIn(t *testing.T, f storage.File) (sum int64) {
	t.Helper()
	for off := int64(0); ; {
		start, end, err := f.NextData(off)
		if errors.Is(err, io.EOF) {
			return sum
		}
		if err != nil {
			t.Fatal(err)
		}
		sum += end - start
		off = end
	}
}

// What is cut off is given back to the file system, unless a snapshot needs it.
func TestShrinkGivesSpaceBack(t *testing.T) {
	const size, cluster = 1 << 20, 4096
	f := create(t, qcow.CreateOptions{Size: size, ClusterSize: cluster})
	img := open(t, f, qcow.Options{ReserveBytes: cluster})
	writeAt(t, img, repeated(1, size), 0)
	if err := img.Resize(t.Context(), 100<<10); err != nil {
		t.Fatal(err)
	}
	if left := dataIn(t, f); left > 130<<10 {
		t.Errorf("%d bytes are left", left)
	}
	if got, err := f.Size(); err != nil || got != img.Info().FileSize {
		t.Errorf("the file has %d bytes, and is said to have %d (%v)", got, img.Info().FileSize, err)
	}
	expectAt(t, img, repeated(1, 100<<10), 0)
	if err := img.Resize(t.Context(), size); err != nil {
		t.Fatal(err)
	}
	expectAt(t, img, make([]byte, size-100<<10), 100<<10)
	writeAt(t, img, repeated(2, size/2), size/2)
	if _, err := img.CreateSnapshot(t.Context(), "kept", time.Unix(1, 0)); err != nil {
		t.Fatal(err)
	}
	for _, to := range []int64{512, 0} {
		if err := img.Resize(t.Context(), to); err != nil {
			t.Fatal(err)
		}
		expectAt(t, img, repeated(1, to), 0)
	}
	if err := img.ApplySnapshot(t.Context(), "kept"); err != nil {
		t.Fatal(err)
	}
	expectAt(t, img, repeated(2, size/2), size/2)
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	expectClean(t, f.Bytes())
}

// An external data file is as long as the disk. Such an image has no snapshots.
func TestShrinkDataFile(t *testing.T) {
	require.Tool(t, "qemu-img")
	const size = 1 << 20
	for _, raw := range []string{"on", "off"} {
		s := &shelf{t: t, path: t.TempDir() + "/image.qcow2", cluster: 65536}
		s.run("qemu-img", "create", "-q", "-f", "qcow2", "-o", fmt.Sprintf("data_file=%s.data,data_file_raw=%s", s.path, raw), s.path, fmt.Sprint(size))
		f, data := storage.NewMemoryFrom(s.load()), storage.NewMemory()
		gate := func(qcow.Reference) (qcow.Opened, error) { return qcow.Opened{File: data, Format: "raw"}, nil }
		img := open(t, f, qcow.Options{Gate: gate})
		writeAt(t, img, repeated(1, size), 0)
		if err := img.Resize(t.Context(), 300<<10); err != nil {
			t.Fatal(err)
		}
		if n, err := data.Size(); err != nil || n != 300<<10 {
			t.Errorf("the data file has %d bytes (%v)", n, err)
		}
		if err := img.Resize(t.Context(), size); err != nil {
			t.Fatal(err)
		}
		expectAt(t, img, append(repeated(1, 300<<10), make([]byte, size-300<<10)...), 0)
		_, err := img.CreateSnapshot(t.Context(), "one", time.Unix(1, 0))
		expectClass(t, "create", err, qcow.ErrUnsupported)
		if err := img.Close(); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(data.Bytes()[:300<<10], repeated(1, 300<<10)) {
			t.Error("the data file differs")
		}
		s.store(f.Bytes())
		if err := os.WriteFile(s.path+".data", data.Bytes(), 0o600); err != nil {
			t.Fatal(err)
		}
		s.run("qemu-img", "check", "-f", "qcow2", s.path)
	}
}
