package interop_test

import (
	"bytes"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/check"
	"github.com/qcow-csi/qcow-csi/qcow/luks"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// encrypted is an image with a passphrase.
type encrypted struct {
	path, passphrase string
	method           string // "luks" or "aes"
	backing          *encrypted
}

// createEncrypted makes one with the engine, whose passphrase is quickly tried.
func createEncrypted(t testing.TB, path, passphrase string, o qcow.CreateOptions) *encrypted {
	t.Helper()
	o.Encryption = &qcow.EncryptionOptions{
		Passphrase:    []byte(passphrase),
		CreateOptions: luks.CreateOptions{KeyOptions: luks.KeyOptions{Iterations: luks.MinIterations}},
	}
	create(t, path, o)
	return &encrypted{path: path, passphrase: passphrase, method: "luks"}
}

// spec names the image, and those behind it, with their keys, to QEMU.
func (e *encrypted) spec() []string {
	var objects, options []string
	node := ""
	for i := 0; e != nil; i, e, node = i+1, e.backing, node+"backing." {
		objects = append(objects, "--object", fmt.Sprintf("secret,id=key%d,data=%s", i, e.passphrase))
		options = append(options, node+"driver=qcow2", node+"file.driver=file", node+"file.filename="+e.path,
			node+"encrypt.format="+e.method, fmt.Sprintf("%sencrypt.key-secret=key%d", node, i))
	}
	return append(objects, "--image-opts", strings.Join(options, ","))
}

// qemu runs a tool on the image: again, where the machine was too busy for QEMU to measure how fast it derives keys.
func (e *encrypted) qemu(t testing.TB, name string, args ...string) string {
	t.Helper()
	for range 50 {
		out, ok := try(t, name, append(args, e.spec()...)...)
		if ok && !strings.Contains(out, "failed") {
			return out
		}
		if !strings.Contains(out, "Unable to get accurate CPU usage") {
			t.Fatalf("%s %q:\n%s", name, args, out)
		}
	}
	t.Fatal("the machine is too busy for QEMU")
	return ""
}

// io runs commands of qemu-io.
func (e *encrypted) io(t testing.TB, commands ...string) {
	t.Helper()
	var args []string
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	e.qemu(t, "qemu-io", args...)
}

// open opens the image with the engine, and those behind it with the same passphrase.
func (e *encrypted) open(t testing.TB, passphrase string, o qcow.Options) *qcow.Image {
	t.Helper()
	mode := storage.ReadWrite
	if o.ReadOnly {
		mode = storage.ReadOnly
	}
	f, err := storage.Open(e.path, mode)
	if err != nil {
		t.Fatal(err)
	}
	o.Gate, o.Passphrase = qcow.Beside(e.path), []byte(passphrase)
	img, err := qcow.Open(f, o)
	if err != nil {
		t.Fatal(errors.Join(err, f.Close()))
	}
	return img
}

// mustBeClean checks one file with QEMU and with package check.
func (e *encrypted) mustBeClean(t *testing.T) {
	t.Helper()
	e.qemu(t, "qemu-img", "check", "-q")
	r, err := check.Check(t.Context(), storage.NewMemoryFrom(readFile(t, e.path)), check.Options{})
	if err != nil || !r.Clean() {
		t.Fatalf("check: %v, %v", r, err)
	}
}

// write writes n bytes of v with the engine.
func write(t testing.TB, img *qcow.Image, v byte, off, n int64) {
	t.Helper()
	if _, err := img.WriteAt(bytes.Repeat([]byte{v}, int(n)), off); err != nil {
		t.Fatal(err)
	}
}

// mustRead expects n bytes of v.
func mustRead(t testing.TB, img *qcow.Image, v byte, off, n int64) {
	t.Helper()
	got := make([]byte, n)
	if _, err := img.ReadAt(got, off); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, bytes.Repeat([]byte{v}, int(n))) {
		t.Fatalf("%d bytes at %#x are not all %#x", n, off, v)
	}
}

// TestEncryptedDisk rewrites a whole disk from both sides, which nobody opens with another passphrase.
func TestEncryptedDisk(t *testing.T) {
	require.Tool(t, "qemu-img", "qemu-io")
	const size = 16 << 20
	e := createEncrypted(t, imagePath(t), "astrochicken", qcow.CreateOptions{Size: size})
	e.io(t, "read -P 0 0 16M", "write -P 0xa 0 16M", "read -P 0xa 0 16M")
	for _, wrong := range []string{"platypus", ""} {
		f, err := storage.Open(e.path, storage.ReadWrite)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := qcow.Open(f, qcow.Options{Passphrase: []byte(wrong)}); !errors.Is(err, qcow.ErrPassphrase) {
			t.Errorf("open with %q: %v", wrong, err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
	img := e.open(t, e.passphrase, qcow.Options{})
	mustRead(t, img, 0xa, 0, size)
	write(t, img, 0xb, 0, size)
	closeImage(t, img)
	e.io(t, "read -P 0xb 0 16M")
	e.mustBeClean(t)
	if out, ok := try(t, "qemu-io", append([]string{"-c", "read 0 512"}, (&encrypted{e.path, "platypus", "luks", nil}).spec()...)...); ok {
		t.Errorf("QEMU opens it with another passphrase: %s", out)
	}
}

// TestCopyToPreallocatedEncryptedDisk copies zeroes and data into an encrypted image whose clusters are holes of the file already, as QEMU
// preallocates them: decrypted, these are anything but zeroes.
func TestCopyToPreallocatedEncryptedDisk(t *testing.T) {
	require.Tool(t, "qemu-img", "qemu-io")
	const size = 4 << 20
	source := imagePath(t)
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", source, fmt.Sprint(size))
	qemuIO(t, source, "write -P 7 1M 100k", "write -z 2M 64k")
	target := createEncrypted(t, imagePath(t), "astrochicken", qcow.CreateOptions{Size: size, Preallocation: qcow.PreallocationMetadata})
	b, dst := readFile(t, target.path), target.open(t, target.passphrase, qcow.Options{ReadOnly: true})
	for e, err := range dst.Extents(0, size) {
		if err != nil || e.Kind != qcow.ExtentData {
			t.Fatalf("%+v, %v", e, err)
		}
		clear(b[e.Host:][:e.Length])
	}
	closeImage(t, dst)
	writeFile(t, target.path, b)

	src, dst := open(t, source, storage.ReadOnly), target.open(t, target.passphrase, qcow.Options{})
	got := make([]byte, 512)
	if _, err := dst.ReadAt(got, 0); err != nil || bytes.Equal(got, make([]byte, 512)) {
		t.Fatalf("a hole reads as % x, %v", got[:16], err)
	}
	if err := qcow.Copy(t.Context(), dst, src, qcow.CopyOptions{}); err != nil {
		t.Fatal(err)
	}
	closeImage(t, dst)
	closeImage(t, src)
	target.io(t, "read -P 0 0 1M", "read -P 7 1M 100k", fmt.Sprintf("read -P 0 %d %d", 1<<20+100<<10, 3<<20-100<<10))
	target.mustBeClean(t)
}

// TestTwoKeys has an encrypted overlay on an encrypted image with another key and another passphrase: what a write does not cover of its cluster is
// decrypted there and encrypted here, and a commit does it the other way round.
func TestTwoKeys(t *testing.T) {
	require.Tool(t, "qemu-img", "qemu-io")
	const size, cluster = 16 << 20, 64 << 10
	dir := t.TempDir()
	base := createEncrypted(t, filepath.Join(dir, "base.qcow2"), "of the base", qcow.CreateOptions{Size: size})
	base.io(t, "write -P 1 0 16M")
	// The engine is given one passphrase for the whole chain: the base gets that of the overlay as well.
	f, err := storage.Open(base.path, storage.ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	quick := luks.KeyOptions{Iterations: luks.MinIterations}
	err = qcow.Amend(t.Context(), f, qcow.AmendOptions{Passphrase: []byte(base.passphrase), AddPassphrase: []byte("of the overlay"), KeyOptions: quick})
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	top := createEncrypted(t, filepath.Join(dir, "top.qcow2"), "of the overlay", qcow.CreateOptions{Size: size, BackingFile: "base.qcow2", BackingFormat: "qcow2"})
	top.backing = base
	top.io(t, "read -P 1 0 16M")

	img := top.open(t, top.passphrase, qcow.Options{CommitDepth: 1})
	write(t, img, 2, 1<<20+1024, 1024)
	mustRead(t, img, 1, 1<<20, 1024)
	mustRead(t, img, 2, 1<<20+1024, 1024)
	mustRead(t, img, 1, 1<<20+2048, cluster-2048)
	closeImage(t, img)
	top.io(t, "read -P 1 1M 1k", "read -P 2 1025k 1k", "read -P 1 1026k 62k", "write -P 3 2M 512", "read -P 1 2097664 65024")
	base.io(t, "read -P 1 0 16M")
	img = top.open(t, top.passphrase, qcow.Options{CommitDepth: 1})
	mustRead(t, img, 3, 2<<20, 512)
	mustRead(t, img, 1, 2<<20+512, cluster-512)
	if err := img.Commit(t.Context(), qcow.CommitOptions{}); err != nil {
		t.Fatal(err)
	}
	closeImage(t, img)
	for _, e := range []*encrypted{base, top} {
		e.io(t, "read -P 1 1M 1k", "read -P 2 1025k 1k", "read -P 1 1026k 62k", "read -P 3 2M 512", "read -P 1 2097664 65024")
		e.mustBeClean(t)
	}
}

// TestEncryptedClusterBoundary writes two sectors, one on each side of a boundary of clusters that are not there yet: both are what was
// written, and all around them reads as zeroes. The legacy method, which counts sectors of the disk, is only read here.
func TestEncryptedClusterBoundary(t *testing.T) {
	require.Tool(t, "qemu-img", "qemu-io")
	const off, n = 64<<10 - 512, 1024
	expect := func(img *qcow.Image) {
		t.Helper()
		mustRead(t, img, 0, 0, off)
		mustRead(t, img, 0xaa, off, n)
		mustRead(t, img, 0, off+n, 1<<20-off-n)
		closeImage(t, img)
	}
	commands := []string{fmt.Sprintf("read -P 0 0 %d", off), fmt.Sprintf("read -P 0xaa %d %d", off, n), fmt.Sprintf("read -P 0 %d %d", off+n, 1<<20-off-n)}
	e := createEncrypted(t, imagePath(t), "astrochicken", qcow.CreateOptions{Size: 1 << 20})
	img := e.open(t, e.passphrase, qcow.Options{})
	write(t, img, 0xaa, off, n)
	closeImage(t, img)
	e.io(t, commands...)
	e.mustBeClean(t)
	expect(e.open(t, e.passphrase, qcow.Options{ReadOnly: true}))

	e = createEncrypted(t, imagePath(t), "astrochicken", qcow.CreateOptions{Size: 1 << 20})
	e.io(t, fmt.Sprintf("write -P 0xaa %d %d", off, n))
	expect(e.open(t, e.passphrase, qcow.Options{ReadOnly: true}))

	e = &encrypted{imagePath(t), "astrochicken", "aes", nil}
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", "--object", "secret,id=key,data="+e.passphrase,
		"-o", "encrypt.format=aes,encrypt.key-secret=key", e.path, "1M")
	e.io(t, fmt.Sprintf("write -P 0xaa %d %d", off, n))
	expect(e.open(t, e.passphrase, qcow.Options{ReadOnly: true}))
}

// TestEncryptedImagesAreClean counts the clusters of the encryption header, in clusters of several sizes, before and after writes.
func TestEncryptedImagesAreClean(t *testing.T) {
	require.Tool(t, "qemu-img", "qemu-io")
	for _, cluster := range []int{512, 2 << 10, 32 << 10} {
		e := createEncrypted(t, imagePath(t), "astrochicken", qcow.CreateOptions{Size: 1 << 20, ClusterSize: cluster})
		e.mustBeClean(t)
		e.io(t, "write -P 0xa 0 1k", "write -P 0xb 500k 100k", "discard 0 32k")
		e.mustBeClean(t)
		img := e.open(t, e.passphrase, qcow.Options{})
		mustRead(t, img, 0xb, 500<<10, 100<<10)
		write(t, img, 0xc, 100<<10, 200<<10)
		if err := img.Discard(550<<10, 100<<10); err != nil {
			t.Fatal(err)
		}
		closeImage(t, img)
		e.mustBeClean(t)
		e.io(t, "read -P 0xc 100k 200k", "read -P 0xb 500k 50k", "read -P 0 576k 64k")
	}
}

// TestEncryptedDataFileGrownByQEMU lets QEMU grow a disk that ends inside a cluster of an encrypted data file. QEMU does not clear the rest of
// that: what was never written there must be encrypted zeroes.
func TestEncryptedDataFileGrownByQEMU(t *testing.T) {
	require.Tool(t, "qemu-img")
	const size, grown = 64<<10 + 512, 128 << 10
	dir := t.TempDir()
	data, err := storage.Create(filepath.Join(dir, "data"))
	if err != nil {
		t.Fatal(err)
	}
	e := createEncrypted(t, filepath.Join(dir, "image"), "key", qcow.CreateOptions{
		Size: size, ClusterSize: 4096, DataFile: data, DataFileName: filepath.Join(dir, "data"),
	})
	if err := data.Close(); err != nil {
		t.Fatal(err)
	}
	img := e.open(t, "key", qcow.Options{})
	write(t, img, 7, size-512, 512)
	closeImage(t, img)
	for range 50 {
		out, ok := try(t, "qemu-img", append(append([]string{"resize"}, e.spec()...), fmt.Sprint(grown))...)
		if ok {
			break
		}
		if !strings.Contains(out, "Unable to get accurate CPU usage") {
			t.Fatal(out)
		}
	}
	e.io(t, fmt.Sprintf("read -P 7 %d 512", size-512), fmt.Sprintf("read -P 0 %d %d", size, grown-size))
	img = e.open(t, "key", qcow.Options{ReadOnly: true})
	if img.Size() != grown {
		t.Errorf("the disk has %d bytes", img.Size())
	}
	mustRead(t, img, 7, size-512, 512)
	mustRead(t, img, 0, size, grown-size)
	closeImage(t, img)
}
