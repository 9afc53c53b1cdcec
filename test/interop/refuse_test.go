package interop_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// TestUnsupportedImagesAreRefused opens images with features that are not implemented. The error names the feature, and
// the file stays as it is.
func TestUnsupportedImagesAreRefused(t *testing.T) {
	require.Tool(t, "qemu-img", "qemu-io")
	create := func(options ...string) func(t *testing.T, path string) {
		return func(t *testing.T, path string) {
			args := append([]string{"create", "-q", "-f", "qcow2"}, options...)
			run(t, "qemu-img", append(args, path, "1M")...)
		}
	}
	then := func(first func(t *testing.T, path string), command string, args ...string) func(t *testing.T, path string) {
		return func(t *testing.T, path string) {
			first(t, path)
			run(t, command, append(args, path)...)
		}
	}
	setBits := func(off int64, bits uint64) func(t *testing.T, path string) {
		return func(t *testing.T, path string) {
			create()(t, path)
			b := readFile(t, path)
			binary.BigEndian.PutUint64(b[off:], binary.BigEndian.Uint64(b[off:])|bits)
			writeFile(t, path, b)
		}
	}
	const incompatible = 72
	for name, c := range map[string]struct {
		make         func(t *testing.T, path string)
		names        string // what the error must mention
		class        error
		readableOnly bool // can be opened read-only
	}{
		"backing file": {
			make: func(t *testing.T, path string) {
				base := filepath.Join(t.TempDir(), "base.raw")
				writeFile(t, base, make([]byte, 1<<20))
				create("-b", base, "-F", "raw")(t, path)
			},
			names: "backing file",
			class: qcow.ErrUnsupported,
		},
		"internal snapshot": {
			make: func(t *testing.T, path string) {
				create()(t, path)
				run(t, "qemu-img", "snapshot", "-c", "first", path)
			},
			names: "snapshot",
			class: qcow.ErrUnsupported,
		},
		"LUKS": {
			make:  createLUKS,
			names: "encrypt",
			class: qcow.ErrUnsupported,
		},
		"AES":          {make: create("--object", "secret,id=key,data=secret", "-o", "encrypt.format=aes,encrypt.key-secret=key"), names: "encrypt", class: qcow.ErrUnsupported},
		"zstd":         {make: create("-o", "compression_type=zstd"), names: "compression", class: qcow.ErrUnsupported},
		"extended L2":  {make: create("-o", "extended_l2=on"), names: "extended L2", class: qcow.ErrUnsupported},
		"version 2":    {make: create("-o", "compat=0.10"), names: "version 2", class: qcow.ErrUnsupported},
		"unknown bit":  {make: setBits(incompatible, 1<<50), names: "bit 50", class: qcow.ErrUnsupported},
		"marked dirty": {make: setBits(incompatible, 1), names: "dirty", class: qcow.ErrUnsupported, readableOnly: true},
		"marked corrupt": {
			make: setBits(incompatible, 2), names: "corrupt", class: qcow.ErrCorrupt, readableOnly: true,
		},
		"dirty after a kill": {
			make:  then(create("-o", "lazy_refcounts=on"), "sh", "-c", `qemu-io -f qcow2 -t writeback -c "write -P 1 0 1M" -c "sigraise 9" "$0" || true`),
			names: "dirty", class: qcow.ErrUnsupported, readableOnly: true,
		},
		"data file": {
			make: func(t *testing.T, path string) {
				create("-o", "data_file="+filepath.Join(t.TempDir(), "data.raw"))(t, path)
			},
			names: "external data file",
			class: qcow.ErrUnsupported,
		},
		"bitmap": {
			make: func(t *testing.T, path string) {
				create()(t, path)
				run(t, "qemu-img", "bitmap", "--add", path, "dirty")
			},
			names: "bitmap",
			class: qcow.ErrUnsupported,
		},
	} {
		t.Run(name, func(t *testing.T) {
			path := imagePath(t)
			c.make(t, path)
			before := readFile(t, path)
			for _, mode := range []storage.Mode{storage.ReadOnly, storage.ReadWrite} {
				f, err := storage.Open(path, mode)
				if err != nil {
					t.Fatal(err)
				}
				img, err := qcow.Open(f, qcow.Options{ReadOnly: mode == storage.ReadOnly})
				if c.readableOnly && mode == storage.ReadOnly {
					if err != nil {
						t.Fatalf("read-only: %v", err)
					}
					closeImage(t, img)
					continue
				}
				if !errors.Is(err, c.class) || !strings.Contains(err.Error(), c.names) {
					t.Errorf("mode %d: error %v, want %v naming %q", mode, err, c.class, c.names)
				}
				if err := f.Close(); err != nil {
					t.Fatal(err)
				}
			}
			if !bytes.Equal(readFile(t, path), before) {
				t.Error("the file was changed")
			}
		})
	}
}

// TestCompressedClustersAreRefusedWhenTheyAreUsed opens an image with compressed clusters: nothing in its header tells. The
// rest of the disk can be used, and the compressed clusters stay as they are.
func TestCompressedClustersAreRefusedWhenTheyAreUsed(t *testing.T) {
	require.Tool(t, "qemu-img")
	dir := t.TempDir()
	raw, path := filepath.Join(dir, "raw"), filepath.Join(dir, "disk.qcow2")
	d := append(bytes.Repeat([]byte("compress me!...."), 1<<14), make([]byte, 1<<20)...)
	writeFile(t, raw, d)
	run(t, "qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", raw, path)
	before := readFile(t, path)

	img := open(t, path, storage.ReadWrite)
	b := make([]byte, 4096)
	for name, err := range map[string]error{
		"ReadAt":      errorOf(img.ReadAt(b, 0)),
		"WriteAt":     errorOf(img.WriteAt(b, 4096)),
		"WriteZeroes": img.WriteZeroes(0, 65536, true),
		"Discard":     img.Discard(0, 65536),
	} {
		if !errors.Is(err, qcow.ErrUnsupported) || !strings.Contains(err.Error(), "compress") {
			t.Errorf("%s of a compressed cluster: %v", name, err)
		}
	}
	closeImage(t, img)
	if !bytes.Equal(readFile(t, path), before) {
		t.Error("the file was changed")
	}

	img = open(t, path, storage.ReadWrite)
	tail := d[len(d)-8192:]
	for i := range tail {
		tail[i] = 7
	}
	if _, err := img.WriteAt(tail, int64(len(d)-8192)); err != nil {
		t.Error(err)
	}
	closeImage(t, img)
	mustBeClean(t, path)
	disk(d).mustEqualThere(t, path)
}

func errorOf(_ int, err error) error { return err }

func readFile(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func writeFile(t *testing.T, path string, b []byte) {
	t.Helper()
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// createLUKS makes an encrypted image. QEMU first measures how fast it derives keys, and gives up when the machine is too busy for that.
func createLUKS(t *testing.T, path string) {
	for range 50 {
		out, err := exec.CommandContext(t.Context(), "qemu-img", "create", "-q", "-f", "qcow2",
			"--object", "secret,id=key,data=secret",
			"-o", "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10", path, "1M").CombinedOutput()
		switch {
		case err == nil:
			return
		case !strings.Contains(string(out), "Unable to get accurate CPU usage"):
			t.Fatalf("qemu-img create: %v\n%s", err, out)
		}
	}
	t.Fatal("qemu-img could not measure in 50 tries how fast it derives keys")
}
