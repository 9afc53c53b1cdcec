package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// image runs the image command and returns what it writes to stdout.
func image(t *testing.T, args ...string) (string, error) {
	t.Helper()
	var stdout, stderr bytes.Buffer
	cmd := newImageCommand()
	cmd.SilenceErrors = true // as the root command does
	cmd.SetOut(&stdout)
	cmd.SetErr(&stderr)
	cmd.SetArgs(args)
	err := cmd.ExecuteContext(t.Context())
	if stderr.Len() > 0 {
		t.Errorf("image %q wrote to stderr: %s", args, stderr.String())
	}
	return stdout.String(), err
}

func mustImage(t *testing.T, args ...string) string {
	t.Helper()
	out, err := image(t, args...)
	if err != nil {
		t.Fatalf("image %q: %v", args, err)
	}
	return out
}

// create makes an image of 10 MiB with data at 64 KiB and zeroes at 1 MiB.
func create(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.qcow2")
	mustImage(t, "create", path, "10M")
	f, err := storage.Open(path, storage.ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	img, err := qcow.Open(f, qcow.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := img.WriteAt(make([]byte, 3<<16), 1<<16); err != nil {
		t.Fatal(err)
	}
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestImageCreate(t *testing.T) {
	dir := t.TempDir()
	for name, args := range map[string][]string{
		"default": {"1G"},
		"empty":   {"0"},
		"rounded": {"1000"},
		"options": {"100M", "--cluster-size", "4K", "--refcount-bits", "1"},
	} {
		path := filepath.Join(dir, name)
		out := mustImage(t, append([]string{"create", path}, args...)...)
		if !strings.Contains(out, path) {
			t.Errorf("create says %q", out)
		}
		mustImage(t, "check", path)
	}
	var info imageInfo
	decode(t, mustImage(t, "info", "--output=json", filepath.Join(dir, "rounded")), &info)
	if info.VirtualSize != 1024 {
		t.Errorf("1000 bytes were rounded to %d", info.VirtualSize)
	}
	decode(t, mustImage(t, "info", "--output=json", filepath.Join(dir, "options")), &info)
	if info.ClusterSize != 4096 || info.Specific.Data.RefcountBits != 1 {
		t.Errorf("%+v", info)
	}
}

func TestImageCreateRefuses(t *testing.T) {
	dir := t.TempDir()
	existing := filepath.Join(dir, "existing")
	if err := os.WriteFile(existing, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	fresh := filepath.Join(dir, "fresh")
	for _, args := range [][]string{
		{existing, "1G"},
		{fresh, "-1"},
		{fresh, "1X"},
		{fresh, "16E"},
		{fresh, "1E", "--cluster-size", "512"},
		{fresh, "1G", "--cluster-size", "3K"},
		{fresh, "1G", "--cluster-size", "4M"},
		{fresh, "1G", "--cluster-size", "0"},
		{fresh, "1G", "--refcount-bits", "3"},
		{fresh, "1G", "--refcount-bits", "0"},
		{filepath.Join(dir, "none", "fresh"), "1G"},
		{fresh},
	} {
		if out, err := image(t, append([]string{"create"}, args...)...); err == nil || exitCode(err) != 1 {
			t.Errorf("create %q: %q, error %v", args, out, err)
		}
		if _, err := os.Lstat(fresh); !errors.Is(err, os.ErrNotExist) {
			t.Fatalf("create %q left a file: %v", args, err)
		}
	}
	if b, err := os.ReadFile(existing); string(b) != "precious" {
		t.Errorf("an existing file was overwritten: %q, %v", b, err)
	}
}

func TestImageInfo(t *testing.T) {
	path := create(t)
	out := mustImage(t, "info", path)
	for _, want := range []string{"image: " + path, "virtual size: 10 MiB (10485760 bytes)", "cluster_size: 65536", "refcount bits: 16", "dirty: false"} {
		if !strings.Contains(out, want+"\n") {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
}

func TestImageMap(t *testing.T) {
	path := create(t)
	var entries []mapEntry
	decode(t, mustImage(t, "map", "--output=json", path), &entries)
	if len(entries) != 3 || entries[1].Offset == nil {
		t.Fatalf("%+v", entries)
	}
	host := entries[1].Offset
	want := []mapEntry{
		{Start: 0, Length: 1 << 16, Zero: true},
		{Start: 1 << 16, Length: 3 << 16, Present: true, Data: true, Offset: host},
		{Start: 4 << 16, Length: 10<<20 - 4<<16, Zero: true},
	}
	if !reflect.DeepEqual(entries, want) {
		t.Errorf("got  %+v\nwant %+v", entries, want)
	}
	human := fmt.Sprintf("Offset          Length          Mapped to       File\n0x10000         0x30000         %-15s %s\n", fmt.Sprintf("%#x", *host), path)
	if out := mustImage(t, "map", path); out != human {
		t.Errorf("got  %q\nwant %q", out, human)
	}

	empty := filepath.Join(t.TempDir(), "empty")
	mustImage(t, "create", empty, "0")
	decode(t, mustImage(t, "map", "--output=json", empty), &entries)
	if len(entries) != 0 {
		t.Errorf("map of an empty disk: %+v", entries)
	}
}

func TestImageResize(t *testing.T) {
	path := create(t)
	for _, step := range []struct {
		arg  string
		want int64
	}{{"20M", 20 << 20}, {"+512K", 20<<20 + 512<<10}, {"+1", 20<<20 + 512<<10 + 512}, {"2G", 2 << 30}, {"2G", 2 << 30}} {
		mustImage(t, "resize", path, step.arg)
		var info imageInfo
		decode(t, mustImage(t, "info", "--output=json", path), &info)
		if info.VirtualSize != step.want {
			t.Errorf("resize %s: %d bytes, want %d", step.arg, info.VirtualSize, step.want)
		}
		mustImage(t, "check", path)
	}
	for _, arg := range []string{"1G", "-1G", "+", "+9999999999G", fmt.Sprintf("+%d", int64(math.MaxInt64)), "8E", "x"} {
		if out, err := image(t, "resize", path, arg); err == nil || exitCode(err) != 1 {
			t.Errorf("resize %s: %q, error %v", arg, out, err)
		}
	}
}

func TestImageCheck(t *testing.T) {
	path := create(t)
	if out := mustImage(t, "check", path); !strings.HasPrefix(out, "No errors were found on the image.\n3/160 = 1.88% allocated, 0.00% fragmented, 0.00% compressed clusters\nImage end offset: ") {
		t.Error(out)
	}
	original, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	// The first refcount block is the third cluster; the refcount of the last cluster is made 2, that of the header 0.
	last := len(original)/65536 - 1
	for name, c := range map[string]struct {
		at, exit int
		value    byte
		want     string
	}{
		"leak":    {2*65536 + 2*last + 2 + 1, exitLeaks, 1, "leak"},
		"corrupt": {2*65536 + 1, exitCorrupt, 0, "refcount too low"},
	} {
		t.Run(name, func(t *testing.T) {
			damaged := bytes.Clone(original)
			damaged[c.at] = c.value
			if err := os.WriteFile(path, damaged, 0o600); err != nil {
				t.Fatal(err)
			}
			out, err := image(t, "check", path)
			if exitCode(err) != c.exit || !strings.Contains(out, c.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("exit status %d, error %v, output\n%s", exitCode(err), err, out)
			}
			out, err = image(t, "check", "--output=json", path)
			var r imageCheck
			decode(t, out, &r)
			if exitCode(err) != c.exit || r.Leaks+r.Corruptions != 1 || len(r.Findings) != 1 {
				t.Errorf("exit status %d, error %v, %+v", exitCode(err), err, r)
			}
		})
	}

	if err := os.WriteFile(path, original, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := image(t, "check", "--max-memory", "1K", path); exitCode(err) != 1 {
		t.Errorf("a check with too little memory: %v", err)
	}
	if err := os.WriteFile(path, original[:100], 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := image(t, "check", path); exitCode(err) != 1 {
		t.Errorf("a check of a torn header: %v", err)
	}
}

// TestImageInUse shows that the commands heed locks, and that an error says so.
func TestImageInUse(t *testing.T) {
	path := create(t)
	readers, writers := [][]string{{"info", path}, {"check", path}, {"map", path}}, [][]string{{"resize", path, "1G"}}
	for _, held := range []struct {
		mode   storage.Mode
		busy   [][]string
		usable [][]string
	}{
		{storage.ReadWrite, append(readers, writers...), nil},
		{storage.ReadOnly, writers, readers},
	} {
		f, err := storage.Open(path, held.mode)
		if err != nil {
			t.Fatal(err)
		}
		for _, args := range held.busy {
			if _, err := image(t, args...); !errors.Is(err, storage.ErrBusy) || exitCode(err) != 1 {
				t.Errorf("image %q while it is in use: %v", args, err)
			}
		}
		for _, args := range held.usable {
			mustImage(t, args...)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestImageCommandsOnOtherFiles(t *testing.T) {
	dir := t.TempDir()
	raw := filepath.Join(dir, "raw")
	if err := os.WriteFile(raw, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{raw, filepath.Join(dir, "none"), dir} {
		for _, args := range [][]string{{"info", path}, {"check", path}, {"map", path}, {"resize", path, "1G"}} {
			if _, err := image(t, args...); exitCode(err) != 1 || !strings.Contains(err.Error(), filepath.Base(path)) {
				t.Errorf("image %q: %v", args, err)
			}
		}
	}
	// A link that the operator names is followed.
	path := create(t)
	link := filepath.Join(dir, "link")
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	mustImage(t, "info", link)
}

// TestImageOutputIsQEMUs compares the JSON with what qemu-img prints for the same image, field by field.
func TestImageOutputIsQEMUs(t *testing.T) {
	require.Tool(t, "qemu-img")
	path := create(t)
	for _, command := range []string{"info", "check", "map"} {
		t.Run(command, func(t *testing.T) {
			out, err := exec.CommandContext(t.Context(), "qemu-img", command, "-f", "qcow2", "--output=json", path).Output()
			if err != nil {
				t.Fatal(err)
			}
			var got, want any
			decode(t, string(out), &want)
			decode(t, mustImage(t, command, "--output=json", path), &got)
			if !reflect.DeepEqual(got, want) {
				t.Errorf("got  %v\nwant %v", got, want)
			}
		})
	}
}

func TestImageHelp(t *testing.T) {
	cmd := newImageCommand()
	for _, sub := range cmd.Commands() {
		if sub.Short == "" || sub.Long == "" || !strings.Contains(sub.Example, "qcow-csi image "+sub.Name()) {
			t.Errorf("%s: help lacks a description or an example", sub.Name())
		}
		if out := mustImage(t, sub.Name(), "--help"); !strings.Contains(out, "Examples:") {
			t.Errorf("%s --help: %s", sub.Name(), out)
		}
	}
	if out := mustImage(t); !strings.Contains(out, "Available Commands:") {
		t.Errorf("image without a command: %s", out)
	}
	if _, err := image(t, "info", "--output", "xml", "x"); err == nil {
		t.Error("--output xml was accepted")
	}
	if _, err := image(t, "chekc"); err == nil {
		t.Error("an unknown command was accepted")
	}
}

func TestExitCode(t *testing.T) {
	for _, c := range []struct {
		err  error
		want int
	}{
		{nil, 0},
		{errors.New("plain"), 1},
		{&exitError{3, errors.New("leaks")}, 3},
		{fmt.Errorf("wrapped: %w", &exitError{2, errors.New("corrupt")}), 2},
	} {
		if got := exitCode(c.err); got != c.want {
			t.Errorf("exitCode(%v) = %d, want %d", c.err, got, c.want)
		}
	}
}

func TestSizes(t *testing.T) {
	for s, want := range map[string]int64{
		"0": 0, "1": 1, "512b": 512, "1k": 1024, "1K": 1024, "10M": 10 << 20, "1.5G": 3 << 29, "2T": 2 << 40, "1P": 1 << 50, "7E": 7 << 60,
		"1Gi": 1 << 30, "64KiB": 64 << 10, "0.0001": 0, "9223372036854775807": math.MaxInt64,
	} {
		if got, err := parseSize(s); err != nil || got != want {
			t.Errorf("parseSize(%q) = %d, %v, want %d", s, got, err, want)
		}
	}
	for _, s := range []string{"", "G", "-1", "+1", "1X", "1 G", "1e3", "1/2", "0x10", "1.", ".5", "1GG", "8E", "9223372036854775808", "1\n"} {
		if got, err := parseSize(s); err == nil {
			t.Errorf("parseSize(%q) = %d", s, got)
		}
	}
	for n, want := range map[int64]string{
		0: "0 B", 999: "999 B", 1000: "0.977 KiB", 1023: "0.999 KiB", 1024: "1 KiB", 10 << 20: "10 MiB", 1023 << 20: "0.999 GiB", math.MaxInt64: "8 EiB",
	} {
		if got := humanSize(n); got != want {
			t.Errorf("humanSize(%d) = %q, want %q", n, got, want)
		}
	}
}

func decode(t *testing.T, s string, v any) {
	t.Helper()
	if err := json.Unmarshal([]byte(s), v); err != nil {
		t.Fatalf("%v in %s", err, s)
	}
}
