package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// chain makes base, middle and top, each on the one before and in a folder of its own but for the first, and "raw", what top reads as.
func chain(t *testing.T) (dir string) {
	t.Helper()
	dir = t.TempDir()
	t.Chdir(dir)
	for _, name := range []string{"a", "b"} {
		if err := os.Mkdir(name, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	mustQEMU(t, "create", "-q", "-f", "qcow2", "base", "4M")
	qemuIO(t, "base", "write -P 1 0 3M")
	mustQEMU(t, "create", "-q", "-f", "qcow2", "-b", "../base", "-F", "qcow2", "a/middle", "5M")
	qemuIO(t, "a/middle", "write -P 2 1M 100k", "write -z 2M 64k", "write -P 3 4M 1M")
	mustQEMU(t, "create", "-q", "-f", "qcow2", "-b", "../a/middle", "-F", "qcow2", "b/top", "6M")
	qemuIO(t, "b/top", "write -P 4 1030k 10k", "write -z 4M 64k", "write -P 5 5M 64k")
	mustQEMU(t, "convert", "-f", "qcow2", "-O", "raw", "b/top", "raw")
	return dir
}

func backingOf(t *testing.T, path string) string {
	t.Helper()
	return infoOf(t, path).Backing
}

func TestImageCommit(t *testing.T) {
	for name, c := range map[string]struct {
		flags []string
		into  string
		drops bool
	}{
		"backing file": {nil, "a/middle", false},
		"drop":         {[]string{"-d"}, "a/middle", true},
		"by name":      {[]string{"-b", "../base"}, "base", true},
		"by path":      {[]string{"--base", "base"}, "base", true},
		"itself":       {[]string{"-b", "a/middle"}, "a/middle", false},
	} {
		t.Run(name, func(t *testing.T) {
			chain(t)
			before := string(read(t, "b/top"))
			out := mustImage(t, append([]string{"commit", "b/top"}, c.flags...)...)
			if want := "Committed b/top to ../" + c.into + "\n"; out != want {
				t.Errorf("%q, want %q", out, want)
			}
			alike(t, "raw", "raw", "qcow2", c.into)
			mustQEMU(t, "check", "-q", "b/top")
			if dropped := before == string(read(t, "b/top")); dropped != c.drops {
				t.Errorf("the image is as it was: %t", dropped)
			}
			if !c.drops {
				alike(t, "raw", "raw", "qcow2", "b/top")
			}
		})
	}
}

func TestImageCommitRefuses(t *testing.T) {
	chain(t)
	refuses(t, "no backing file", "commit", "base")
	refuses(t, "raw is no backing file of b/top", "commit", "-b", "raw", "b/top")
	refuses(t, "none is no backing file", "commit", "-b", "none", "b/top")
	refuses(t, "b/top is no backing file", "commit", "-b", "b/top", "b/top")
	mustImage(t, "snapshot", "-c", "kept", "b/top")
	refuses(t, "internal snapshots", "commit", "b/top")
	alike(t, "raw", "raw", "qcow2", "b/top")
}

func TestImageRebase(t *testing.T) {
	for name, c := range map[string]struct {
		args []string
		want string
	}{
		"flat":     {[]string{"-b", ""}, ""},
		"base":     {[]string{"-b", "../base", "-F", "qcow2"}, "../base"},
		"raw":      {[]string{"--backing", "../raw", "--backing-format", "raw"}, "../raw"},
		"the same": {[]string{"-b", "../a/middle", "-F", "qcow2"}, "../a/middle"},
	} {
		t.Run(name, func(t *testing.T) {
			chain(t)
			out := mustImage(t, append([]string{"rebase", "b/top"}, c.args...)...)
			if !strings.HasPrefix(out, "Rebased b/top to "+c.want) && out != "b/top has no backing file\n" {
				t.Error(out)
			}
			if b := backingOf(t, "b/top"); b != c.want {
				t.Errorf("the backing file is %q", b)
			}
			alike(t, "raw", "raw", "qcow2", "b/top")
		})
	}
}

// TestImageRebaseUnsafe changes the name of a file that was moved.
func TestImageRebaseUnsafe(t *testing.T) {
	chain(t)
	if err := os.Rename("a/middle", "a/moved"); err != nil {
		t.Fatal(err)
	}
	refuses(t, "no such file", "rebase", "-b", "../a/moved", "-F", "qcow2", "b/top")
	var did rebased
	decode(t, mustImage(t, "rebase", "--output=json", "-u", "-b", "../a/moved", "-F", "qcow2", "b/top"), &did)
	if want := (rebased{"b/top", "../a/moved", "qcow2"}); did != want {
		t.Errorf("%+v, want %+v", did, want)
	}
	alike(t, "raw", "raw", "qcow2", "b/top")
	mustImage(t, "rebase", "-u", "-b", "", "b/top")
	if b := backingOf(t, "b/top"); b != "" {
		t.Errorf("the backing file is %q", b)
	}
}

func TestImageRebaseRefuses(t *testing.T) {
	chain(t)
	before := string(read(t, "b/top"))
	for why, args := range map[string][]string{
		"which backing file":    nil,
		"-F says so":            {"-b", "../base"},
		"without a backing":     {"-b", "", "-F", "raw"},
		"none: no such":         {"-b", "none", "-F", "qcow2"},
		"comes back to itself":  {"-b", "top", "-F", "qcow2"},
		"not a path":            {"-u", "-b", "nbd:host", "-F", "raw"},
		"more than 1023":        {"-u", "-b", strings.Repeat("x", 1024), "-F", "raw"},
		"must be \"qcow2\" or ": {"-b", "../base", "-F", "vmdk"},
	} {
		refuses(t, why, append([]string{"rebase", "b/top"}, args...)...)
	}
	if before != string(read(t, "b/top")) {
		t.Error("the image has changed")
	}
}

func TestImageStream(t *testing.T) {
	for name, c := range map[string]struct{ flags, want []string }{
		"all":     {nil, []string{""}},
		"base":    {[]string{"-b", "base"}, []string{"../base"}},
		"by name": {[]string{"--base", "../base"}, []string{"../base"}},
		"nothing": {[]string{"-b", "../a/middle"}, []string{"../a/middle"}},
	} {
		t.Run(name, func(t *testing.T) {
			chain(t)
			middle := string(read(t, "a/middle"))
			var did rebased
			decode(t, mustImage(t, append([]string{"stream", "--output=json", "b/top"}, c.flags...)...), &did)
			if did.Backing != c.want[0] || backingOf(t, "b/top") != c.want[0] {
				t.Errorf("%+v", did)
			}
			alike(t, "raw", "raw", "qcow2", "b/top")
			if middle != string(read(t, "a/middle")) {
				t.Error("a backing file has changed")
			}
		})
	}
	chain(t)
	refuses(t, "no backing file of b/top", "stream", "-b", "raw", "b/top")
	if out := mustImage(t, "stream", "b/top"); out != "Streamed into b/top, which has no backing file\n" {
		t.Error(out)
	}
}

// TestImageChainFromElsewhere: names in an image are relative to its folder, whatever it is called by.
func TestImageChainFromElsewhere(t *testing.T) {
	dir := chain(t)
	want := strings.Fields(mustImage(t, "sha", "b/top"))[0]
	t.Chdir("b")
	for _, path := range []string{"top", "./top", filepath.Join(dir, "b", "top"), "../b/top"} {
		if got := strings.Fields(mustImage(t, "sha", path))[0]; got != want {
			t.Errorf("%s has %s, want %s", path, got, want)
		}
		sameInfo(t, "--backing-chain", path)
	}
	t.Chdir("..")
	mustImage(t, "stream", "-b", "base", "b/top")
	if b := backingOf(t, "b/top"); b != "../base" {
		t.Errorf("the backing file is called %q", b)
	}
}
