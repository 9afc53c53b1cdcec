package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// image runs the image command and returns what it writes to stdout.
func image(t *testing.T, args ...string) (string, error) {
	t.Helper()
	return imageWith(t.Context(), t, "", args...)
}

// imageWith runs the image command with a context, and stdin.
func imageWith(ctx context.Context, t *testing.T, stdin string, args ...string) (string, error) {
	t.Helper()
	var stdout, stderr bytes.Buffer
	cmd := newImageCommand()
	cmd.SilenceErrors = true // as the root command does
	cmd.SetIn(strings.NewReader(stdin))
	cmd.SetOut(&stdout)
	cmd.SetErr(&stderr)
	cmd.SetArgs(args)
	err := cmd.ExecuteContext(ctx)
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

// refuses expects that the command fails with status 1, and says why.
func refuses(t *testing.T, why string, args ...string) {
	t.Helper()
	out, err := image(t, args...)
	if err == nil || exitCode(err) != 1 || !strings.Contains(err.Error(), why) {
		t.Errorf("image %q: %q, error %v, which does not say %q", args, out, err, why)
	}
}

// qemuImg runs qemu-img and returns what it writes to stdout, and its exit status.
func qemuImg(t *testing.T, args ...string) (string, int) {
	t.Helper()
	require.Tool(t, "qemu-img")
	cmd := exec.CommandContext(t.Context(), "qemu-img", args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if e := (*exec.ExitError)(nil); err != nil && !errors.As(err, &e) {
		t.Fatalf("qemu-img %q: %v", args, err)
	}
	if stderr.Len() > 0 {
		t.Logf("qemu-img %q: %s", args, &stderr)
	}
	return string(out), cmd.ProcessState.ExitCode()
}

func mustQEMU(t *testing.T, args ...string) string {
	t.Helper()
	out, status := qemuImg(t, args...)
	if status != 0 {
		t.Fatalf("qemu-img %q: exit status %d, %s", args, status, out)
	}
	return out
}

// qemuIO runs commands of qemu-io on an image.
func qemuIO(t *testing.T, path string, commands ...string) {
	t.Helper()
	require.Tool(t, "qemu-io")
	args := []string{"-f", "qcow2"}
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	if out, err := exec.CommandContext(t.Context(), "qemu-io", append(args, path)...).CombinedOutput(); err != nil || bytes.Contains(out, []byte("failed")) {
		t.Fatalf("qemu-io %q: %v, %s", commands, err, out)
	}
}

// alike expects that QEMU finds the same content in two disks, and the second one, an image, clean.
func alike(t *testing.T, formatA, a, formatB, b string) {
	t.Helper()
	mustQEMU(t, "compare", "-f", formatA, "-F", formatB, a, b)
	if formatB == formatQcow2 {
		mustQEMU(t, "check", "-q", "-f", formatQcow2, b)
	}
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

// rawDisk makes a raw file of so many bytes: random data here and there, zeroes that are stored, and holes.
func rawDisk(t *testing.T, path string, size int64) []byte {
	t.Helper()
	seed := rand.Uint64()
	t.Logf("seed of %s: %d", filepath.Base(path), seed)
	r := rand.New(rand.NewPCG(seed, 0))
	b, written := make([]byte, size), make([]bool, size)
	for range 12 {
		at := r.Int64N(size)
		piece := b[at:min(at+1+r.Int64N(150<<10), size)]
		zero := r.IntN(3) == 0
		for i := range piece {
			piece[i] = byte(r.Uint32())
			if zero {
				piece[i] = 0
			}
			written[at+int64(i)] = true
		}
	}
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	for i := int64(0); i < size; i++ {
		from := i
		for i < size && written[i] {
			i++
		}
		if _, err := f.WriteAt(b[from:i], from); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
		t.Fatal(err)
	}
	return b
}

// names returns what is in a folder, hidden files too.
func names(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var list []string
	for _, e := range entries {
		list = append(list, e.Name())
	}
	return list
}

// leavesNothing expects that do changes nothing about which files are in a folder.
func leavesNothing(t *testing.T, dir string, do func()) {
	t.Helper()
	before := names(t, dir)
	do()
	if after := names(t, dir); !slices.Equal(before, after) {
		t.Errorf("%q became %q", before, after)
	}
}

// hold keeps a file locked until the test ends.
func hold(t *testing.T, path string, mode storage.Mode) {
	t.Helper()
	f, err := storage.Open(path, mode)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
}

func decode(t *testing.T, s string, v any) {
	t.Helper()
	if err := json.Unmarshal([]byte(s), v); err != nil {
		t.Fatalf("%v in %s", err, s)
	}
}

func write(t *testing.T, path, content string) string {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// commandLines are what the commands can be asked to do with an image that has the snapshot and the bitmap "kept", but for those that
// make one. What they do to a file of another format, or to one in use, is no matter of what they are.
func commandLines(path string) (readers, writers [][]string) {
	target := path + ".new"
	readers = [][]string{
		{"info", path},
		{"check", path},
		{"map", path},
		{"measure", path},
		{"sha", path},
		{"snapshot", path},
		{"bitmap", path},
		{"read", path, "0", "1"},
		{"convert", "-O", "raw", path, target},
		{"repair", "--dry-run", path},
	}
	writers = [][]string{
		{"resize", path, "1G"},
		{"repair", path},
		{"check", "-r", "all", path},
		{"snapshot", path, "--create", "x"},
		{"snapshot", path, "--apply", "kept"},
		{"snapshot", path, "--delete", "kept"},
		{"bitmap", path, "kept", "--clear"},
		{"commit", path},
		{"rebase", "-b", "", path},
		{"rebase", "-u", "-b", "", path},
		{"stream", path},
		{"discard", path},
		{"compact", path},
		{"write", path, "0"},
		{"amend", "-o", "refcount_bits=32", path},
		{"convert", "-n", "-f", "raw", "-O", "qcow2", os.DevNull, path},
	}
	return readers, writers
}

// TestImageInUse shows that the commands heed locks, and that an error says so.
func TestImageInUse(t *testing.T) {
	path := create(t)
	readers, writers := commandLines(path)
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
		leavesNothing(t, filepath.Dir(path), func() {
			for _, args := range held.busy {
				if slices.Contains(args, os.DevNull) {
					continue // which is no regular file, and that is seen first
				}
				if _, err := image(t, args...); !errors.Is(err, storage.ErrBusy) || exitCode(err) != 1 {
					t.Errorf("image %q while it is in use: %v", args, err)
				}
			}
		})
		for _, args := range held.usable {
			mustImage(t, args...)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestImageForceShare reads an image that is being written to.
func TestImageForceShare(t *testing.T) {
	path := create(t)
	hold(t, path, storage.ReadWrite)
	readers, _ := commandLines(path)
	for _, args := range readers {
		if args[0] != "repair" && args[0] != "bitmap" {
			mustImage(t, append(args, "-U")...)
		}
	}
}

// TestImageCommandsOnOtherFiles gives the commands what is no image.
func TestImageCommandsOnOtherFiles(t *testing.T) {
	dir := t.TempDir()
	raw := write(t, filepath.Join(dir, "raw"), strings.Repeat("\x00", 1<<16))
	leavesNothing(t, dir, func() {
		for _, path := range []string{raw, filepath.Join(dir, "none"), dir} {
			readers, writers := commandLines(path)
			for _, args := range append(readers, writers...) {
				if _, err := image(t, args...); exitCode(err) != 1 {
					t.Errorf("image %q: %v", args, err)
				} else if !slices.Contains(args, os.DevNull) && !strings.Contains(err.Error(), filepath.Base(path)) {
					t.Errorf("image %q does not say which file: %v", args, err)
				}
			}
		}
	})
	// A link that the operator names is followed.
	path := create(t)
	link := filepath.Join(dir, "link")
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	mustImage(t, "info", link)
}

// TestImageInterrupted runs commands whose context is done: nothing has changed then, and nothing is left behind.
func TestImageInterrupted(t *testing.T) {
	path := create(t)
	mustImage(t, "snapshot", path, "--create", "kept")
	mustImage(t, "bitmap", path, "kept", "--add")
	overlay := filepath.Join(filepath.Dir(path), "overlay")
	mustImage(t, "create", "-b", path, "-F", "qcow2", overlay)
	source := write(t, filepath.Join(filepath.Dir(path), "source"), "x")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, lines := commandLines(path)
	lines = slices.DeleteFunc(lines, func(args []string) bool {
		// These change a header, or take the files of another format, which is done at once; the others come below.
		return args[0] == "rebase" || args[0] == "commit" || args[0] == "stream" || args[0] == "convert"
	})
	lines = append(lines,
		[]string{"convert", "-O", "raw", path, path + ".raw"},
		[]string{"convert", "-O", "qcow2", path, path + ".new"},
		[]string{"convert", "-O", "qcow2", "-c", path, path + ".new"},
		[]string{"convert", "-n", "-f", "raw", "-O", "qcow2", source, path},
		[]string{"create", "-o", "preallocation=full", path + ".new", "1M"},
		[]string{"commit", overlay}, []string{"stream", overlay}, []string{"rebase", "-b", "", overlay},
		[]string{"read", path, "0", "1", "--to", path + ".new"}, []string{"sha", path}, []string{"check", path}, []string{"map", path},
	)
	before := mustImage(t, "sha", path)
	leavesNothing(t, filepath.Dir(path), func() {
		for _, args := range lines {
			if _, err := imageWith(ctx, t, "x", args...); !errors.Is(err, context.Canceled) {
				t.Errorf("image %q with a context that is done: %v", args, err)
			}
		}
	})
	mustImage(t, "check", path)
	if after := mustImage(t, "sha", path); after != before {
		t.Errorf("the content was %s and is %s", before, after)
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
	refuses(t, "xml", "info", "--output", "xml", "x")
	refuses(t, "chekc", "chekc")
}

// TestImageExamples runs what the help gives as examples, in order, as far as it is about images: it must at least be understood.
func TestImageExamples(t *testing.T) {
	for _, sub := range newImageCommand().Commands() {
		for line := range strings.Lines(sub.Example) {
			_, line, _ = strings.Cut(line, "qcow-csi image ")
			line, _, _ = strings.Cut(line, " | ")
			args := strings.Fields(strings.ReplaceAll(line, `""`, "EMPTY"))
			for i := range args {
				args[i] = strings.ReplaceAll(args[i], "EMPTY", "")
			}
			parsed, rest, err := newImageCommand().Find(args)
			if err != nil || parsed.Name() != args[0] {
				t.Errorf("%q: %v", line, err)
				continue
			}
			parsed.InitDefaultHelpFlag()
			if !parsed.DisableFlagParsing {
				if err := parsed.ParseFlags(rest); err != nil {
					t.Errorf("%q: %v", line, err)
				}
				rest = parsed.Flags().Args()
			}
			if err := parsed.ValidateArgs(rest); err != nil {
				t.Errorf("%q: %v", line, err)
			}
		}
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
