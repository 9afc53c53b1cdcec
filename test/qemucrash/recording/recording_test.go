package recording_test

import (
	"bytes"
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/qemucrash/recording"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// watched has two files to be watched and one that is not.
type watched struct {
	dir   string
	shim  *recording.Shim
	files []string
}

func build(t *testing.T) *recording.Shim {
	require.Tool(t, "gcc")
	shim, err := recording.Build(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return shim
}

func newWatched(t *testing.T, shim *recording.Shim) *watched {
	w := &watched{dir: t.TempDir(), shim: shim}
	for _, name := range []string{"first", "second", "other"} {
		w.files = append(w.files, filepath.Join(w.dir, name))
		if err := os.WriteFile(w.files[len(w.files)-1], bytes.Repeat([]byte("x"), 4096), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return w
}

// run runs a shell script in the directory and returns the log.
func (w *watched) run(t *testing.T, script string) []storage.Op {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "sh", "-ec", script)
	cmd.Dir = w.dir
	log, err := w.shim.Watch(cmd, filepath.Join(w.dir, "log"), w.files[0], w.files[1])
	if err != nil {
		t.Fatal(err)
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if err := log.Close(); err != nil {
		t.Fatal(err)
	}
	return log.Ops
}

// The fallocate program syncs by itself.
func TestShimLogsEveryKindOfCall(t *testing.T) {
	shim := build(t)
	for script, want := range map[string]string{
		"printf abc >>first": "write 0x1000+0x3",
		"printf abc | dd of=first seek=5 bs=1 count=3 conv=notrunc":  "write 0x5+0x1\nwrite 0x6+0x1\nwrite 0x7+0x1",
		"printf abc | dd of=first bs=3 conv=notrunc,fsync":           "write 0x0+0x3\nsync",
		"printf abc | dd of=first bs=3 conv=notrunc,fdatasync":       "write 0x0+0x3\nsync",
		"printf abc | dd of=first bs=3 conv=notrunc oflag=dsync":     "write-sync 0x0+0x3",
		"truncate -s 100 first; truncate -s 9k second":               "truncate 0x64\nfile 1: truncate 0x2400",
		"fallocate -p -o 512 -l 1024 first":                          "punch 0x200+0x400\nsync",
		"fallocate -o 4096 -l 100 first":                             "allocate 0x1000+0x64\nsync",
		"fallocate -n -o 4096 -l 100 first":                          "sync",
		"printf abc >>other":                                         "",
		"truncate -s 100 first; mv second third; printf abc >>third": "truncate 0x64\nfile 1: write 0x1000+0x3",
	} {
		t.Run(script, func(t *testing.T) {
			w := newWatched(t, shim)
			initial := [][]byte{read(t, w.files[0]), read(t, w.files[1])}
			ops := w.run(t, script)
			if got := strings.TrimSpace(storage.Trace(ops)); got != want {
				t.Errorf("got\n%s\nwant\n%s", got, want)
			}
			final, err := recording.Replay(initial, ops)
			if err != nil {
				t.Fatal(err)
			}
			second := w.files[1]
			if strings.Contains(script, "third") {
				second = filepath.Join(w.dir, "third")
			}
			if !bytes.Equal(final[0], read(t, w.files[0])) || !bytes.Equal(final[1], read(t, second)) {
				t.Error("repeating the log does not give the files")
			}
		})
	}
}

// The log has the order in which the file changed, whichever threads changed it.
func TestShimOrdersThreads(t *testing.T) {
	require.Tool(t, "qemu-io")
	w := newWatched(t, build(t))
	script := "qemu-io -f raw -t writeback"
	for i := range 64 {
		script += ` -c "aio_write -P ` + string(rune('0'+i%10)) + ` 0 4k"`
	}
	ops := w.run(t, script+` -c aio_flush first`)
	final, err := recording.Replay([][]byte{bytes.Repeat([]byte("x"), 4096), bytes.Repeat([]byte("x"), 4096)}, ops)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(final[0], read(t, w.files[0])) {
		t.Error("the log ends with another write than the file")
	}
}

func TestWatchRefuses(t *testing.T) {
	w := newWatched(t, build(t))
	cmd := exec.CommandContext(t.Context(), "true")
	if _, err := w.shim.Watch(cmd, filepath.Join(w.dir, "log"), "a\nb"); err == nil {
		t.Error("a name with a newline was accepted")
	}
	if _, err := w.shim.Watch(cmd, filepath.Join(w.dir, "log"), filepath.Join(w.dir, "absent")); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Run(); err == nil {
		t.Error("a program ran although what it does could not be logged")
	}
}

// logged lets a program log the records, and reads them.
func logged(t *testing.T, shim *recording.Shim, records []byte) (*recording.Log, error) {
	t.Helper()
	w := newWatched(t, shim)
	cmd := exec.CommandContext(t.Context(), "true")
	log, err := w.shim.Watch(cmd, filepath.Join(w.dir, "log"), w.files...)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(w.dir, "log"), records, 0o600); err != nil {
		t.Fatal(err)
	}
	return log, log.Close()
}

func record(fields ...int64) (b []byte) {
	for _, f := range fields {
		b = binary.NativeEndian.AppendUint64(b, uint64(f))
	}
	return b
}

func TestLog(t *testing.T) {
	shim := build(t)
	whole := append(record(0, 2, 0, 5, 3, 0), "abc"...)
	if log, err := logged(t, shim, whole); err != nil || len(log.Ops) != 1 || string(log.Ops[0].Data) != "abc" || log.Ops[0].File != 2 {
		t.Fatalf("%v, %v", log.Ops, err)
	}
	const zeroRange, keepSize = 0x10, 1 // of linux/falloc.h
	zero := slices.Concat(record(1, 0, zeroRange, 512, 1024, 4096), record(1, 1, zeroRange|keepSize, 3584, 1024, 4096),
		record(1, 2, zeroRange, 8192, 10, 4096))
	log, err := logged(t, shim, zero)
	const want = "punch 0x200+0x400\nallocate 0x200+0x400\nfile 1: punch 0xe00+0x200\nfile 2: allocate 0x2000+0xa\n"
	if got := storage.Trace(log.Ops); err != nil || got != want {
		t.Errorf("zeroed ranges are read as\n%s%v", got, err)
	}
	for name, records := range map[string][]byte{
		"cut in the data":    whole[:len(whole)-1],
		"cut in the numbers": whole[:20],
		"unknown kind":       record(9, 0, 0, 0, 0, 0),
		"unknown file":       record(3, 3, 0, 0, 0, 0),
		"negative offset":    record(0, 0, 0, -1, 0, 0),
		"negative length":    record(0, 0, 0, 0, -1, 0),
		"huge write":         record(0, 0, 0, 0, 1<<40, 0),
		"unknown fallocate":  record(1, 0, 0x20, 0, 0, 0),
	} {
		if log, err := logged(t, shim, records); err == nil {
			t.Errorf("%s: read as %v", name, log.Ops)
		}
	}
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}
