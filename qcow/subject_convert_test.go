package qcow_test

import (
	"fmt"
	"slices"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// rawDiskOf returns a raw disk of that content.
func rawDiskOf(t *testing.T, content []byte) *qcow.RawDisk {
	t.Helper()
	disk, err := qcow.Raw(storage.NewMemoryFrom(slices.Clone(content)))
	if err != nil {
		t.Fatal(err)
	}
	return disk
}

// Zeroes are found in units of the size asked for, and not looked for at all where that is so; with compression too, and over a backing
// file that they have to hide.
func TestCopyFindsZeroes(t *testing.T) {
	const k, size = 1 << 10, 256 << 10
	content := repeated(7, size)
	for _, s := range []span{{4 * k, 4 * k}, {16 * k, 8 * k}, {34 * k, 8 * k}, {64 * k, 64 * k}, {248 * k, 8 * k}} {
		clear(content[s.off:][:s.n])
	}
	holes := []span{{4 * k, 4 * k}, {16 * k, 8 * k}, {36 * k, 4 * k}, {64 * k, 64 * k}, {248 * k, 8 * k}} // in units of 4 KiB
	large := []span{{16 * k, 8 * k}, {64 * k, 64 * k}, {248 * k, 8 * k}}                                  // and of 8 KiB
	for _, x := range []struct {
		sparse   int
		compress bool
		holes    []span
	}{{0, false, holes}, {4 * k, false, holes}, {8 * k, false, large}, {-1, false, nil}, {0, true, holes}} {
		for _, behind := range []string{"", "base"} {
			t.Run(fmt.Sprintf("sparse=%d/compress=%v/over=%s", x.sparse, x.compress, behind), func(t *testing.T) {
				f := files{"base": storage.NewMemoryFrom(repeated(9, size))}
				o := qcow.CreateOptions{Size: size, ClusterSize: 4 * k, BackingFile: behind}
				if behind != "" {
					o.BackingFormat = "raw"
				}
				target := create(t, o)
				img := open(t, target, qcow.Options{Gate: f.gate})
				copying := qcow.CopyOptions{SparseSize: x.sparse, Compress: x.compress, TargetIsZero: behind == ""}
				// A source without holes of its own.
				source := create(t, qcow.CreateOptions{Size: size, ClusterSize: 64 * k})
				change(t, source, func(img *qcow.Image) { writeAt(t, img, content, 0) })
				from := open(t, source, qcow.Options{ReadOnly: true})
				if err := qcow.Copy(t.Context(), img, from, copying); err != nil {
					t.Fatal(err)
				}
				expect(t, "disk", diskOf(t, img), content)
				want := slices.Repeat([]qcow.ExtentKind{qcow.ExtentData}, size/4/k)
				if x.compress {
					want = slices.Repeat([]qcow.ExtentKind{qcow.ExtentCompressed}, size/4/k)
				}
				for _, s := range x.holes {
					for c := s.off / 4 / k; c < (s.off+s.n)/4/k; c++ {
						want[c] = qcow.ExtentUnallocated
						if behind != "" {
							want[c] = qcow.ExtentZero
						}
					}
				}
				expectKinds(t, img, want...)
				if err := img.Close(); err != nil {
					t.Fatal(err)
				}
				(&chain{t: t, files: files{"target": target}}).expectClean("target")
			})
		}
	}
}

// Zeroes take nothing in a target that reads as zeroes where they go, whether that is known or not: in a new one of any version, and behind the
// end of a shorter backing file.
func TestCopyOfZeroesTakesNothing(t *testing.T) {
	const k, size, end = 1 << 10, 1 << 20, 300 << 10
	for _, version := range []int{2, 3} {
		for _, behind := range []string{"", "base"} {
			t.Run(fmt.Sprintf("version=%d/over=%s", version, behind), func(t *testing.T) {
				f := files{"base": storage.NewMemoryFrom(repeated(9, end))}
				o := qcow.CreateOptions{Size: size, ClusterSize: 4 * k, Version: version, BackingFile: behind}
				if behind != "" {
					o.BackingFormat = "raw"
				}
				target := create(t, o)
				img := open(t, target, qcow.Options{Gate: f.gate})
				content := make([]byte, size)
				copy(content[800*k:], repeated(1, 8*k))
				if err := qcow.Copy(t.Context(), img, rawDiskOf(t, content), qcow.CopyOptions{}); err != nil {
					t.Fatal(err)
				}
				expect(t, "disk", diskOf(t, img), content)
				for c, kind := range kindsOf(t, img) {
					at := c * 4 * k
					hidden := behind != "" && at < end // version 2 takes data for that
					data := at >= 800*k && at < 808*k || hidden && version == 2
					if data != (kind == qcow.ExtentData) || hidden && kind == qcow.ExtentUnallocated || behind == "" && kind == qcow.ExtentZero {
						t.Fatalf("cluster %d is %v", c, kind)
					}
				}
				if err := img.Close(); err != nil {
					t.Fatal(err)
				}
				(&chain{t: t, files: files{"target": target}}).expectClean("target")
			})
		}
	}
}

// Disks that end inside a cluster, or a sector, are compressed into a disk of whole ones: the last cluster is as good as all others.
func TestCompressedCopyOfOddSizes(t *testing.T) {
	const k = 1 << 10
	for _, size := range []int64{512, 300*k + 512, 64*k + 512, 64*k - 512, 1023 * k} {
		for _, cluster := range []int{1 * k, 64 * k} {
			content := make([]byte, size)
			for i := range content {
				content[i] = byte(i / 700)
			}
			target := create(t, qcow.CreateOptions{Size: size, ClusterSize: cluster})
			img := open(t, target, qcow.Options{})
			if err := qcow.Copy(t.Context(), img, rawDiskOf(t, content), qcow.CopyOptions{Compress: true, TargetIsZero: true}); err != nil {
				t.Fatal(err)
			}
			expect(t, fmt.Sprintf("%d bytes in clusters of %d", size, cluster), diskOf(t, img), content)
			closeClean(t, img, target)
		}
	}
}

// Data before, across and behind 4 TiB of a disk is where it was in a copy of it, and so are the holes between.
func TestCopyBeyondFourTiB(t *testing.T) {
	const tib, size = 1 << 40, 9<<40 + 512
	source, want := create(t, qcow.CreateOptions{Size: size}), sparseDisk{}
	img := open(t, source, qcow.Options{ReserveBytes: 1})
	for i, s := range []span{
		{0, 512}, {4*tib - 128<<10, 256 << 10}, {4*tib + 1<<30, 4096}, {8*tib - 512, 512}, {8 * tib, 64 << 10}, {size - 512, 512},
	} {
		writeAt(t, img, want.write(s.off, s.n, byte(i)), s.off)
	}
	want.expect(t, img)
	for _, compress := range []bool{false, true} {
		target := create(t, qcow.CreateOptions{Size: size, ClusterSize: 1 << 20})
		copied := open(t, target, qcow.Options{ReserveBytes: 1})
		if err := qcow.Copy(t.Context(), copied, img, qcow.CopyOptions{TargetIsZero: true, Compress: compress}); err != nil {
			t.Fatal(err)
		}
		want.expect(t, copied)
		closeClean(t, copied, target)
	}
	closeClean(t, img, source)
}
