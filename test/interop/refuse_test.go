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

// TestImagesAreRefused opens images that need something which was not given, or are of a kind that is not known. The error says
// why, and the file stays as it is.
func TestImagesAreRefused(t *testing.T) {
	require.Tool(t, "qemu-img")
	create := func(options ...string) func(t *testing.T, path string) {
		return func(t *testing.T, path string) {
			args := append([]string{"create", "-q", "-f", "qcow2"}, options...)
			run(t, "qemu-img", append(args, path, "1M")...)
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
		make     func(t *testing.T, path string)
		options  qcow.Options
		names    string // what the error must mention
		class    error
		readable bool // can be opened read-only
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
		"LUKS without a passphrase": {make: createLUKS, names: "passphrase", class: qcow.ErrPassphrase},
		"LUKS with a wrong passphrase": {
			make: createLUKS, names: "passphrase", class: qcow.ErrPassphrase, options: qcow.Options{Passphrase: []byte("wrong")},
		},
		"AES": {
			make:  create("--object", "secret,id=key,data=secret", "-o", "encrypt.format=aes,encrypt.key-secret=key"),
			names: "legacy encryption", class: qcow.ErrUnsupported, readable: true, options: qcow.Options{Passphrase: []byte("secret")},
		},
		"unknown bit":    {make: setBits(incompatible, 1<<50), names: "bit 50", class: qcow.ErrUnsupported},
		"marked corrupt": {make: setBits(incompatible, 2), names: "corrupt", class: qcow.ErrCorrupt, readable: true},
		"data file": {
			make: func(t *testing.T, path string) {
				create("-o", "data_file="+filepath.Join(t.TempDir(), "data.raw"))(t, path)
			},
			names: "data file",
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
				o := c.options
				o.ReadOnly = mode == storage.ReadOnly
				img, err := qcow.Open(f, o)
				if c.readable && mode == storage.ReadOnly {
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
