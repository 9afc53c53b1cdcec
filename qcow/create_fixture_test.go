package qcow_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/codec"
	"github.com/qcow-csi/qcow-csi/qcow/luks"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// A recipe is a kind of image, for Create and for qemu-img.
type recipe struct {
	name     string
	o        qcow.CreateOptions
	external bool   // the data is in a file of its own
	qemu     string // -o of qemu-img create, without encryption, which takes it seconds
}

const secret = "correct horse"

// cheap is a passphrase that is tried quickly.
func cheap() *qcow.EncryptionOptions {
	return &qcow.EncryptionOptions{Passphrase: []byte(secret), CreateOptions: luks.CreateOptions{KeyOptions: luks.KeyOptions{Iterations: luks.MinIterations}}}
}

const qemuBacking = "backing_file=base.qcow2,backing_fmt=qcow2"

// recipes are the kinds of images that there are, each with every preallocation that it may have; in the short form these take turns.
func recipes(size int64) []recipe {
	plain := []recipe{
		{name: "default", o: qcow.CreateOptions{}, qemu: "compat=1.1"},
		{name: "version 2", o: qcow.CreateOptions{Version: 2}, qemu: "compat=0.10"},
		{name: "small clusters", o: qcow.CreateOptions{ClusterSize: 512, RefcountBits: 64}, qemu: "cluster_size=512,refcount_bits=64"},
		{name: "large clusters", o: qcow.CreateOptions{ClusterSize: 2 << 20, RefcountBits: 1}, qemu: "cluster_size=2M,refcount_bits=1"},
		{name: "lazy refcounts", o: qcow.CreateOptions{LazyRefcounts: true, RefcountBits: 8}, qemu: "lazy_refcounts=on,refcount_bits=8"},
		{name: "zstd", o: qcow.CreateOptions{Compression: codec.Zstd, ClusterSize: 4096}, qemu: "compression_type=zstd,cluster_size=4k"},
		{name: "subclusters", o: qcow.CreateOptions{ExtendedL2: true, ClusterSize: 16 << 10}, qemu: "extended_l2=on,cluster_size=16k"},
		{name: "encrypted", o: qcow.CreateOptions{Encryption: cheap()}, qemu: "compat=1.1"},
		{name: "encrypted version 2", o: qcow.CreateOptions{Encryption: cheap(), Version: 2, ClusterSize: 1024}, qemu: "compat=0.10,cluster_size=1k"},
		{name: "encrypted subclusters", o: qcow.CreateOptions{Encryption: cheap(), ExtendedL2: true}, qemu: "extended_l2=on"},
		{name: "data file", external: true, qemu: "data_file=data"},
		{name: "raw data file", o: qcow.CreateOptions{DataFileRaw: true}, external: true, qemu: "data_file=data,data_file_raw=on"},
		{name: "encrypted data file", o: qcow.CreateOptions{Encryption: cheap()}, external: true, qemu: "data_file=data"},
		{name: "data file with subclusters", o: qcow.CreateOptions{ExtendedL2: true, LazyRefcounts: true}, external: true, qemu: "data_file=data,extended_l2=on,lazy_refcounts=on"},
		{name: "subclusters over backing", o: qcow.CreateOptions{ExtendedL2: true, BackingFile: "base.qcow2", BackingFormat: "qcow2"}, qemu: "extended_l2=on," + qemuBacking},
		{name: "encrypted subclusters over backing", o: qcow.CreateOptions{ExtendedL2: true, Encryption: cheap(), BackingFile: "base.qcow2", BackingFormat: "qcow2"}, qemu: "extended_l2=on," + qemuBacking},
	}
	var all []recipe
	for i, r := range plain {
		for p := qcow.PreallocationOff; p <= qcow.PreallocationFull; p++ {
			if !long() && (i+int(p))%2 == 1 {
				continue
			}
			r := r
			r.o.Preallocation = p
			r.name += "/" + p.String()
			r.qemu += ",preallocation=" + p.String()
			all = append(all, r)
		}
	}
	all = append(
		all,
		recipe{name: "backing", o: qcow.CreateOptions{BackingFile: "base.qcow2", BackingFormat: "qcow2"}, qemu: qemuBacking},
		recipe{name: "backing of version 2", o: qcow.CreateOptions{Version: 2, BackingFile: "base.qcow2", BackingFormat: "qcow2"}, qemu: "compat=0.10," + qemuBacking},
		recipe{name: "data file with backing", o: qcow.CreateOptions{BackingFile: "base.qcow2", BackingFormat: "qcow2"}, external: true, qemu: "data_file=data," + qemuBacking},
		recipe{name: "encrypted with backing", o: qcow.CreateOptions{Encryption: cheap(), BackingFile: "base.qcow2", BackingFormat: "qcow2"}, qemu: qemuBacking},
		recipe{name: "name longer than a sector", o: qcow.CreateOptions{BackingFile: longName(), BackingFormat: "qcow2"}, qemu: "backing_file=" + longName() + ",backing_fmt=qcow2"},
	)
	for i := range all {
		all[i].o.Size = size
	}
	return all
}

// longName is a path to base.qcow2 of more than 512 bytes.
func longName() string { return strings.Repeat("./", 300) + "base.qcow2" }

// A workshop is a folder where a test has images, beside base.qcow2, whose first 64 KiB are 0xbb.
type workshop struct {
	t   testing.TB
	dir string
}

func newWorkshop(t testing.TB) *workshop {
	require.Tool(t, "qemu-img")
	require.Tool(t, "qemu-io")
	f := &workshop{t: t, dir: t.TempDir()}
	f.run("qemu-img", "create", "-q", "-f", "qcow2", "base.qcow2", "1M")
	f.run("qemu-io", "-f", "qcow2", "-c", "write -P 0xbb 0 64k", "base.qcow2")
	return f
}

func (f *workshop) path(name string) string { return filepath.Join(f.dir, name) }

// try runs a tool in the folder. QEMU's measurement of a hash fails when the clock of the processor time stands still; it is tried again.
func (f *workshop) try(tool string, args ...string) (string, error) {
	for try := 0; ; try++ {
		cmd := exec.CommandContext(f.t.Context(), tool, args...)
		cmd.Dir = f.dir
		out, err := cmd.CombinedOutput()
		if err != nil && strings.Contains(string(out), "Unable to get accurate CPU usage") && try < 1000 {
			continue
		}
		if err != nil {
			err = fmt.Errorf("%s %s: %w: %s", tool, strings.Join(args, " "), err, out)
		}
		return string(out), err
	}
}

func (f *workshop) run(tool string, args ...string) string {
	f.t.Helper()
	out, err := f.try(tool, args...)
	if err != nil {
		f.t.Fatal(err)
	}
	return out
}

// file opens a file of the folder, or makes it.
func (f *workshop) file(name string) storage.File {
	f.t.Helper()
	path := f.path(name)
	opened, err := storage.Open(path, storage.ReadWrite)
	if errors.Is(err, os.ErrNotExist) {
		opened, err = storage.Create(path)
	}
	if err != nil {
		f.t.Fatal(err)
	}
	return opened
}

// create makes an image.
func (f *workshop) create(name string, r recipe) {
	f.t.Helper()
	if err := f.tryCreate(name, r); err != nil {
		f.t.Fatalf("create %s: %v", r.name, err)
	}
}

func (f *workshop) tryCreate(name string, r recipe) error {
	img := f.file(name)
	if r.external {
		r.o.DataFile, r.o.DataFileName = f.file("data"), "data"
	}
	err := qcow.Create(img, r.o)
	if r.o.DataFile != nil {
		err = errors.Join(err, r.o.DataFile.Close())
	}
	return errors.Join(err, img.Close())
}

// createByQEMU makes the same with qemu-img.
func (f *workshop) createByQEMU(name string, r recipe) (string, error) {
	return f.try("qemu-img", "create", "-q", "-f", "qcow2", "-o", r.qemu, name, fmt.Sprint(r.o.Size))
}

func (f *workshop) open(name string, o qcow.Options) *qcow.Image {
	f.t.Helper()
	o.Gate, o.Passphrase = qcow.Beside(f.path(name)), []byte(secret)
	return open(f.t, f.file(name), o)
}

// change lets do change an image with the engine.
func (f *workshop) change(name string, do func(img *qcow.Image)) {
	f.t.Helper()
	img := f.open(name, qcow.Options{})
	do(img)
	if err := img.Close(); err != nil {
		f.t.Fatal(err)
	}
}

// spec names an image so that QEMU can open it, encrypted or not.
func (f *workshop) spec(name string) (args []string, spec string) {
	f.t.Helper()
	spec = "driver=qcow2,file.driver=file,file.filename=" + name
	if encrypted, _ := f.info(name)["encrypted"].(bool); encrypted {
		spec += ",encrypt.key-secret=key"
	}
	return []string{"--object", "secret,id=key,data=" + secret, "--image-opts"}, spec
}

// io runs commands of qemu-io.
func (f *workshop) io(name string, commands ...string) {
	f.t.Helper()
	args, spec := f.spec(name)
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	if out := f.run("qemu-io", append(args, spec)...); strings.Contains(out, "fail") || strings.Contains(out, "rror") {
		f.t.Fatalf("qemu-io %q: %s", commands, out)
	}
}

// check demands that QEMU and our checker find nothing at all.
func (f *workshop) check(name string) {
	f.t.Helper()
	args, spec := f.spec(name)
	f.run("qemu-img", append(append([]string{"check", "-q"}, args...), spec)...)
	expectCleanFile(f.t, f.path(name))
}

// info returns what qemu-img info says.
func (f *workshop) info(name string) map[string]any {
	f.t.Helper()
	var info map[string]any
	if err := json.Unmarshal([]byte(f.run("qemu-img", "info", "-f", "qcow2", "--output=json", name)), &info); err != nil {
		f.t.Fatal(err)
	}
	return info
}

func (f *workshop) length(name string) int64 {
	f.t.Helper()
	info, err := os.Stat(f.path(name))
	if err != nil {
		f.t.Fatal(err)
	}
	return info.Size()
}

// onDisk returns how many bytes of disk space a file takes.
func (f *workshop) onDisk(name string) int64 {
	f.t.Helper()
	var blocks, size int64
	if _, err := fmt.Sscan(f.run("stat", "-c", "%b %B", name), &blocks, &size); err != nil {
		f.t.Fatal(err)
	}
	return blocks * size
}
