package main

import (
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

// mapped returns what map says, as qemu-img says it: without what only later versions of it have, and without what it says of clusters
// that the guest can't see.
func mapped(t *testing.T, out string) []mapEntry {
	t.Helper()
	var all, joined []mapEntry
	decode(t, out, &all)
	for _, e := range all {
		if e.Length == 0 { // QEMU describes even that
			continue
		}
		e.Compressed = false
		if !e.Present {
			e.Offset = nil
		}
		if last := len(joined) - 1; last >= 0 && !e.Present && !joined[last].Present && e.Depth == joined[last].Depth {
			joined[last].Length += e.Length
			continue
		}
		joined = append(joined, e)
	}
	return joined
}

// TestImageMapIsQEMUs compares the map of images with what qemu-img finds.
func TestImageMapIsQEMUs(t *testing.T) {
	t.Chdir(t.TempDir())
	rawDisk(t, "raw", 3<<20)
	secret := write(t, "secret", "the passphrase")
	luks := "driver=qcow2,encrypt.key-secret=s,file.filename=luks"
	for _, c := range []struct {
		path string
		make func(path string)
	}{
		{"plain", func(path string) { mustQEMU(t, "convert", "-f", "raw", "-O", "qcow2", "raw", path) }},
		{"small", func(path string) {
			mustQEMU(t, "convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=512", "raw", path)
		}},
		{"compressed", func(path string) { mustQEMU(t, "convert", "-c", "-f", "raw", "-O", "qcow2", "raw", path) }},
		{"zeroes", func(path string) {
			mustQEMU(t, "convert", "-f", "raw", "-O", "qcow2", "raw", path)
			qemuIO(t, path, "write -z 100k 1M", "write -z -u 2M 512k", "discard 1280k 64k")
		}},
		{"overlay", func(path string) {
			mustQEMU(t, "create", "-q", "-f", "qcow2", "-b", "plain", "-F", "qcow2", path, "5M")
			qemuIO(t, path, "write 1M 64k", "write -z 2M 64k", "write 4M 10k")
		}},
		{"third", func(path string) {
			mustQEMU(t, "create", "-q", "-f", "qcow2", "-b", "overlay", "-F", "qcow2", path, "4M")
			qemuIO(t, path, "write 0 1k", "write 3500k 64k")
		}},
		{"on raw", func(path string) {
			mustQEMU(t, "create", "-q", "-f", "qcow2", "-b", "raw", "-F", "raw", path, "4M")
			qemuIO(t, path, "write 0 1k", "write 3500k 64k")
		}},
		{"subclusters", func(path string) {
			mustQEMU(t, "create", "-q", "-f", "qcow2", "-o", "extended_l2=on", "-b", "plain", "-F", "qcow2", path, "5M")
			qemuIO(t, path, "write 6k 2k", "write -z 70k 20k", "write 1M 200k", "discard 1052k 4k")
		}},
		{"data file", func(path string) {
			mustQEMU(t, "create", "-q", "-f", "qcow2", "-o", "data_file=data", path, "5M")
			qemuIO(t, path, "write 0 64k", "write 1M 64k", "write -z 1M 64k")
		}},
		{"empty", func(path string) { mustQEMU(t, "create", "-q", "-f", "qcow2", path, "0") }},
		{"luks", func(path string) {
			mustImage(t, "convert", "-f", "raw", "-O", "qcow2", "-o", "encrypt.format=luks,encrypt.iter-time=10", "--target-passphrase-file", secret, "raw", path)
		}},
	} {
		t.Run(c.path, func(t *testing.T) {
			c.make(c.path)
			args := []string{"-f", "qcow2", c.path}
			if c.path == "luks" {
				args = []string{"--object", "secret,id=s,file=" + secret, "--image-opts", luks}
			}
			for _, part := range [][]string{nil, {"--start-offset=700K", "--max-length=1M"}} {
				got := mapped(t, mustImage(t, append([]string{"map", "--output=json", "--passphrase-file", secret, c.path}, part...)...))
				want := mapped(t, mustQEMU(t, append(append([]string{"map", "--output=json"}, part...), args...)...))
				if !reflect.DeepEqual(got, want) {
					t.Errorf("map %q:\ngot  %+v\nwant %+v", part, got, want)
				}
			}
			// QEMU gives up where data has no place that it could name.
			if text, status := qemuImg(t, append([]string{"map"}, args...)...); status == 0 {
				if got := mustImage(t, "map", c.path); got != text {
					t.Errorf("got  %s\nwant %s", got, text)
				}
			}
		})
	}
	if out := mustImage(t, "map", "compressed"); !strings.Contains(out, "compressed      compressed\n") {
		t.Error(out)
	}
	if out := mustImage(t, "map", "--passphrase-file", secret, "luks"); !strings.Contains(out, "encrypted       luks\n") {
		t.Error(out)
	}
	var compressed []mapEntry
	decode(t, mustImage(t, "map", "--output=json", "compressed"), &compressed)
	for _, e := range compressed {
		if e.Compressed && (!e.Data || e.Offset != nil) {
			t.Errorf("%+v", e)
		}
	}
}

func TestImageMapRefuses(t *testing.T) {
	path := create(t)
	refuses(t, "not a number", "map", "--start-offset", "x", path)
	var entries []mapEntry
	decode(t, mustImage(t, "map", "--output=json", "--start-offset", "1T", path), &entries)
	if len(entries) != 0 {
		t.Errorf("behind the end of the disk: %+v", entries)
	}
	overlay := filepath.Join(filepath.Dir(path), "overlay")
	mustImage(t, "create", "-u", "-b", "none", "-F", "qcow2", overlay, "1M")
	refuses(t, "none", "map", overlay)
	secret := write(t, overlay+".secret", "x")
	mustImage(t, "create", "--force", "-o", "encrypt.format=luks,encrypt.iter-time=10", "--passphrase-file", secret, overlay, "1M")
	refuses(t, "passphrase", "map", overlay)
	refuses(t, "passphrase", "map", overlay, "--passphrase-file", write(t, secret, "y"))
}
