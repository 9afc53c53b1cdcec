package repair_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/qcow-csi/qcow-csi/test/require"
)

func long() bool { return os.Getenv("QCOW_CSI_LONG") != "" }

// subject is a kind of image to repair.
type subject struct {
	name        string
	clusterSize int
	options     string // for qemu-img create -o
	features    string // snapshot, compressed, bitmap, backing, data, luks
}

func (s subject) has(feature string) bool { return strings.Contains(s.features, feature) }

// smallSubjects make files of a few dozen KiB.
var smallSubjects = []subject{
	{"width 1", 512, "refcount_bits=1", ""},
	{"width 2 with a snapshot", 512, "refcount_bits=2", "snapshot"},
	{"width 64 with snapshots and bitmaps", 512, "refcount_bits=64", "snapshot bitmap"},
	{"width 16 compressed", 1024, "refcount_bits=16", "compressed snapshot"},
	{"version 2", 512, "compat=0.10", "snapshot"},
	{"width 8 with a backing file", 1024, "refcount_bits=8", "backing snapshot"},
}

// subjects are all kinds.
var subjects = append(slices.Clip(smallSubjects),
	subject{"width 4 with bitmaps", 4096, "refcount_bits=4", "snapshot bitmap"},
	subject{"width 32", 4096, "refcount_bits=32", "compressed bitmap"},
	subject{"version 2 compressed", 4096, "compat=0.10", "compressed snapshot"},
	subject{"extended L2", 16384, "extended_l2=on", "snapshot compressed"},
	subject{"extended L2 with a backing file", 16384, "extended_l2=on,refcount_bits=32", "backing bitmap"},
	subject{"default", 65536, "lazy_refcounts=on", "snapshot bitmap"},
	subject{"data file", 4096, "", "data"},
	subject{"raw data file", 4096, "data_file_raw=on", "data"},
	subject{"LUKS", 4096, "encrypt.format=luks,encrypt.key-secret=k,encrypt.iter-time=10", "luks snapshot"},
)

const luksSecret = "secret,id=k,data=passphrase"

// workshop is where an image can be put so that QEMU finds its backing and data files.
type workshop struct {
	subject
	dir   string
	image []byte // as QEMU made it
}

var (
	workshops   = map[string]*workshop{}
	workshopsMu sync.Mutex
	workshopDir = sync.OnceValues(func() (string, error) { return os.MkdirTemp("", "repair-test-") })
)

func TestMain(m *testing.M) {
	code := m.Run()
	if dir, err := workshopDir(); err == nil {
		err = os.RemoveAll(dir)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

// open returns the workshop of a subject, with an image made by qemu-img and qemu-io.
func (s subject) open(t testing.TB) *workshop {
	t.Helper()
	require.Tool(t, "qemu-img", "qemu-io", "prlimit")
	workshopsMu.Lock()
	defer workshopsMu.Unlock()
	if w := workshops[s.name]; w != nil {
		return w
	}
	dir, err := workshopDir()
	if err != nil {
		t.Fatal(err)
	}
	w := &workshop{subject: s, dir: filepath.Join(dir, strings.ReplaceAll(s.name, " ", "-"))}
	if err := os.Mkdir(w.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	w.make(t)
	workshops[s.name] = w
	return w
}

func (w *workshop) path() string { return filepath.Join(w.dir, "image.qcow2") }

func (w *workshop) make(t testing.TB) {
	t.Helper()
	size := fmt.Sprint(80*w.clusterSize + 512)
	options := fmt.Sprintf("cluster_size=%d", w.clusterSize)
	if w.options != "" {
		options += "," + w.options
	}
	args := []string{"create", "-f", "qcow2", "--object", luksSecret}
	if w.has("backing") {
		if err := os.WriteFile(filepath.Join(w.dir, "base.raw"), bytes.Repeat([]byte("behind it "), 60*w.clusterSize/10), 0o600); err != nil {
			t.Fatal(err)
		}
		args = append(args, "-b", "base.raw", "-F", "raw")
	}
	if w.has("data") {
		options += ",data_file=" + w.path() + ".data"
	}
	switch {
	case w.has("compressed"):
		raw := filepath.Join(w.dir, "raw")
		if err := os.WriteFile(raw, bytes.Repeat([]byte("compressible "), 20*w.clusterSize/13), 0o600); err != nil {
			t.Fatal(err)
		}
		run(t, "qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, w.path())
		run(t, "qemu-img", "resize", "-f", "qcow2", w.path(), size)
	default:
		run(t, "qemu-img", append(args, "-o", options, w.path(), size)...)
	}
	w.fill(t)
	var err error
	if w.image, err = os.ReadFile(w.path()); err != nil {
		t.Fatal(err)
	}
}

// fill writes, discards, snapshots and tracks.
func (w *workshop) fill(t testing.TB) {
	t.Helper()
	at := func(format string, clusters ...int) string {
		args := make([]any, len(clusters))
		for i, c := range clusters {
			args[i] = c * w.clusterSize
		}
		return fmt.Sprintf(format, args...)
	}
	io := func(commands ...string) {
		t.Helper()
		args := w.qemuArgs("-d", "unmap")
		for _, c := range commands {
			args = append(args, "-c", c)
		}
		run(t, "qemu-io", args...)
	}
	snapshot := func(name string) {
		t.Helper()
		run(t, "qemu-img", w.qemuArgs("snapshot", "-c", name)...)
	}
	io(
		at("write -P 1 %d %d", 3, 9), at("write -P 2 %d %d", 70, 4), at("write -z %d %d", 5, 2), at("write -z -u %d %d", 8, 2),
		at("discard %d %d", 71, 1), at("write -z %d %d", 30, 3), at("write -P 3 %d %d", 40, 1), "write -P 7 512 512",
	)
	if w.has("data") { // an entry of zeroes with COPIED and, as far as it says, no host cluster
		io(at("write -z 0 %d", 1))
	}
	if w.has("snapshot") {
		snapshot("one")
		io(at("write -P 4 %d %d", 4, 3))
		snapshot("two")
		io(at("discard %d %d", 40, 1))
	}
	if w.has("bitmap") {
		run(t, "qemu-img", "bitmap", "--add", "-g", "65536", w.path(), "dirty")
		io(at("write -P 5 %d %d", 50, 2))
		run(t, "qemu-img", "bitmap", "--add", "-g", "65536", w.path(), "other")
	}
}

// qemuArgs returns arguments of qemu-img, a verb first, or of qemu-io, that end with the image.
func (w *workshop) qemuArgs(args ...string) []string {
	opts := "driver=qcow2,file.filename=" + w.path()
	if w.has("luks") {
		opts += ",encrypt.key-secret=k"
	}
	if args[0] == "-d" { // an option of qemu-io
		return append([]string{"--object", luksSecret, "--image-opts", opts}, args...)
	}
	return append(append([]string{args[0], "--object", luksSecret, "--image-opts"}, args[1:]...), opts)
}

// put writes an image where QEMU finds what belongs to it.
func (w *workshop) put(t testing.TB, image []byte) {
	t.Helper()
	if err := os.WriteFile(w.path(), image, 0o600); err != nil {
		t.Fatal(err)
	}
}

// qemuCheck returns the exit status of qemu-img check: 0 clean, 1 gave up, 2 corrupt, 3 leaks; and what it said.
func (w *workshop) qemuCheck(t testing.TB, image []byte) (exit int, said string) {
	t.Helper()
	w.put(t, image)
	return status(t, "qemu-img", w.qemuArgs("check")...)
}

// qemuRepair lets QEMU repair the image, and returns the exit status of a check behind that.
func (w *workshop) qemuRepair(t testing.TB, image []byte) (exit int, said string) {
	t.Helper()
	w.put(t, image)
	_, said = limited(t, "qemu-img", w.qemuArgs("check", "-r", "all")...)
	exit, _ = limited(t, "qemu-img", w.qemuArgs("check")...)
	return exit, said
}

// limited runs a command on a damaged image. Pointers far outside the file make QEMU extend the file to there and look at every
// cluster of it, which takes minutes: it may neither make files long nor work for long. Whether it would have managed is not known then.
func limited(t testing.TB, name string, args ...string) (exit int, said string) {
	t.Helper()
	return status(t, "prlimit", append([]string{"--fsize=67108864", "--cpu=4", "--", name}, args...)...)
}

// convert returns what QEMU reads from an image, and whether it can.
func (w *workshop) convert(t testing.TB, image []byte, args ...string) ([]byte, bool) {
	t.Helper()
	w.put(t, image)
	raw := filepath.Join(w.dir, "read.raw")
	exit, said := limited(t, "qemu-img", append(w.qemuArgs(append([]string{"convert", "-O", "raw"}, args...)...), raw)...)
	if exit != 0 {
		t.Logf("qemu-img convert: %s", said)
		return nil, false
	}
	b, err := os.ReadFile(raw)
	if err != nil {
		t.Fatal(err)
	}
	return b, true
}

func run(t testing.TB, name string, args ...string) {
	t.Helper()
	for try := 1; ; try++ {
		exit, said := status(t, name, args...)
		if exit == 0 {
			return
		}
		// QEMU measures how fast it derives keys, and gives up when the machine is too busy for that.
		if try == 50 || !strings.Contains(said, "Unable to get accurate CPU usage") {
			t.Fatalf("%s %s: exit status %d\n%s", name, strings.Join(args, " "), exit, said)
		}
	}
}

func status(t testing.TB, name string, args ...string) (exit int, said string) {
	t.Helper()
	out, err := exec.CommandContext(context.Background(), name, args...).CombinedOutput()
	var failed *exec.ExitError
	if err != nil && !errors.As(err, &failed) {
		t.Fatal(err)
	}
	if failed != nil {
		exit = failed.ExitCode()
	}
	return exit, string(out)
}
