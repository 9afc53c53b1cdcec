package qcow_test

import (
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// fillUp writes clusters of the disk, by parts and in random order, until the file system is full, and returns what must be there.
func fillUp(t *testing.T, img *qcow.Image, want []byte, rng *rand.Rand) {
	t.Helper()
	for serial := byte(1); ; serial = serial%250 + 1 {
		n := 1 + rng.Int64N(20000)
		off := rng.Int64N(int64(len(want)) - n)
		p := repeated(serial, n)
		done, err := img.WriteAt(p, off)
		copy(want[off:], p[:done])
		if err == nil {
			continue
		}
		expectClass(t, "write", err, qcow.ErrNoSpace)
		expectClass(t, "write", err, syscall.ENOSPC)
		// What lies behind the part that is known to be written may have its old value or the new one.
		got := make([]byte, n)
		if _, err := img.ReadAt(got, off); err != nil {
			t.Fatal(err)
		}
		for i := range got {
			if i >= done && got[i] == serial {
				want[off:][i] = serial
			}
		}
		expectAt(t, img, want[off:][:n], off)
		return
	}
}

// testFullDisk fills the file system below f, looks whether everything that was acknowledged is there, before and after the image is opened
// again, frees space and goes on. reopen closes nothing.
func testFullDisk(t *testing.T, f storage.File, reopen func() storage.File, o qcow.CreateOptions) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	if err := qcow.Create(f, o); err != nil {
		t.Fatal(err)
	}
	want := make([]byte, o.Size)
	img := open(t, f, qcow.Options{})
	fillUp(t, img, want, rng)
	expectAt(t, img, want, 0)
	if err := img.Flush(); err != nil {
		t.Fatalf("flush on a full disk: %v", err)
	}
	expectAt(t, img, want, 0)
	if err := img.Close(); err != nil {
		t.Fatalf("close on a full disk: %v", err)
	}

	img = open(t, reopen(), qcow.Options{})
	expectAt(t, img, want, 0)
	half := o.Size / 2 / 65536 * 65536
	if err := img.Discard(0, half); err != nil {
		t.Fatalf("discard on a full disk: %v", err)
	}
	clear(want[:half])
	if err := img.Flush(); err != nil {
		t.Fatal(err)
	}
	expectAt(t, img, want, 0)
	writeAt(t, img, repeated(0xaa, half/2), 1000)
	copy(want[1000:], repeated(0xaa, half/2))
	fillUp(t, img, want, rng)
	expectAt(t, img, want, 0)
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	img = open(t, reopen(), qcow.Options{ReadOnly: true})
	expectAt(t, img, want, 0)
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestFullDiskInMemory(t *testing.T) {
	for _, o := range []qcow.CreateOptions{
		{Size: 4 << 20, ClusterSize: 512, RefcountBits: 64},
		{Size: 4 << 20, ClusterSize: 4096, RefcountBits: 1},
		{Size: 4 << 20, ClusterSize: 65536},
	} {
		f := storage.NewMemory()
		f.Limit(3<<20 + 777)
		testFullDisk(t, f, func() storage.File { return f }, o)
		expectClean(t, f.Bytes())
	}
}

// All of a file system's space is for the taking, whatever the size of the reserve.
func TestFullDiskUsesWhatThereIs(t *testing.T) {
	const limit, cluster = 3 << 20, 4096
	f := create(t, qcow.CreateOptions{Size: 8 << 20, ClusterSize: cluster})
	f.Limit(limit)
	img := open(t, f, qcow.Options{})
	written := int64(0)
	for off := int64(0); ; off += cluster {
		if _, err := img.WriteAt(repeated(1, cluster), off); err != nil {
			if !errors.Is(err, qcow.ErrNoSpace) {
				t.Fatal(err)
			}
			break
		}
		written += cluster
	}
	if written < limit-16*cluster {
		t.Errorf("the file system has %d bytes, but only %d could be written", limit, written)
	}
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	expectClean(t, f.Bytes())
}

func TestFullFileSystem(t *testing.T) {
	require.Root(t)
	for _, o := range []qcow.CreateOptions{
		{Size: 4 << 20, ClusterSize: 512, RefcountBits: 64},
		{Size: 4 << 20, ClusterSize: 4096},
		{Size: 4 << 20, ClusterSize: 65536},
	} {
		dir := t.TempDir()
		require.Feature(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=3m") == nil, "needs the right to mount")
		t.Cleanup(func() {
			if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
				t.Error(err)
			}
		})
		path := filepath.Join(dir, "full.qcow2")
		f, err := storage.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		testFullDisk(t, f, func() storage.File {
			f, err := storage.Open(path, storage.ReadWrite)
			if err != nil {
				t.Fatal(err)
			}
			return f
		}, o)
		content, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		expectClean(t, content)
	}
}
