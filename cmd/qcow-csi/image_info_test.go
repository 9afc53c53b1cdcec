package main

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"unicode"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// TestImageInfoIsQEMUs compares what info says with what qemu-img says of the same images, field by field and line by line.
func TestImageInfoIsQEMUs(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	if err := os.Mkdir("sub", 0o700); err != nil {
		t.Fatal(err)
	}
	secret := write(t, "secret", "the passphrase")
	encrypt := func(options, path string) { // QEMU takes long for that
		mustImage(t, "create", "--force", "-o", options, "--passphrase-file", secret, path, "3M")
	}
	mustQEMU(t, "create", "-q", "-f", "raw", "raw", "3M")
	for _, c := range []struct {
		path string
		args []string
		then func()
	}{
		{"plain", nil, nil},
		{"full", nil, func() { qemuIO(t, "full", "write 0 1M", "write -z 1M 1M") }},
		{"version-2", []string{"-o", "compat=0.10"}, nil},
		{"options", []string{"-o", "extended_l2=on,lazy_refcounts=on,refcount_bits=8,compression_type=zstd,cluster_size=16k"}, nil},
		{"data-file", []string{"-o", "data_file=data"}, nil},
		{"raw-data-file", []string{"-o", "data_file=data2,data_file_raw=on"}, nil},
		{"aes", []string{"--object", "secret,id=s,file=" + secret, "-o", "encrypt.key-secret=s,encrypt.format=aes"}, nil},
		{"luks", nil, func() { encrypt("encrypt.format=luks,encrypt.iter-time=10", "luks") }},
		{"essiv", nil, func() {
			encrypt("encrypt.format=luks,encrypt.iter-time=10,encrypt.ivgen-alg=essiv,encrypt.cipher-mode=cbc,encrypt.hash-alg=sha1", "essiv")
		}},
		{"overlay", []string{"-b", "plain", "-F", "qcow2"}, nil},
		{"sub/overlay", []string{"-b", "../plain", "-F", "qcow2"}, nil},
		{dir + "/absolute", []string{"-b", dir + "/plain", "-F", "qcow2"}, nil},
		{"third", []string{"-b", "sub/overlay", "-F", "qcow2"}, nil},
		{"on-raw", []string{"-b", "raw", "-F", "raw"}, nil},
		{"missing", []string{"-u", "-b", "missing-base", "-F", "raw"}, nil},
		{"snapshots", nil, func() {
			mustQEMU(t, "snapshot", "-c", "first", "snapshots")
			mustImage(t, "snapshot", "--create", "second: a name with spaces", "snapshots")
		}},
		{"bitmaps", nil, func() {
			mustQEMU(t, "bitmap", "--add", "-g", "32k", "bitmaps", "recording")
			mustQEMU(t, "bitmap", "--add", "--disable", "bitmaps", "resting")
		}},
		{"dirty", nil, func() { mark(t, "dirty", format.IncompatibleOffset, format.IncompatDirty) }},
		{"corrupt", nil, func() { mark(t, "corrupt", format.IncompatibleOffset, format.IncompatCorrupt) }},
	} {
		t.Run(c.path, func(t *testing.T) {
			mustQEMU(t, append(append([]string{"create", "-q", "-f", "qcow2"}, c.args...), c.path, "3M")...)
			if c.then != nil {
				c.then()
			}
			sameInfo(t, c.path)
			if c.path != "missing" {
				sameInfo(t, "--backing-chain", c.path)
			}
		})
	}
}

// mark sets a feature bit.
func mark(t *testing.T, path string, at int, bit uint64) {
	t.Helper()
	b := read(t, path)
	binary.BigEndian.PutUint64(b[at:], binary.BigEndian.Uint64(b[at:])|bit)
	write(t, path, string(b))
}

func sameInfo(t *testing.T, args ...string) {
	t.Helper()
	var got, want any
	decode(t, mustImage(t, append([]string{"info", "--output=json"}, args...)...), &got)
	decode(t, mustQEMU(t, append([]string{"info", "--output=json"}, args...)...), &want)
	list, ok := want.([]any)
	if !ok {
		list = []any{want}
	}
	for _, e := range list {
		if m, ok := e.(map[string]any); ok {
			delete(m, "children") // a matter of QEMU's block layer, in later versions
		}
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("info %q:\ngot  %v\nwant %v", args, got, want)
	}
	text := mustQEMU(t, append([]string{"info"}, args...)...)
	for line := range strings.Lines(mustImage(t, append([]string{"info"}, args...)...)) {
		if !strings.Contains(text, line) {
			t.Errorf("info %q says %q, which is not in\n%s", args, line, text)
		}
	}
}

// TestImageInfoOpensNothingElse shows that info needs no file but the image, and no passphrase, and what it does without them.
func TestImageInfoOpensNothingElse(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	secret := write(t, path+".secret", "x")
	mustImage(t, "create", "-o", "encrypt.format=luks,encrypt.iter-time=10,data_file=data", "--passphrase-file", secret, path, "1M")
	if err := os.Remove(filepath.Join(filepath.Dir(path), "data")); err != nil {
		t.Fatal(err)
	}
	if i := infoOf(t, path); !i.Encrypted || i.Specific.Data.DataFile != "data" {
		t.Errorf("%+v", i)
	}
}

// TestImageInfoOnTerminal: names in an image reach no terminal that would obey them.
func TestImageInfoOnTerminal(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	const evil = "\x1b]0;evil\x07\x9b2J\u0085"
	mustImage(t, "create", "-u", "-b", evil, "-F", "raw", path, "1M")
	mustImage(t, "create", path+".plain", "1M")
	mustImage(t, "snapshot", "-q", "-c", evil, path+".plain")
	mustImage(t, "bitmap", "-q", path+".plain", evil, "--add")
	for _, args := range [][]string{{"info", path}, {"info", path + ".plain"}, {"snapshot", path + ".plain"}, {"bitmap", path + ".plain"}} {
		out := mustImage(t, args...)
		if !strings.Contains(out, "]0;evil") || strings.ContainsFunc(strings.ReplaceAll(out, "\n", ""), unicode.IsControl) {
			t.Errorf("image %q: %q", args, out)
		}
	}
	if i := infoOf(t, path+".plain"); i.Snapshots[0].Name != strings.ToValidUTF8(evil, "\ufffd") {
		t.Errorf("%q", i.Snapshots[0].Name)
	}
}

// FuzzImageInfo describes anything.
func FuzzImageInfo(f *testing.F) {
	for _, o := range []qcow.CreateOptions{{Size: 1 << 20}, {Size: 1 << 20, ClusterSize: 512, BackingFile: "x", BackingFormat: "raw"}} {
		m := storage.NewMemory()
		if err := qcow.Create(m, o); err != nil {
			f.Fatal(err)
		}
		f.Add(m.Bytes())
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := readLayer(storage.NewMemoryFrom(b), "disk", formatQcow2)
		if err != nil {
			return
		}
		i, err := l.info()
		if err == nil && i.text() == "" {
			t.Error("an image of which there is nothing to say")
		}
	})
}

func TestImageInfoRefuses(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "disk")
	mustImage(t, "create", "-u", "-b", "disk", "-F", "qcow2", path, "1M")
	mustImage(t, "info", path)
	refuses(t, "comes back to itself", "info", "--backing-chain", path)
	mark(t, path, format.IncompatibleOffset, 1<<20)
	refuses(t, "incompatible features", "info", path)
	mustImage(t, "create", "-u", "--force", "-b", "nbd:host", "-F", "raw", path, "1M")
	mustImage(t, "info", path)
	refuses(t, "not a path", "info", "--backing-chain", path)
	// No format is stated.
	mustImage(t, "create", "--force", path, "1M")
	f, err := storage.Open(path, storage.ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	if err := qcow.RebaseUnsafe(f, write(t, path+".raw", ""), "raw"); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	b := read(t, path)
	at := strings.Index(string(b), "\xe2\x79\x2a\xca") // the type of the extension that states it
	b[at+3] = 0
	write(t, path, string(b))
	refuses(t, "not guessed", "info", "--backing-chain", path)
}
