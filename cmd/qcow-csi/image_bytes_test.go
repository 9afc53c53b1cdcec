package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestImageReadWrite writes and reads pieces, through files and through streams.
func TestImageReadWrite(t *testing.T) {
	path := create(t)
	piece := strings.Repeat("a piece of the disk ", 1<<18) // more than is handled at once
	if out, err := imageWith(t.Context(), t, piece, "write", path, "1K"); err != nil || out != "Wrote 5242880 bytes to "+path+" at 1024\n" {
		t.Fatalf("%v, %s", err, out)
	}
	if out := mustImage(t, "read", path, "1024", "5M"); out != piece {
		t.Errorf("%d bytes, which are not those that were written", len(out))
	}
	qemuIO(t, path, "read -P 0 0 1k", "read -P 0 5121k 100k")
	var w written
	decode(t, mustImage(t, "write", "--output=json", "--from", write(t, path+".in", "last"), path, "10485756"), &w)
	if w.Offset != 10485756 || w.Length != 4 {
		t.Errorf("%+v", w)
	}
	mustImage(t, "read", "--to", path+".out", path, "10485750", "10")
	if b := read(t, path+".out"); string(b) != "\x00\x00\x00\x00\x00\x00last" {
		t.Errorf("%q", b)
	}
	mustImage(t, "snapshot", "-c", "kept", path)
	mustImage(t, "write", path, "0", "--from", write(t, path+".in", "new"))
	if before, after := mustImage(t, "read", "-l", "kept", path, "0", "3"), mustImage(t, "read", path, "0", "3"); before != "\x00\x00\x00" || after != "new" {
		t.Errorf("%q became %q", before, after)
	}
	if out := mustImage(t, "read", path, "10M", "0"); out != "" {
		t.Errorf("nothing is %q", out)
	}
	mustQEMU(t, "check", "-q", path)
}

func TestImageReadWriteRefuses(t *testing.T) {
	path := create(t)
	existing := write(t, path+".existing", "precious")
	leavesNothing(t, filepath.Dir(path), func() {
		refuses(t, "outside", "read", path, "10M", "1")
		refuses(t, "outside", "read", path, "0", "11M")
		refuses(t, "not a number", "read", path, "x", "1")
		refuses(t, "not a number", "read", path, "0", "x")
		refuses(t, "already exists", "read", path, "0", "1", "--to", existing)
		refuses(t, "no such file", "read", path, "0", "1", "--to", path+".none/x")
		refuses(t, "no such file", "write", path, "0", "--from", path+".none")
		refuses(t, "behind the end", "write", path, "11M")
		refuses(t, "not a number", "write", path, "x")
		refuses(t, "after 0 bytes: the rest does not fit", "write", path, "10M", "--from", existing)
		refuses(t, "after 4 bytes: the rest does not fit", "write", path, "10485756", "--from", existing)
	})
	if out := mustImage(t, "read", path, "10485756", "4"); out != "prec" {
		t.Errorf("what fits was %q", out)
	}
	secret := write(t, path+".secret", "x")
	mustImage(t, "create", "-o", "encrypt.format=luks,encrypt.iter-time=10", "--passphrase-file", secret, path+".luks", "1M")
	refuses(t, "512", "write", path+".luks", "1", "--from", existing, "--passphrase-file", secret)
}

// TestImageWriteInterrupted ends a write whose input does not come.
func TestImageWriteInterrupted(t *testing.T) {
	path := create(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd := newImageWriteCommand()
	cmd.SilenceErrors, cmd.SilenceUsage = true, true
	ctx, cancel := context.WithCancel(t.Context())
	cmd.SetIn(&waiting{r, cancel})
	cmd.SetArgs([]string{path, "0"})
	if err := cmd.ExecuteContext(ctx); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if err := errors.Join(w.Close(), r.Close()); err != nil {
		t.Error(err)
	}
	mustImage(t, "check", path)
}

// waiting is a reader that tells when somebody waits for it.
type waiting struct {
	io.Reader
	tell func()
}

func (w *waiting) Read(p []byte) (int, error) {
	w.tell()
	return w.Reader.Read(p)
}

// TestImageSHA compares with the digest of the content in a raw file.
func TestImageSHA(t *testing.T) {
	t.Chdir(t.TempDir())
	b := rawDisk(t, "raw", 5<<20)
	digest := sha256.Sum256(b)
	want := hex.EncodeToString(digest[:])
	for path, args := range map[string][]string{
		"raw":        {"-f", "raw"},
		"plain":      {"convert", "-f", "raw", "-O", "qcow2", "raw"},
		"compressed": {"convert", "-f", "raw", "-O", "qcow2", "-c", "-o", "cluster_size=4k", "raw"},
		"overlay":    {"convert", "-f", "raw", "-O", "qcow2", "-B", "base", "-F", "qcow2", "raw"},
	} {
		if path == "overlay" {
			mustImage(t, "create", "base", "1M")
		}
		flags := args
		if path != "raw" {
			mustImage(t, append(args, path)...)
			flags = nil
		}
		if out := mustImage(t, append([]string{"sha", path}, flags...)...); out != want+"  "+path+"\n" {
			t.Errorf("%s: %s, want %s", path, out, want)
		}
		var d digested
		decode(t, mustImage(t, append([]string{"sha", "--output=json", path}, flags...)...), &d)
		if d != (digested{Filename: path, Size: 5 << 20, SHA256: want}) {
			t.Errorf("%+v", d)
		}
	}
	refuses(t, "neither snapshots", "sha", "-f", "raw", "-l", "x", "raw")
	refuses(t, "not found", "sha", "-l", "x", "plain")
	refuses(t, "magic", "sha", "raw")
}
