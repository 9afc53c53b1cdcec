package qcow_test

import (
	"fmt"
	"os"
	"reflect"
	"strings"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/check"
	"github.com/qcow-csi/qcow-csi/qcow/codec"
	"github.com/qcow-csi/qcow-csi/qcow/luks"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

func expectCleanFile(t testing.TB, path string) {
	t.Helper()
	f, err := storage.Open(path, storage.ReadOnly)
	if err != nil {
		t.Fatal(err)
	}
	report, err := check.Check(t.Context(), f, check.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if !report.Clean() {
		t.Fatalf("the image is not clean: %v", report)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

// description returns what qemu-img info says of an image, without what two of a kind need not have in common, nor encryption.
func (f *workshop) description(name string) map[string]any {
	f.t.Helper()
	info := f.info(name)
	for _, key := range []string{"filename", "actual-size", "full-backing-filename", "encrypted"} {
		delete(info, key)
	}
	delete(specifics(info), "encrypt")
	return info
}

func specifics(info map[string]any) map[string]any {
	return info["format-specific"].(map[string]any)["data"].(map[string]any)
}

// TestCreate makes images of every kind. QEMU describes each as the one that it makes itself, finds nothing to complain of, reads zeroes or
// the backing file from it, and reads what the engine wrote; the engine reads what QEMU wrote.
func TestCreate(t *testing.T) {
	const size = 4<<20 - 3*512
	for _, r := range recipes(size) {
		t.Run(r.name, func(t *testing.T) {
			f := newWorkshop(t)
			if out, err := f.createByQEMU("theirs", r); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			want := f.description("theirs")
			if r.external {
				if err := os.Remove(f.path("data")); err != nil {
					t.Fatal(err)
				}
			}
			f.create("ours", r)
			f.check("ours")
			if got := f.description("ours"); !reflect.DeepEqual(got, want) {
				t.Fatalf("qemu-img info says\n%v\nand of its own image\n%v", got, want)
			}
			f.expectLength(r)

			base := byte(0)
			if r.o.BackingFile != "" {
				base = 0xbb
			}
			f.io("ours", fmt.Sprintf("read -P %d 0 64k", base), fmt.Sprintf("read -P 0 64k %d", size-64<<10))
			f.change("ours", func(img *qcow.Image) {
				expectAt(t, img, repeated(base, 64<<10), 0)
				expectAt(t, img, repeated(0, size-64<<10), 64<<10)
				writeAt(t, img, repeated(0x11, 5*512), 3*512)
				writeAt(t, img, repeated(0x22, 512), size-512)
			})
			f.check("ours")
			f.io("ours", "read -P 0x11 1536 2560", fmt.Sprintf("read -P %d 4k 1k", base), fmt.Sprintf("read -P 0x22 %d 512", size-512), "write -P 0x33 1M 100k")
			f.change("ours", func(img *qcow.Image) {
				expectAt(t, img, repeated(0x33, 100<<10), 1<<20)
				expectAt(t, img, repeated(0, 512), 1<<20-512)
				expectAt(t, img, repeated(0x11, 5*512), 3*512)
			})
			f.check("ours")
			if r.o.DataFileRaw && r.o.Encryption == nil {
				f.run("qemu-img", "compare", "-q", "-f", "qcow2", "-F", "raw", "ours", "data")
			}
		})
	}
}

// expectLength holds the length of a new image, and the space that it takes, against what QEMU's own has.
func (f *workshop) expectLength(r recipe) {
	f.t.Helper()
	cluster := int64(64 << 10)
	if r.o.ClusterSize > 0 {
		cluster = int64(r.o.ClusterSize)
	}
	ours, theirs := f.length("ours"), f.length("theirs")
	if r.o.Encryption != nil {
		n, err := luks.HeaderSize(luks.CreateOptions{})
		if err != nil {
			f.t.Fatal(err)
		}
		theirs += int64(n)
	}
	// QEMU's may end within its last cluster, and places the refcount blocks elsewhere: some have fewer refcounts then.
	if most := 3*cluster + theirs/64; ours-theirs > most || theirs-ours > most {
		f.t.Errorf("%d bytes, and %d by qemu-img", ours, theirs)
	}
	if ours%cluster != 0 {
		f.t.Errorf("%d bytes are not whole clusters", ours)
	}
	if r.external {
		ours = f.length("data")
		if ours != r.o.Size {
			f.t.Errorf("the data file has %d bytes", ours)
		}
	}
	name := "ours"
	if r.external {
		name = "data"
	}
	taken := f.onDisk(name)
	switch p := r.o.Preallocation; {
	case p >= qcow.PreallocationFalloc && taken < r.o.Size:
		f.t.Errorf("the file takes %d bytes with preallocation %v", taken, p)
	case p == qcow.PreallocationMetadata && r.o.Encryption == nil && taken > r.o.Size/2 && cluster > 512 && cluster < 2<<20:
		f.t.Errorf("the file takes %d bytes with preallocation %v", taken, p)
	}
}

// TestCreateRefuses holds what Create refuses against what qemu-img does.
func TestCreateRefuses(t *testing.T) {
	f := newWorkshop(t)
	backing := func(o qcow.CreateOptions) qcow.CreateOptions {
		o.BackingFile, o.BackingFormat = "base.qcow2", "qcow2"
		return o
	}
	for _, r := range []recipe{
		{name: "refcount width of version 2", o: qcow.CreateOptions{Version: 2, RefcountBits: 8}, qemu: "compat=0.10,refcount_bits=8"},
		{name: "lazy refcounts of version 2", o: qcow.CreateOptions{Version: 2, LazyRefcounts: true}, qemu: "compat=0.10,lazy_refcounts=on"},
		{name: "subclusters of version 2", o: qcow.CreateOptions{Version: 2, ExtendedL2: true}, qemu: "compat=0.10,extended_l2=on"},
		{name: "zstd of version 2", o: qcow.CreateOptions{Version: 2, Compression: codec.Zstd}, qemu: "compat=0.10,compression_type=zstd"},
		{name: "data file of version 2", o: qcow.CreateOptions{Version: 2}, external: true, qemu: "compat=0.10,data_file=data"},
		{name: "version", o: qcow.CreateOptions{Version: 4}, qemu: "compat=v4"},
		{name: "subclusters of 256 bytes", o: qcow.CreateOptions{ExtendedL2: true, ClusterSize: 8 << 10}, qemu: "extended_l2=on,cluster_size=8k"},
		{name: "metadata over backing", o: backing(qcow.CreateOptions{Preallocation: qcow.PreallocationMetadata}), qemu: "preallocation=metadata," + qemuBacking},
		{name: "falloc over backing", o: backing(qcow.CreateOptions{Preallocation: qcow.PreallocationFalloc}), qemu: "preallocation=falloc," + qemuBacking},
		{name: "full over backing", o: backing(qcow.CreateOptions{Preallocation: qcow.PreallocationFull}), qemu: "preallocation=full," + qemuBacking},
		{name: "raw over backing", o: backing(qcow.CreateOptions{DataFileRaw: true}), external: true, qemu: "data_file=data,data_file_raw=on," + qemuBacking},
		{name: "raw without data file", o: qcow.CreateOptions{DataFileRaw: true}, qemu: "data_file_raw=on"},
		{name: "backing format without backing", o: qcow.CreateOptions{BackingFormat: "raw"}, qemu: "backing_fmt=raw"},
		{name: "backing without format", o: qcow.CreateOptions{BackingFile: "base.qcow2"}, qemu: "backing_file=base.qcow2"},
		{name: "long backing name", o: qcow.CreateOptions{BackingFile: strings.Repeat("./", 507) + "base.qcow2", BackingFormat: "qcow2"}, qemu: "backing_fmt=qcow2,backing_file=" + strings.Repeat("./", 507) + "base.qcow2"},
		{name: "cluster size", o: qcow.CreateOptions{ClusterSize: 1000}, qemu: "cluster_size=1000"},
		{name: "clusters too small", o: qcow.CreateOptions{ClusterSize: 256}, qemu: "cluster_size=256"},
		{name: "clusters too large", o: qcow.CreateOptions{ClusterSize: 4 << 20}, qemu: "cluster_size=4M"},
		{name: "size for small clusters", o: qcow.CreateOptions{ClusterSize: 512, Size: 128<<30 + 512}, qemu: "cluster_size=512"},
		{name: "name longer than the header", o: backing(qcow.CreateOptions{ClusterSize: 512}), qemu: "cluster_size=512,backing_fmt=qcow2,backing_file=" + longName()},
		{name: "no passphrase", o: qcow.CreateOptions{Encryption: &qcow.EncryptionOptions{}}, qemu: "encrypt.format=luks"},
	} {
		t.Run(r.name, func(t *testing.T) {
			if r.o.Size == 0 {
				r.o.Size = 1 << 20
			}
			if r.name == "name longer than the header" {
				r.o.BackingFile = longName()
			}
			for _, name := range []string{"ours", "theirs", "data"} {
				_ = os.Remove(f.path(name))
			}
			if out, err := f.createByQEMU("theirs", r); err == nil {
				t.Errorf("qemu-img makes it: %s", out)
			}
			_ = os.Remove(f.path("data"))
			err := f.tryCreate("ours", r)
			expectClass(t, "create", err, qcow.ErrInvalid)
			if n := f.length("ours"); n != 0 {
				t.Errorf("the file has %d bytes", n)
			}
			if r.external {
				if n := f.length("data"); n != 0 {
					t.Errorf("the data file has %d bytes", n)
				}
			}
		})
	}
}

// TestCreateRefusesByItself has what only Create can be asked.
func TestCreateRefusesByItself(t *testing.T) {
	full := func() *storage.Memory { return storage.NewMemoryFrom([]byte{1}) }
	for name, c := range map[string]struct {
		f storage.File
		o qcow.CreateOptions
	}{
		"file in use":            {full(), qcow.CreateOptions{}},
		"odd size":               {storage.NewMemory(), qcow.CreateOptions{Size: 1000}},
		"negative size":          {storage.NewMemory(), qcow.CreateOptions{Size: -512}},
		"data file in use":       {storage.NewMemory(), qcow.CreateOptions{DataFile: full(), DataFileName: "data"}},
		"data file without name": {storage.NewMemory(), qcow.CreateOptions{DataFile: storage.NewMemory()}},
		"name without data file": {storage.NewMemory(), qcow.CreateOptions{DataFileName: "data"}},
		"kept without data file": {storage.NewMemory(), qcow.CreateOptions{KeepDataFile: true}},
		"kept but not mapped":    {storage.NewMemory(), qcow.CreateOptions{KeepDataFile: true, DataFile: full(), DataFileName: "data"}},
		"kept but overwritten":   {storage.NewMemory(), qcow.CreateOptions{KeepDataFile: true, DataFile: full(), DataFileName: "data", Preallocation: qcow.PreallocationFull}},
		"kept but reserved":      {storage.NewMemory(), qcow.CreateOptions{KeepDataFile: true, DataFile: full(), DataFileName: "data", DataFileRaw: true, Preallocation: qcow.PreallocationFalloc}},
		"kept but encrypted":     {storage.NewMemory(), qcow.CreateOptions{KeepDataFile: true, DataFile: full(), DataFileName: "data", DataFileRaw: true, Encryption: cheap()}},
		"kept but cut":           {storage.NewMemory(), qcow.CreateOptions{KeepDataFile: true, DataFile: full(), DataFileName: "data", DataFileRaw: true}},
		"long format":            {storage.NewMemory(), qcow.CreateOptions{BackingFile: "b", BackingFormat: "sixteen-letters-"}},
		"compression":            {storage.NewMemory(), qcow.CreateOptions{Compression: codec.Zstd + 1}},
		"preallocation":          {storage.NewMemory(), qcow.CreateOptions{Preallocation: qcow.PreallocationFull + 1}},
		// 8 MiB of refcount table lead to 2^20 blocks with 64 refcounts each, and these to 32 GiB.
		"refcount table too large": {storage.NewMemory(), qcow.CreateOptions{Size: 40 << 30, ClusterSize: 512, RefcountBits: 64, Preallocation: qcow.PreallocationMetadata}},
	} {
		t.Run(name, func(t *testing.T) {
			before, err := c.f.Size()
			if err != nil {
				t.Fatal(err)
			}
			expectClass(t, "create", qcow.Create(c.f, c.o), qcow.ErrInvalid)
			if after, err := c.f.Size(); err != nil || after != before {
				t.Fatalf("the file has %d bytes instead of %d, %v", after, before, err)
			}
		})
	}
}

// TestRefcountBitsLimits has the widths that there are, and those that there are not.
func TestRefcountBitsLimits(t *testing.T) {
	f := newWorkshop(t)
	for _, bits := range []int{-1, 1, 2, 3, 4, 8, 16, 32, 42, 64, 128} {
		name := fmt.Sprint("width", bits)
		r := recipe{o: qcow.CreateOptions{Size: 64 << 20, RefcountBits: bits}, qemu: fmt.Sprint("refcount_bits=", bits)}
		_, theirs := f.createByQEMU("theirs", r)
		ours := f.tryCreate(name, r)
		if (ours == nil) != (theirs == nil) {
			t.Fatalf("%d bits: %v; qemu-img: %v", bits, ours, theirs)
		}
		if ours != nil {
			expectClass(t, name, ours, qcow.ErrInvalid)
			continue
		}
		f.check(name)
		if got := specifics(f.info(name))["refcount-bits"]; got != float64(bits) {
			t.Errorf("%d bits: qemu-img says %v", bits, got)
		}
	}
}
