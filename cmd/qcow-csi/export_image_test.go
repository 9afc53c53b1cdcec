package main

import (
	"bytes"
	"errors"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/qcow-csi/qcow-csi/nbdexport/nbdtest"
	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// exportedTo serves an image on a socket, and connects to it.
func exportedTo(t *testing.T, image string, args ...string) (*exporting, *nbdtest.Client) {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "nbd.sock")
	e := mustExport(t, image, append([]string{"--socket", socket}, args...)...)
	client := nbdtest.Dial(t, unixAddr(socket))
	client.Go("")
	return e, client
}

// end lets the last client leave, and the export end.
func (e *exporting) end(t *testing.T, client *nbdtest.Client) {
	t.Helper()
	client.Disconnect()
	e.wantEnd(t)
}

func wantBytes(t *testing.T, client *nbdtest.Client, off uint64, want string) {
	t.Helper()
	if got, err := client.ReadBytes(off, len(want)); err != nil || string(got) != want {
		t.Errorf("read %q at %d, %v; want %q", got, off, err, want)
	}
}

func put(t *testing.T, client *nbdtest.Client, off uint64, s string) {
	t.Helper()
	if err := client.WriteBytes(off, []byte(s)); err != nil {
		t.Errorf("write at %d: %v", off, err)
	}
}

// store writes s to an image at rest.
func store(t *testing.T, path, off, s string, args ...string) {
	t.Helper()
	if _, err := imageWith(t.Context(), t, s, append([]string{"write", "-q", path, off}, args...)...); err != nil {
		t.Fatal(err)
	}
}

// TestExportBackingChain serves an overlay: what is not in it comes from behind, and writes stay in front.
func TestExportBackingChain(t *testing.T) {
	base := create(t)
	store(t, base, "64K", "of the base")
	overlay := filepath.Join(filepath.Dir(base), "overlay.qcow2")
	mustImage(t, "create", "-q", "-b", filepath.Base(base), "-F", "qcow2", overlay)
	before := read(t, base)
	e, client := exportedTo(t, overlay)
	wantBytes(t, client, 64<<10, "of the base")
	put(t, client, 64<<10+3, "THE")
	wantBytes(t, client, 64<<10, "of THE base")
	e.end(t, client)
	if !bytes.Equal(read(t, base), before) {
		t.Error("the base was changed")
	}
	mustImage(t, "check", overlay)

	hold(t, base, storage.ReadWrite)
	if _, err := startExport(t, overlay, "--socket", filepath.Join(t.TempDir(), "s")); !errors.Is(err, qcow.ErrBusy) {
		t.Errorf("served while somebody writes to its base: %v", err)
	}
}

func TestExportDataFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk.qcow2")
	data := path + ".raw"
	mustImage(t, "create", "-q", "-o", "data_file="+data+",data_file_raw=on", path, "1M")
	for _, cache := range []string{"writeback", "unsafe"} {
		e, client := exportedTo(t, path, "--cache", cache)
		put(t, client, 1000, cache)
		e.end(t, client)
		if got := string(read(t, data)[1000:][:len(cache)]); got != cache {
			t.Errorf("the data file has %q", got)
		}
		mustImage(t, "check", path)
	}
}

func TestExportEncrypted(t *testing.T) {
	dir := t.TempDir()
	path, secret, wrong := filepath.Join(dir, "disk.qcow2"), write(t, filepath.Join(dir, "secret"), "open sesame\n"), write(t, filepath.Join(dir, "wrong"), "x")
	mustImage(t, "create", "-q", "-o", "encrypt.format=luks,encrypt.iter-time=10", "--passphrase-file", secret, path, "1M")
	sector := strings.Repeat("secrets ", 64)
	e, client := exportedTo(t, path, "--passphrase-file", secret)
	put(t, client, 512, sector)
	wantBytes(t, client, 512, sector)
	e.end(t, client)
	if bytes.Contains(read(t, path), []byte("secrets secrets")) {
		t.Error("the file has the plain text")
	}
	for _, args := range [][]string{nil, {"--passphrase-file", wrong}, {"--passphrase-file", filepath.Join(dir, "nothing")}} {
		if _, err := startExport(t, path, append(args, "--socket", filepath.Join(dir, "s"))...); err == nil {
			t.Errorf("served with %q", args)
		}
	}
}

func TestExportSnapshot(t *testing.T) {
	image := create(t)
	store(t, image, "0", "before")
	mustImage(t, "snapshot", "-q", "--create", "kept", image)
	store(t, image, "0", "behind")
	for _, name := range []string{"kept", "1"} {
		e, client := exportedTo(t, image, "--load-snapshot", name)
		wantBytes(t, client, 0, "before")
		if err := client.WriteBytes(0, []byte("x")); err == nil {
			t.Error("wrote to a snapshot")
		}
		e.end(t, client)
	}
	if _, err := startExport(t, image, "-l", "lost", "--socket", filepath.Join(t.TempDir(), "s")); !errors.Is(err, qcow.ErrNotFound) {
		t.Errorf("a snapshot that is not: %v", err)
	}
}

func TestExportForceShare(t *testing.T) {
	image := create(t)
	store(t, image, "0", "there")
	hold(t, image, storage.ReadWrite)
	if _, err := startExport(t, image, "-r", "--socket", filepath.Join(t.TempDir(), "s")); !errors.Is(err, qcow.ErrBusy) {
		t.Errorf("served while somebody writes to it: %v", err)
	}
	e, client := exportedTo(t, image, "--read-only", "--force-share")
	wantBytes(t, client, 0, "there")
	e.end(t, client)
}

// hasSpace says whether the image has space for the cluster at off.
func hasSpace(t *testing.T, image, off string) bool {
	t.Helper()
	return mapped(t, mustImage(t, "map", "--output", "json", "--start-offset", off, "--max-length", "64K", image))[0].Offset != nil
}

func TestExportDiscard(t *testing.T) {
	for mode, want := range map[string]string{"unmap": strings.Repeat("\x00", 1<<16), "ignore": strings.Repeat("x", 1<<16)} {
		image := create(t)
		e, client := exportedTo(t, image, "--discard", mode)
		put(t, client, 0, strings.Repeat("x", 1<<16))
		if _, err := client.Do(nbdtest.Request{Command: nbdtest.CmdTrim, Length: 1 << 16}); err != nil {
			t.Error(err)
		}
		wantBytes(t, client, 0, want)
		e.end(t, client)
		if got := hasSpace(t, image, "0"); got != (mode == "ignore") {
			t.Errorf("--discard=%s: the image has space for it: %t", mode, got)
		}
	}
}

func TestExportDetectZeroes(t *testing.T) {
	for mode, want := range map[string]struct{ old, fresh bool }{"off": {true, true}, "on": {true, false}, "unmap": {false, false}} {
		image := create(t)
		store(t, image, "0", strings.Repeat("x", 1<<16))
		e, client := exportedTo(t, image, "--detect-zeroes", mode)
		put(t, client, 0, strings.Repeat("\x00", 1<<16))
		put(t, client, 4<<20, strings.Repeat("\x00", 1<<16))
		wantBytes(t, client, 0, strings.Repeat("\x00", 1<<16))
		e.end(t, client)
		if old, fresh := hasSpace(t, image, "0"), hasSpace(t, image, "4M"); old != want.old || fresh != want.fresh {
			t.Errorf("--detect-zeroes=%s: space where there was some: %t, and where there was none: %t", mode, old, fresh)
		}
	}
}

// nbdinfo returns what the program of libnbd says of an export.
func nbdinfo(t *testing.T, args ...string) string {
	t.Helper()
	require.Tool(t, "nbdinfo")
	out, err := exec.CommandContext(t.Context(), "nbdinfo", args...).CombinedOutput()
	if err != nil {
		t.Errorf("nbdinfo %q: %v: %s", args, err, out)
	}
	return string(out)
}

func TestExportMetadata(t *testing.T) {
	image := create(t)
	overlay := image + ".overlay"
	mustImage(t, "create", "-q", "-b", image, "-F", "qcow2", overlay)
	mustImage(t, "bitmap", overlay, "monday", "--add", "-g", "64K")
	mustImage(t, "bitmap", overlay, "tuesday", "--add", "-g", "64K")
	store(t, overlay, "128K", "changed")
	socket := filepath.Join(t.TempDir(), "nbd.sock")
	e := mustExport(t, overlay, "-k", socket, "-t", "-A", "-B", "monday", "--bitmap", "tuesday")
	for context, want := range map[string][]string{
		"qemu:allocation-depth":     {"0 65536 0", "65536 65536 2", "131072 65536 1"},
		"qemu:dirty-bitmap:monday":  {"0 131072 0", "131072 65536 1"},
		"qemu:dirty-bitmap:tuesday": {"0 131072 0", "131072 65536 1"},
	} {
		var got []string
		for line := range strings.Lines(nbdinfo(t, "--map="+context, e.uri)) {
			if f := strings.Fields(line); len(f) >= 3 {
				got = append(got, strings.Join(f[:3], " "))
			}
		}
		if len(got) < len(want) || !slices.Equal(got[:len(want)], want) {
			t.Errorf("%s: %q, want %q first", context, got, want)
		}
	}
	e.signal()
	e.wantEnd(t)

	e = mustExport(t, overlay, "-k", socket, "-t", "-r")
	if got := nbdinfo(t, "--json", e.uri); strings.Contains(got, "qemu:") {
		t.Errorf("offered unasked: %s", got)
	}
	e.signal()
	e.wantEnd(t)
}

// TestExportSeveral serves images with options of their own, which begin with what the flags say.
func TestExportSeveral(t *testing.T) {
	first, second, third := create(t), create(t)+",odd", create(t)
	mustImage(t, "convert", "-q", "-O", "qcow2", first, second)
	store(t, first, "0", "first ")
	store(t, second, "0", "second")
	store(t, third, "0", "third ")
	socket := filepath.Join(t.TempDir(), "nbd.sock")
	e := mustExport(t, first, "--socket", socket, "-t", "-x", "a", "-D", "the first", "--read-only", "--detect-zeroes=on",
		"--export", "name=b,file="+strings.ReplaceAll(second, ",", ",,")+",read-only=off,description=x,,y,detect-zeroes=off",
		"--export", "file="+third+",name=c")
	if len(e.said) != 3 || e.said[1] != second+": nbd+unix:///b?socket="+socket {
		t.Errorf("it says %q", e.said)
	}
	for name, want := range map[string]struct {
		content, description string
		readOnly             bool
	}{"a": {"first ", "the first", true}, "": {"first ", "the first", true}, "b": {"second", "x,y", false}, "c": {"third ", "", true}} {
		client := nbdtest.Dial(t, unixAddr(socket))
		client.Greet(3)
		x, _ := client.Info(nbdtest.OptInfo, name, nbdtest.InfoDescription)
		if got := string(x.Infos[nbdtest.InfoDescription]); got != want.description || x.Flags&2 != 0 != want.readOnly {
			t.Errorf("export %q: description %q, flags %#x", name, got, x.Flags)
		}
		client.Info(nbdtest.OptGo, name)
		wantBytes(t, client, 0, want.content)
		client.Disconnect()
	}
	e.signal()
	e.wantEnd(t)

	// Without IMAGE.
	e, err := startExports(t, "--socket", socket, "--export", "file="+first+",bitmap=x")
	if err == nil || !strings.Contains(err.Error(), `no bitmap "x"`) {
		t.Errorf("%v, %v", e, err)
	}
	if e, err = startExports(t, "--socket", socket, "--export", "file="+first); err != nil {
		t.Fatal(err)
	}
	client := nbdtest.Dial(t, unixAddr(socket))
	client.Go("")
	e.end(t, client)
	for _, image := range []string{first, second, third} {
		mustImage(t, "check", image)
	}
}

// TestExportSharedBase serves overlays of one image side by side.
func TestExportSharedBase(t *testing.T) {
	base := create(t)
	store(t, base, "0", "of the base")
	dir, socket := filepath.Dir(base), filepath.Join(t.TempDir(), "nbd.sock")
	args := []string{"--socket", socket, "-t"}
	for _, name := range []string{"a", "b"} {
		overlay := filepath.Join(dir, name)
		mustImage(t, "create", "-q", "-b", base, "-F", "qcow2", overlay)
		args = append(args, "--export", "name="+name+",file="+overlay)
	}
	e, err := startExports(t, args...)
	if err != nil {
		t.Fatal(err)
	}
	a, b := nbdtest.Dial(t, unixAddr(socket)), nbdtest.Dial(t, unixAddr(socket))
	a.Go("a")
	b.Go("b")
	put(t, a, 0, "OF")
	wantBytes(t, a, 0, "OF the base")
	wantBytes(t, b, 0, "of the base")
	e.signal()
	e.wantEnd(t)
	mustImage(t, "check", filepath.Join(dir, "a"))
	mustImage(t, "check", filepath.Join(dir, "b"))
}

// TestExportImageOptions: what becomes of flags without an effect that a client could see.
func TestExportImageOptions(t *testing.T) {
	i, err := newExportedImage().with("file=x,cache-size=3M,cache=directsync,format=qcow2")
	if err != nil {
		t.Fatal(err)
	}
	o, err := i.options()
	if err != nil || o.CacheBytes != 3<<20 || o.Budget == nil || i.cache != "directsync" {
		t.Errorf("%+v, %v", o, err)
	}
}

func TestExportRefusesImages(t *testing.T) {
	image := create(t)
	mustImage(t, "bitmap", image, "lost", "--add")
	mustImage(t, "snapshot", "-q", "--create", "s", image)
	for _, c := range []struct {
		says string
		args []string
	}{
		{"there is nothing to serve", nil},
		{"accepts at most 1 arg", []string{image, image}},
		{"for IMAGE, which is missing", []string{"--export", "file=" + image, "--export-name", "x"}},
		{"two exports have the name", []string{image, "--export", "file=" + image, "-r"}},
		{"in use", []string{image, "--export", "name=b,file=" + image}},
		{"option file is missing", []string{"--export", "name=x"}},
		{"no option nonsense", []string{"--export", "nonsense=x"}},
		{"no option max-clients", []string{"--export", "max-clients=1"}},
		{"is on or off", []string{"--export", "read-only=maybe"}},
		{"not of the form NAME=VALUE", []string{"--export", "read-only"}},
		{"option cache: must be one of", []string{"--export", "cache=fast"}},
		{"must be one of directsync, none, unsafe, writeback, writethrough", []string{image, "--cache", "fast"}},
		{"must be one of unmap, ignore", []string{image, "--discard", "maybe"}},
		{"must be one of off, on, unmap", []string{image, "--detect-zeroes", "maybe"}},
		{"--detect-zeroes=unmap needs --discard=unmap", []string{image, "--detect-zeroes", "unmap", "--discard", "ignore"}},
		{"--force-share needs --read-only", []string{image, "-U"}},
		{"none of the others can be", []string{image, "--nocache", "--cache", "none"}},
		{"only qcow2 images are served", []string{image, "-f", "raw"}},
		{`no bitmap "found"`, []string{image, "-B", "lost", "-B", "found"}},
		{"present content of the image", []string{image, "-B", "lost", "-l", "s"}},
		{"is not a number", []string{image, "--cache-size", "-1"}},
	} {
		e, err := startExports(t, append([]string{"--socket", filepath.Join(t.TempDir(), "s")}, c.args...)...)
		if err == nil {
			e.signal()
			e.wantEnd(t)
		}
		if err == nil || !strings.Contains(err.Error(), c.says) || exitCode(err) != 1 {
			t.Errorf("%q: %v, which does not say %q", c.args, err, c.says)
		}
	}
	mustImage(t, "check", image)
}
