package qcow_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/require"
)

func createFile(t testing.TB, path string) *storage.OSFile {
	t.Helper()
	f, err := storage.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// A disk goes from a raw file to an image, from there to another, and back, and QEMU finds all of them equal.
func TestCopy(t *testing.T) {
	require.Tool(t, "qemu-img")
	const size = 24<<20 + 512
	for _, compress := range []bool{false, true} {
		t.Run(fmt.Sprintf("compress=%v", compress), func(t *testing.T) {
			dir := t.TempDir()
			path := func(name string) string { return filepath.Join(dir, name) }
			content := mixed(rand.New(rand.NewPCG(7, 7)), 3<<20, 4096)
			raw := createFile(t, path("a.raw"))
			for _, off := range []int64{0, 9<<20 + 512, size - int64(len(content))} { // with holes between
				if _, err := raw.WriteAt(content, off); err != nil {
					t.Fatal(err)
				}
			}
			disk, err := qcow.Raw(raw)
			if err != nil {
				t.Fatal(err)
			}
			first := createFile(t, path("b.qcow2"))
			if err := qcow.Create(first, qcow.CreateOptions{Size: size}); err != nil {
				t.Fatal(err)
			}
			second := createFile(t, path("c.qcow2"))
			if err := qcow.Create(second, qcow.CreateOptions{Size: size, ClusterSize: 4096}); err != nil {
				t.Fatal(err)
			}
			back := createFile(t, path("d.raw"))
			if err := back.Truncate(size); err != nil {
				t.Fatal(err)
			}
			backDisk, err := qcow.Raw(back)
			if err != nil {
				t.Fatal(err)
			}
			img, img2 := open(t, first, qcow.Options{}), open(t, second, qcow.Options{})
			var done, total int64
			o := qcow.CopyOptions{Compress: compress, TargetIsZero: true, Progress: func(d, n int64) { done, total = d, n }}
			if err := qcow.Copy(t.Context(), img, disk, o); err != nil {
				t.Fatal(err)
			}
			if done != size || total != size {
				t.Errorf("progress ended at %d of %d", done, total)
			}
			if err := qcow.Copy(t.Context(), img2, img, qcow.CopyOptions{Compress: compress}); err != nil {
				t.Fatal(err)
			}
			if err := qcow.Copy(t.Context(), backDisk, img2, qcow.CopyOptions{TargetIsZero: true}); err != nil {
				t.Fatal(err)
			}
			before, err := raw.AllocatedBytes()
			if err != nil {
				t.Fatal(err)
			}
			if after, err := back.AllocatedBytes(); err != nil || after > before {
				t.Errorf("the copy takes %d bytes, the original %d, %v", after, before, err)
			}
			for _, c := range []interface{ Close() error }{img, img2, raw, back} {
				if err := c.Close(); err != nil {
					t.Fatal(err)
				}
			}
			for _, name := range []string{"b.qcow2", "c.qcow2"} {
				b, err := os.ReadFile(path(name))
				if err != nil {
					t.Fatal(err)
				}
				expectClean(t, b)
			}
			for name, kind := range map[string]string{"b.qcow2": "qcow2", "c.qcow2": "qcow2", "d.raw": "raw"} {
				out, err := exec.CommandContext(t.Context(), "qemu-img", "compare", "-f", "raw", "-F", kind, path("a.raw"), path(name)).CombinedOutput()
				if err != nil {
					t.Errorf("%s: %v\n%s", name, err, out)
				}
			}
		})
	}
}

// What the target held before does not shine through.
func TestCopyOverwrites(t *testing.T) {
	const size, behind = 9<<20 + 1000, 1<<20 - 1000
	for name, o := range map[string]qcow.CopyOptions{"sparse": {}, "whole": {SparseSize: -1}, "compressed": {Compress: true}} {
		t.Run(name, func(t *testing.T) {
			source, target := storage.NewMemory(), create(t, qcow.CreateOptions{Size: size + behind})
			content := make([]byte, size)
			copy(content[5<<20:], mixed(rand.New(rand.NewPCG(8, 8)), 4<<20+1000, 4096))
			if _, err := source.WriteAt(content, 0); err != nil {
				t.Fatal(err)
			}
			disk, err := qcow.Raw(source)
			if err != nil {
				t.Fatal(err)
			}
			img := open(t, target, qcow.Options{})
			writeAt(t, img, repeated(0xff, size+behind), 0)
			if err := qcow.Copy(t.Context(), img, disk, o); err != nil {
				t.Fatal(err)
			}
			expectAt(t, img, content, 0)
			expectAt(t, img, make([]byte, behind), size)
			if err := img.Close(); err != nil {
				t.Fatal(err)
			}
			expectClean(t, target.Bytes())
		})
	}
}

func TestCopyEndsEarly(t *testing.T) {
	const size = 64 << 20
	source := storage.NewMemoryFrom(repeated(1, size))
	disk, err := qcow.Raw(source)
	if err != nil {
		t.Fatal(err)
	}
	img := open(t, create(t, qcow.CreateOptions{Size: size}), qcow.Options{})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	err = qcow.Copy(ctx, img, disk, qcow.CopyOptions{Progress: func(int64, int64) { cancel() }})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	small := open(t, create(t, qcow.CreateOptions{Size: 1 << 20}), qcow.Options{})
	expectClass(t, "copy to a smaller disk", qcow.Copy(t.Context(), small, disk, qcow.CopyOptions{}), qcow.ErrInvalid)
	other := storage.NewMemory()
	other.Limit(4 << 20)
	full := open(t, func() storage.File {
		if err := qcow.Create(other, qcow.CreateOptions{Size: size}); err != nil {
			t.Fatal(err)
		}
		return other
	}(), qcow.Options{})
	expectClass(t, "copy to a full disk", qcow.Copy(t.Context(), full, disk, qcow.CopyOptions{}), qcow.ErrNoSpace)
	for _, i := range []*qcow.Image{img, small} {
		if err := i.Close(); err != nil {
			t.Error(err)
		}
	}
}
