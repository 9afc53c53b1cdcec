package main

import (
	"bytes"
	"context"
	"errors"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// TestImageDehydrate takes images apart and puts them together again: every check finds the same, and no guest data is in between.
func TestImageDehydrate(t *testing.T) {
	const guest = "what the guest wrote"
	for _, d := range damages {
		t.Run(d.name, func(t *testing.T) {
			path := create(t)
			mustImage(t, "write", "-q", path, "1M", "--from", write(t, path+".in", strings.Repeat(guest, 5000)))
			write(t, path, string(d.change(read(t, path))))
			dump, again := path+".dump", path+".again"
			var out, back dumpInfo
			decode(t, mustImage(t, "dehydrate", "--output=json", path, dump), &out)
			decode(t, mustImage(t, "rehydrate", "--output=json", dump, again), &back)
			original := read(t, path)
			if out.Length != int64(len(original)) || back.Length != out.Length || back.Metadata != out.Metadata || out.Incomplete != (len(out.LeftOut) > 0) {
				t.Errorf("%+v became %+v", out, back)
			}
			if !bytes.Contains(original, []byte(guest)) || bytes.Contains(read(t, dump), []byte(guest)) || bytes.Contains(read(t, again), []byte(guest)) {
				t.Error("there is guest data where none should be, or none in the image")
			}
			var one, other imageCheck
			first, errFirst := image(t, "check", "--output=json", path)
			second, errSecond := image(t, "check", "--output=json", again)
			decode(t, first, &one)
			decode(t, second, &other)
			other.Filename = one.Filename
			if exitCode(errFirst) != exitCode(errSecond) || !reflect.DeepEqual(one, other) {
				t.Errorf("%+v became %+v", one, other)
			}
			if _, status := qemuImg(t, "check", "-q", "-f", "qcow2", again); status != d.exit {
				t.Errorf("QEMU's exit status is %d, not %d", status, d.exit)
			}
		})
	}
}

// TestImageDehydrateSecrets leaves out what nobody else should see.
func TestImageDehydrateSecrets(t *testing.T) {
	t.Chdir(t.TempDir())
	secret := write(t, "secret", "the passphrase")
	mustImage(t, "create", "-o", "encrypt.format=luks,encrypt.iter-time=10", "-u", "-b", "a-telling-name", "-F", "raw", "--passphrase-file", secret, "disk", "1M")
	mustImage(t, "dehydrate", "disk", "plain")
	out := mustImage(t, "dehydrate", "--redact-names", "disk", "redacted")
	mustImage(t, "dehydrate", "--key-material", "disk", "keys")
	if !strings.Contains(out, "key material of the encryption is not in it") || !strings.Contains(out, "names of other files are not in it") {
		t.Error(out)
	}
	if !bytes.Contains(read(t, "plain"), []byte("a-telling-name")) || bytes.Contains(read(t, "redacted"), []byte("a-telling-name")) {
		t.Error("a name is where it should not be, or not where it should be")
	}
	for dump, opens := range map[string]bool{"plain": false, "keys": true} {
		mustImage(t, "rehydrate", dump, dump+".image")
		mustImage(t, "rebase", "-u", "-b", "", dump+".image")
		if _, err := image(t, "sha", "--passphrase-file", secret, dump+".image"); (err == nil) != opens {
			t.Errorf("%s: %v", dump, err)
		}
	}
}

func TestImageDehydrateRefuses(t *testing.T) {
	path := create(t)
	dir := filepath.Dir(path)
	dump := path + ".dump"
	mustImage(t, "dehydrate", "-q", path, dump)
	whole := read(t, dump)
	flipped := bytes.Clone(whole)
	flipped[len(flipped)/2] ^= 1
	torn, damaged := write(t, path+".torn", string(whole[:len(whole)-1])), write(t, path+".flipped", string(flipped))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	leavesNothing(t, dir, func() {
		refuses(t, "already exists", "dehydrate", path, dump)
		refuses(t, "already exists", "rehydrate", dump, path)
		refuses(t, "none", "dehydrate", path+".none", path+".new")
		refuses(t, "none", "rehydrate", path+".none", path+".new")
		refuses(t, filepath.Base(torn), "rehydrate", torn, path+".new")
		refuses(t, filepath.Base(damaged), "rehydrate", damaged, path+".new")
		refuses(t, filepath.Base(path), "rehydrate", path, path+".new")
		refuses(t, filepath.Base(dump), "dehydrate", dump, path+".new")
		for _, args := range [][]string{{"dehydrate", path, path + ".new"}, {"rehydrate", dump, path + ".new"}} {
			if _, err := imageWith(ctx, t, "", args...); !errors.Is(err, context.Canceled) {
				t.Errorf("image %q with a context that is done: %v", args, err)
			}
		}
	})
	hold(t, path, storage.ReadWrite)
	refuses(t, "in use", "dehydrate", path, path+".new")
	mustImage(t, "dehydrate", "-U", path, path+".new")
	mustImage(t, "rehydrate", "--force", dump, path+".new")
}
