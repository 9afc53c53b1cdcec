package qcow_test

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// folder is a tree of images in a temporary folder.
type folder struct {
	t   *testing.T
	dir string
}

func newFolder(t *testing.T) folder { return folder{t, t.TempDir()} }

func (f folder) path(name string) string { return filepath.Join(f.dir, name) }

// raw makes a raw file of one sector of this value.
func (f folder) raw(name string, v byte) {
	f.t.Helper()
	f.mkdir(name)
	writeFile(f.t, f.path(name), repeated(v, 512))
}

// image makes an empty image of one sector on a backing file.
func (f folder) image(name, backingFile, backingFormat string) {
	f.t.Helper()
	f.mkdir(name)
	top := overlay(f.t, qcow.CreateOptions{Size: 512}, "placeholder", "raw")
	if err := qcow.RebaseUnsafe(top, backingFile, backingFormat); err != nil {
		f.t.Fatal(err)
	}
	writeFile(f.t, f.path(name), top.Bytes())
}

func (f folder) mkdir(name string) {
	f.t.Helper()
	if err := os.MkdirAll(filepath.Dir(f.path(name)), 0o700); err != nil {
		f.t.Fatal(err)
	}
}

func (f folder) link(target, name string) {
	f.t.Helper()
	f.mkdir(name)
	if err := os.Symlink(target, f.path(name)); err != nil {
		f.t.Fatal(err)
	}
}

// read opens an image through a gate and returns the value of its first byte.
func (f folder) read(name string, gate qcow.Gate) (byte, error) {
	f.t.Helper()
	path, err := filepath.EvalSymlinks(f.path(name))
	if err != nil {
		f.t.Fatal(err)
	}
	file, err := storage.Open(path, storage.ReadOnly)
	if err != nil {
		f.t.Fatal(err)
	}
	img, err := qcow.Open(file, qcow.Options{ReadOnly: true, Gate: gate})
	if err != nil {
		return 0, errors.Join(err, file.Close())
	}
	p := make([]byte, 1)
	_, err = img.ReadAt(p, 0)
	return p[0], errors.Join(err, img.Close())
}

// Names lead where they lead QEMU: relative ones begin in the folder of the name by which the image above was opened.
func TestBeside(t *testing.T) {
	require.Tool(t, "qemu-img")
	f := newFolder(t)
	f.raw("base", 1)
	f.raw("a/base", 2)
	f.raw("b/base", 3)
	f.image("top", "base", "raw")
	f.image("a/up", "../base", "raw")
	f.image("a/same", "base", "raw")
	f.image("absolute", f.path("b/base"), "raw")
	f.image("deep", "a/same", "qcow2")
	f.image("dot", "./a/../b/base", "raw")
	f.image("colon", "./x:y", "raw")
	f.raw("x:y", 4)
	f.link("a/same", "link")      // the names in it begin here
	f.link("../a/same", "b/link") // and here
	f.image("through", "b/link", "qcow2")
	f.image("linked", "pointer", "raw")
	f.link("b/base", "pointer")
	f.mkdir("b/deep/x")
	f.link("b/deep", "down")
	f.image("up", "down/../base", "raw") // the folder above the one that the link leads to
	for name, want := range map[string]byte{
		"top": 1, "a/up": 1, "a/same": 2, "absolute": 3, "deep": 2, "dot": 3, "colon": 4, "link": 1, "b/link": 3, "through": 3, "linked": 3, "up": 3,
	} {
		if got, err := f.read(name, qcow.Beside(f.path(name))); err != nil || got != want {
			t.Errorf("%s: %d, %v; want %d", name, got, err, want)
		}
		run(t, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", f.path(name), f.path("out"))
		if got := readFile(t, f.path("out"))[0]; got != want {
			t.Errorf("%s: QEMU reads %d, want %d", name, got, want)
		}
	}
}

// iotest 043: a chain that comes back to itself is refused, whatever names lead there.
func TestBesideLoop(t *testing.T) {
	require.Tool(t, "qemu-img")
	f := newFolder(t)
	f.image("self", "self", "qcow2")
	f.image("a", "b", "qcow2")
	f.image("b", "dir/../c", "qcow2")
	f.image("c", "link", "qcow2")
	f.link("a", "link")
	f.mkdir("dir/x")
	f.image("x", "y", "qcow2")
	f.image("hard", "x", "qcow2")
	if err := os.Link(f.path("hard"), f.path("y")); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"self", "a", "b", "c", "x", "hard"} {
		_, err := f.read(name, qcow.Beside(f.path(name)))
		expectClass(t, name, err, qcow.ErrCorrupt)
		if !strings.Contains(err.Error(), "comes back") {
			t.Errorf("%s: %v", name, err)
		}
	}
	// A name that is used twice without a loop is none.
	f.raw("end", 1)
	f.image("d/image", "../image", "qcow2")
	f.image("image", "end", "raw")
	if got, err := f.read("d/image", qcow.Beside(f.path("d/image"))); err != nil || got != 1 {
		t.Errorf("%d, %v", got, err)
	}
}

// Names that mean more than a file to QEMU are refused before anything is opened, and so are those that can't be paths.
func TestBesideRefuses(t *testing.T) {
	dir := t.TempDir()
	gate := qcow.Beside(filepath.Join(dir, "top"))
	for _, name := range []string{
		"", "nbd:localhost:10809", "nbd://host/x", "json:{\"driver\":\"raw\"}", "file:base", "file:///etc/passwd", "http://host/x",
		"fat:rw:/etc", ":", "blkdebug::base", "a:b", "\x00", "base\x00.raw",
	} {
		for _, gate := range map[string]qcow.Gate{"beside": gate, "within": qcow.Within(dir)} {
			_, err := gate(qcow.Reference{Name: name, Format: "raw", ReadOnly: true})
			expectClass(t, name, err, qcow.ErrInvalid)
		}
		if err := qcow.RebaseUnsafe(create(t, qcow.CreateOptions{}), name, "raw"); name != "" && !errors.Is(err, qcow.ErrInvalid) {
			t.Errorf("an image gets the backing file %q: %v", name, err)
		}
	}
	_, err := gate(qcow.Reference{Name: "absent", Format: "raw", ReadOnly: true})
	expectClass(t, "absent", err, os.ErrNotExist)
	if err := os.Mkdir(filepath.Join(dir, "folder"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := gate(qcow.Reference{Name: "folder", Format: "raw", ReadOnly: true}); err == nil || !strings.Contains(err.Error(), "regular file") {
		t.Errorf("a folder: %v", err)
	}
}

// Within opens plain names of one folder, whatever an image says.
func TestWithin(t *testing.T) {
	f := newFolder(t)
	f.raw("outside", 1)
	f.raw("pool/base", 2)
	f.image("pool/layer", "base", "raw")
	f.image("pool/top", "layer", "qcow2")
	f.image("pool/up", "../outside", "raw")
	f.image("pool/here", "./base", "raw")
	f.image("pool/absolute", f.path("pool/base"), "raw")
	f.image("pool/linked", "link", "raw")
	f.link("../outside", "pool/link")
	f.image("pool/self", "self", "qcow2")
	f.image("pool/a", "b", "qcow2")
	f.image("pool/b", "a", "qcow2")
	gate := qcow.Within(f.path("pool"))
	if got, err := f.read("pool/top", gate); err != nil || got != 2 {
		t.Errorf("%d, %v", got, err)
	}
	for _, name := range []string{"up", "here", "absolute"} {
		_, err := f.read("pool/"+name, gate)
		expectClass(t, name, err, qcow.ErrInvalid)
	}
	for _, name := range []string{"self", "a"} {
		_, err := f.read("pool/"+name, gate)
		expectClass(t, name, err, qcow.ErrCorrupt)
	}
	if _, err := f.read("pool/linked", gate); err == nil {
		t.Error("a link was followed")
	}
	for _, name := range []string{".", "..", "/", "a/b", "../pool/base"} {
		_, err := gate(qcow.Reference{Name: name, Format: "raw", ReadOnly: true})
		expectClass(t, name, err, qcow.ErrInvalid)
	}
}

// QEMU reads the names and formats that an image gets here.
func TestBackingNameInQEMU(t *testing.T) {
	require.Tool(t, "qemu-img")
	f := newFolder(t)
	long := strings.Repeat("long/", 190) + "name"
	for name, form := range map[string]string{"base": "raw", "./a b c": "qcow2", "/absolute/ü": "raw", long: "qcow2"} {
		f.image("top", name, form)
		var info struct {
			Name   string `json:"backing-filename"`
			Format string `json:"backing-filename-format"`
		}
		if err := json.Unmarshal([]byte(run(t, "qemu-img", "info", "-f", "qcow2", "--output=json", f.path("top"))), &info); err != nil {
			t.Fatal(err)
		}
		if info.Name != name || info.Format != form {
			t.Errorf("QEMU reads %+v", info)
		}
	}
}
