package qcow_test

import (
	"encoding/json"
	"fmt"
	"os"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// TestZeroSize makes disks of no bytes at all, which QEMU converts and both sides grow.
func TestZeroSize(t *testing.T) {
	for _, r := range recipes(0) {
		if r.o.Encryption != nil && !long() {
			continue
		}
		t.Run(r.name, func(t *testing.T) {
			f := newWorkshop(t)
			f.create("image", r)
			f.check("image")
			if size := f.info("image")["virtual-size"]; size != 0.0 {
				t.Fatalf("qemu-img says %v bytes", size)
			}
			if r.o.Encryption == nil {
				f.run("qemu-img", "convert", "-f", "qcow2", "-O", "qcow2", "-c", "image", "copy")
				f.run("qemu-img", "compare", "-q", "-f", "qcow2", "-F", "qcow2", "image", "copy")
			}
			f.change("image", func(img *qcow.Image) {
				if _, err := img.WriteAt([]byte{1}, 0); err == nil {
					t.Error("a disk of no bytes was written to")
				}
				if err := img.ResizeWith(t.Context(), 1<<20, qcow.ResizeOptions{Preallocation: r.o.Preallocation}); err != nil {
					t.Fatal(err)
				}
				writeAt(t, img, repeated(1, 64<<10), 0)
			})
			f.check("image")
			f.io("image", "read -P 1 0 64k", "read -P 0 64k 960k")
		})
	}
}

// TestHugeSize makes disks of up to the largest size, which both sides read and write at their ends.
func TestHugeSize(t *testing.T) {
	for _, o := range []qcow.CreateOptions{
		{Size: 16 << 40},
		{Size: 64 << 40, ExtendedL2: true, ClusterSize: 64 << 10},
		{Size: 1 << 61, ClusterSize: 2 << 20},
		{Size: 128 << 30, ClusterSize: 512, Version: 2},
	} {
		t.Run(fmt.Sprint(o.Size), func(t *testing.T) {
			f := newWorkshop(t)
			r := recipe{o: o}
			f.create("image", r)
			f.check("image")
			high := o.Size - 4096
			f.change("image", func(img *qcow.Image) {
				expectAt(t, img, make([]byte, 4096), high)
				writeAt(t, img, repeated(1, 4096), high)
				writeAt(t, img, repeated(2, 4096), 8192)
			})
			f.check("image")
			f.io("image", "read -P 0 1024 4096", "read -P 2 8k 4k", fmt.Sprintf("read -P 1 %d 4k", high), fmt.Sprintf("write -P 3 %d 4k", high-8192))
			f.change("image", func(img *qcow.Image) { expectAt(t, img, repeated(3, 4096), high-8192) })
		})
	}
	// What QEMU refuses as too large is refused here.
	f := newWorkshop(t)
	for i, r := range []recipe{
		{o: qcow.CreateOptions{Size: 1 << 60}},
		{o: qcow.CreateOptions{Size: 2<<50 + 512}},
		{o: qcow.CreateOptions{Size: 1<<50 + 512, ExtendedL2: true}, qemu: "extended_l2=on"},
		{o: qcow.CreateOptions{Size: 1<<61 + 512, ClusterSize: 2 << 20}, qemu: "cluster_size=2M"},
	} {
		r.qemu += ",compat=1.1"
		if out, err := f.createByQEMU("theirs", r); err == nil {
			t.Errorf("qemu-img makes %d bytes: %s", r.o.Size, out)
		}
		expectClass(t, "too large", f.tryCreate(fmt.Sprint("ours", i), r), qcow.ErrInvalid)
	}
}

// TestPreallocationOfClusterSizes preallocates the tables of 4 GiB in clusters of all sizes.
func TestPreallocationOfClusterSizes(t *testing.T) {
	for cluster := 16 << 10; cluster <= 2<<20; cluster *= 2 {
		if !long() && cluster != 16<<10 && cluster != 64<<10 && cluster != 2<<20 {
			continue
		}
		f := newWorkshop(t)
		r := recipe{
			o:    qcow.CreateOptions{Size: 4 << 30, ClusterSize: cluster, Preallocation: qcow.PreallocationMetadata},
			qemu: fmt.Sprintf("preallocation=metadata,cluster_size=%d", cluster),
		}
		f.create("ours", r)
		f.check("ours")
		if out, err := f.createByQEMU("theirs", r); err != nil {
			t.Fatal(err, out)
		}
		ours, theirs := f.length("ours"), f.length("theirs")
		if d := ours - theirs; d > 2*int64(cluster) || d < -2*int64(cluster) {
			t.Errorf("clusters of %d: %d bytes, and %d by qemu-img", cluster, ours, theirs)
		}
		// What a disk takes that is written all over.
		measured := struct {
			Required int64 `json:"required"`
		}{}
		out := f.run("qemu-img", "measure", "--output=json", "-O", "qcow2", "--size", "4G", "-o", fmt.Sprintf("preallocation=full,cluster_size=%d", cluster))
		if err := json.Unmarshal([]byte(out), &measured); err != nil {
			t.Fatal(err)
		}
		if d := ours - measured.Required; d > 0 || d < -2*int64(cluster) {
			t.Errorf("clusters of %d: %d bytes, and %d are required by qemu-img measure", cluster, ours, measured.Required)
		}
		if n := f.onDisk("ours"); n > 16<<20 {
			t.Errorf("clusters of %d: %d bytes of disk space", cluster, n)
		}
		f.io("ours", "write -P 1 1G 1M", "write -P 2 4095M 1M")
		if n := f.length("ours"); n != ours {
			t.Errorf("clusters of %d: writing makes the file %d bytes longer", cluster, n-ours)
		}
		f.check("ours")
	}
}

// TestPreallocation has the length of files and the space that they take, without and with a data file.
func TestPreallocation(t *testing.T) {
	const size = 64 << 20
	for p := qcow.PreallocationOff; p <= qcow.PreallocationFull; p++ {
		for _, external := range []bool{false, true} {
			f := newWorkshop(t)
			r := recipe{o: qcow.CreateOptions{Size: size, Preallocation: p}, external: external, qemu: "preallocation=" + p.String()}
			data := "ours"
			if external {
				r.qemu += ",data_file=data"
				data = "data"
			}
			if out, err := f.createByQEMU("theirs", r); err != nil {
				t.Fatal(err, out)
			}
			if external {
				if err := os.Remove(f.path("data")); err != nil {
					t.Fatal(err)
				}
			}
			f.create("ours", r)
			f.check("ours")
			if d := f.length("ours") - f.length("theirs"); d > 64<<10 || d < -64<<10 {
				t.Errorf("%v, %v: %d bytes more than by qemu-img", p, external, d)
			}
			if external && f.length("data") != size {
				t.Errorf("%v: a data file of %d bytes", p, f.length("data"))
			}
			if high := f.onDisk(data) >= 1<<20; high != (p >= qcow.PreallocationFalloc) {
				t.Errorf("%v, %v: %d bytes of disk space", p, external, f.onDisk(data))
			}
			if external && f.onDisk("ours") >= 1<<20 {
				t.Errorf("%v: %d bytes of disk space beside the data file", p, f.onDisk("ours"))
			}
		}
	}
}

// TestDataFile uses images with a data file, raw or not, and raw images that become one.
func TestDataFile(t *testing.T) {
	f := newWorkshop(t)
	f.create("image", recipe{o: qcow.CreateOptions{Size: 1 << 20}, external: true})
	file := f.file("image")
	_, err := qcow.Open(file, qcow.Options{})
	expectClass(t, "without leave", err, qcow.ErrUnsupported)
	if err := file.Close(); err != nil {
		t.Fatal(err)
	}
	f.io("image", "write -P 0x11 128k 256k", "discard 192k 64k", "write -z 256k 128k", "read -P 0 192k 192k")
	f.change("image", func(img *qcow.Image) {
		expectAt(t, img, repeated(0x11, 64<<10), 128<<10)
		expectAt(t, img, make([]byte, 192<<10), 192<<10)
	})
	f.check("image")

	// A raw image becomes the data file of one.
	f.run("qemu-img", "create", "-q", "-f", "raw", "raw", "1M")
	f.run("qemu-io", "-f", "raw", "-c", "write -P 42 0 1M", "raw")
	for i, o := range []qcow.CreateOptions{{DataFileRaw: true}, {Preallocation: qcow.PreallocationMetadata}, {DataFileRaw: true, ExtendedL2: true}} {
		name := fmt.Sprint("wrapped", i)
		o.Size, o.KeepDataFile, o.DataFileName = 1<<20, true, "raw"
		o.DataFile = f.file("raw")
		img := f.file(name)
		if err := qcow.Create(img, o); err != nil {
			t.Fatal(err)
		}
		for _, c := range []storage.File{img, o.DataFile} {
			if err := c.Close(); err != nil {
				t.Fatal(err)
			}
		}
		f.check(name)
		f.io(name, "read -P 42 0 1M")
		f.run("qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", "raw", name)
		f.change(name, func(img *qcow.Image) { expectAt(t, img, repeated(42, 1<<20), 0) })
	}

	// It stays a raw image when it grows, and what was behind its end does not come to light.
	f.run("truncate", "-s", "3M", "raw")
	f.run("qemu-io", "-f", "raw", "-c", "write -P 84 1M 2M", "raw")
	f.change("wrapped0", func(img *qcow.Image) {
		if err := img.ResizeWith(t.Context(), 2<<20, qcow.ResizeOptions{}); err != nil {
			t.Fatal(err)
		}
		expectAt(t, img, make([]byte, 1<<20), 1<<20)
	})
	f.check("wrapped0")
	f.io("wrapped0", "read -P 42 0 1M", "read -P 0 1M 1M", "write -P 43 1536k 64k")
	f.run("qemu-io", "-f", "raw", "-c", "read -P 42 0 1M", "-c", "read -P 0 1M 512k", "-c", "read -P 43 1536k 64k", "raw")
}
