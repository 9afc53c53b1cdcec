package interop_test

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/qcow-csi/qcow-csi/nbdexport"
	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// sparseFile writes a file of the size with data in some of its clusters of 64 KiB, and returns its path and its content. The
// first has some: QEMU allocates the start of every raw file that it creates.
func sparseFile(t *testing.T, size int64) (string, disk) {
	t.Helper()
	path, content := filepath.Join(t.TempDir(), "sparse"), make(disk, size)
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	rng := random(t)
	for off := int64(0); off < size; off += 64 << 10 {
		if off == 0 || rng.IntN(3) == 0 {
			p := content[off:][:min(64<<10, size-off)]
			for i := range p {
				p[i] = byte(rng.Uint32() | 1)
			}
			if _, err := f.WriteAt(p, off); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	return path, content
}

// dataOf returns where a file has data: starts and ends.
func dataOf(t *testing.T, path string) (edges []int64) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	for off := int64(0); ; {
		start, err := unix.Seek(int(f.Fd()), off, unix.SEEK_DATA)
		if err != nil { // there is no more
			if err := f.Close(); err != nil {
				t.Fatal(err)
			}
			return edges
		}
		if off, err = unix.Seek(int(f.Fd()), start, unix.SEEK_HOLE); err != nil {
			t.Fatal(err)
		}
		edges = append(edges, start, off)
	}
}

// TestNBDCopyKeepsHoles copies a sparse file into an image and out again.
func TestNBDCopyKeepsHoles(t *testing.T) {
	require.Tool(t, "nbdcopy", "qemu-img")
	const size = 32 << 20
	in, content := sparseFile(t, size)
	for name, tools := range map[string]struct {
		in, out func(uri, file string) []string
	}{
		"nbdcopy": {
			func(uri, file string) []string { return []string{"nbdcopy", "--flush", file, uri} },
			func(uri, file string) []string { return []string{"nbdcopy", uri, file} },
		},
		"nbdcopy, synchronous": {
			func(uri, file string) []string { return []string{"nbdcopy", "--synchronous", "--flush", file, uri} },
			func(uri, file string) []string { return []string{"nbdcopy", "--synchronous", uri, file} },
		},
		"qemu-img": {
			func(uri, file string) []string {
				return []string{"qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", "--target-is-zero", file, uri}
			},
			func(uri, file string) []string {
				return []string{"qemu-img", "convert", "-f", "raw", "-O", "raw", uri, file}
			},
		},
	} {
		for _, network := range []string{"unix", "tcp"} {
			t.Run(name+"/"+network, func(t *testing.T) {
				path, out := imagePath(t), filepath.Join(t.TempDir(), "out")
				create(t, path, qcow.CreateOptions{Size: size})
				s := export(t, network, path, nbdexport.ImageOptions{})
				for _, args := range [][]string{tools.in(s.uri(), in), tools.out(s.uri(), out)} {
					run(t, args[0], args[1:]...)
				}
				got, err := os.ReadFile(out)
				if err != nil {
					t.Fatal(err)
				}
				content.mustEqual(t, got)
				if !slices.Equal(dataOf(t, out), dataOf(t, in)) {
					t.Errorf("data at %v, want %v", dataOf(t, out), dataOf(t, in))
				}
				run(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", in, s.uri())
			})
		}
	}
}

// TestNBDFuse mounts an export as a file.
func TestNBDFuse(t *testing.T) {
	require.Root(t)
	require.Tool(t, "nbdfuse", "fusermount3")
	path, mountpoint := imagePath(t), filepath.Join(t.TempDir(), "nbd")
	create(t, path, qcow.CreateOptions{Size: 8 << 20})
	s := export(t, "unix", path, nbdexport.ImageOptions{})
	if err := os.WriteFile(mountpoint, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	running(t, "nbdfuse", mountpoint, s.uri())
	eventually(t, "the mount", func() bool {
		info, err := os.Stat(mountpoint)
		return err == nil && info.Size() == 8<<20
	})
	mounted := true
	unmount := func() {
		if mounted {
			mounted = false
			run(t, "fusermount3", "-u", mountpoint)
		}
	}
	defer unmount()
	f, err := os.OpenFile(mountpoint, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	p := bytes.Repeat([]byte("fuse"), 100_000)
	if _, err := f.WriteAt(p, 1000); err != nil {
		t.Error(err)
	}
	if err := f.Sync(); err != nil {
		t.Error(err)
	}
	got := make([]byte, len(p))
	if _, err := f.ReadAt(got, 1000); err != nil || !bytes.Equal(got, p) {
		t.Errorf("read: %v, or other data", err)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	unmount()
	if _, err := s.image.ReadAt(got, 1000); err != nil || !bytes.Equal(got, p) {
		t.Errorf("the image: %v, or other data", err)
	}
}

// TestNBDClientLists lets nbd-client, without a kernel's, ask what there is.
func TestNBDClientLists(t *testing.T) {
	require.Tool(t, "nbd-client")
	path := imagePath(t)
	create(t, path, qcow.CreateOptions{Size: 1 << 20})
	s := export(t, "tcp", path, nbdexport.ImageOptions{}, func(c *nbdexport.Config) {
		c.Exports = append(c.Exports, nbdexport.Export{Name: "another", Backend: c.Exports[0].Backend})
	})
	out, _ := try(t, "nbd-client", "-l", "127.0.0.1", s.port()) // its exit status means nothing
	if !strings.Contains(out, "disk") || !strings.Contains(out, "another") {
		t.Errorf("nbd-client: %s", out)
	}
}

// TestNBDBehindNbdkit has nbdkit between the clients and the server: its plugin nbd is a client of libnbd, which asks for
// everything there is.
func TestNBDBehindNbdkit(t *testing.T) {
	require.Tool(t, "nbdkit", "nbdcopy", "nbdinfo", "qemu-io")
	const size = 16 << 20
	in, content := sparseFile(t, size)
	path := imagePath(t)
	create(t, path, qcow.CreateOptions{Size: size})
	s := export(t, "unix", path, nbdexport.ImageOptions{})
	out := filepath.Join(t.TempDir(), "out")
	for _, script := range []string{
		"nbdcopy --flush '" + in + "' \"$uri\"",
		"nbdcopy \"$uri\" '" + out + "'",
		"nbdinfo --map \"$uri\"",
		"qemu-io -f raw -c 'write -z -u 0 1M' -c 'discard 1M 1M' -c 'write -f -P 9 2M 64k' -c 'read -P 9 2M 64k' -c flush \"$uri\"",
	} {
		run(t, "nbdkit", "-f", "-U", "-", "nbd", "uri="+s.uri(), "--run", script)
		if strings.Contains(script, out) {
			got, err := os.ReadFile(out)
			if err != nil {
				t.Fatal(err)
			}
			content.mustEqual(t, got)
		}
	}
	// Filters make it harder: retries, pieces, a cache.
	run(t, "nbdkit", "-f", "-U", "-", "--filter=blocksize", "--filter=cow", "nbd", "uri="+s.uri(), "maxdata=64k", "--run",
		"nbdcopy '"+in+"' \"$uri\"")
}

// TestNBDBitmapsByQEMU lets QEMU read a bitmap through the export, as an incremental backup does.
func TestNBDBitmapsByQEMU(t *testing.T) {
	require.Tool(t, "qemu-img", "qemu-io")
	s := export(t, "unix", everyKind(t), nbdexport.ImageOptions{Bitmaps: []string{"late"}})
	options := "driver=nbd,export=disk,server.type=unix,server.path=" + s.addr.String() + ",x-dirty-bitmap=qemu:dirty-bitmap:late"
	out := run(t, "qemu-img", "map", "--output=json", "--image-opts", options)
	// QEMU shows what is dirty as what is no data.
	for _, want := range []string{`"start": 999424, "length": 8192`, `"start": 9437184, "length": 4096`} {
		if !strings.Contains(out, want) {
			t.Errorf("no %s in %s", want, out)
		}
	}
}
