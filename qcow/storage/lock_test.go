package storage

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/qcow-csi/qcow-csi/test/require"
)

func modeName(m Mode) string {
	return map[Mode]string{ReadOnly: "reader", ReadWrite: "writer", Shared: "sharer"}[m]
}

func TestLocks(t *testing.T) {
	for _, c := range []struct {
		first, second Mode
		busy          bool
	}{
		{ReadOnly, ReadOnly, false},
		{ReadOnly, ReadWrite, true},
		{ReadWrite, ReadOnly, true},
		{ReadWrite, ReadWrite, true},
		{Shared, Shared, false},
		{Shared, ReadOnly, false},
		{Shared, ReadWrite, false},
		{ReadOnly, Shared, false},
		{ReadWrite, Shared, false},
	} {
		t.Run(modeName(c.first)+" then "+modeName(c.second), func(t *testing.T) {
			f, path := newOSFile(t)
			closeFile(t, f)
			first, err := Open(path, c.first)
			mustDo(t, err)
			second, err := Open(path, c.second)
			if c.busy {
				if !errors.Is(err, ErrBusy) {
					t.Fatalf("%v; want ErrBusy", err)
				}
			} else {
				mustDo(t, err)
				closeFile(t, second)
			}
			closeFile(t, first)
			// A refused attempt leaves no locks, and Close none either.
			third, err := Open(path, ReadWrite)
			mustDo(t, err)
			closeFile(t, third)
		})
	}
}

// The bytes are QEMU's: 100 and on say what the holder does, 200 and on what it does not share; read, write, write unchanged, resize.
func TestLockBytes(t *testing.T) {
	all := []int64{100, 101, 102, 103, 200, 201, 202, 203}
	for mode, want := range map[Mode]struct{ holds, yields []int64 }{
		ReadWrite: {holds: []int64{100, 101, 103, 201, 203}, yields: []int64{101, 103, 200, 201, 203}},
		ReadOnly:  {holds: []int64{100, 201, 203}, yields: []int64{101, 103, 200}},
		Shared:    {holds: []int64{100}, yields: []int64{200}},
	} {
		t.Run(modeName(mode), func(t *testing.T) {
			created, path := newOSFile(t)
			closeFile(t, created)
			other, err := os.OpenFile(path, os.O_RDWR, 0)
			mustDo(t, err)
			defer func() { mustDo(t, other.Close()) }()

			f, err := Open(path, mode)
			mustDo(t, err)
			var holds, yields []int64
			for _, b := range all {
				var found unix.Flock_t
				mustDo(t, fcntl(other, unix.F_OFD_GETLK, unix.F_WRLCK, b, &found))
				if found.Type == unix.F_RDLCK {
					holds = append(holds, b)
				}
			}
			closeFile(t, f)
			for _, b := range all {
				mustDo(t, fcntl(other, unix.F_OFD_SETLK, unix.F_RDLCK, b, nil))
				f, err := Open(path, mode)
				if errors.Is(err, ErrBusy) {
					yields = append(yields, b)
				} else {
					mustDo(t, err)
					closeFile(t, f)
				}
				mustDo(t, fcntl(other, unix.F_OFD_SETLK, unix.F_UNLCK, b, nil))
			}
			if !slices.Equal(holds, want.holds) || !slices.Equal(yields, want.yields) {
				t.Errorf("holds %d and yields to %d; want %d and %d", holds, yields, want.holds, want.yields)
			}
		})
	}
}

// A chain opens its backing file as a reader, under any number of overlays; nobody can write to it meanwhile, whatever name it goes by.
func TestBackingFileInUse(t *testing.T) {
	created, path := newOSFile(t)
	closeFile(t, created)
	alias := path + ".alias"
	mustDo(t, os.Link(path, alias))
	first, err := Open(path, ReadOnly)
	mustDo(t, err)
	second, err := Open(alias, ReadOnly)
	mustDo(t, err)
	if !first.Is(second) || !first.Is(first) {
		t.Error("a file is not itself under another name")
	}
	if _, err := Open(alias, ReadWrite); !errors.Is(err, ErrBusy) {
		t.Errorf("%v; want ErrBusy", err)
	}
	closeFile(t, first)
	if _, err := Open(path, ReadWrite); !errors.Is(err, ErrBusy) { // the other reader's locks are its own
		t.Errorf("%v; want ErrBusy", err)
	}
	closeFile(t, second)
	writer, err := Open(path, ReadWrite)
	mustDo(t, err)
	other, _ := newOSFile(t)
	if writer.Is(other) {
		t.Error("two files are one")
	}
	closeFile(t, writer)
	closeFile(t, other)
}

func TestCreatedFileIsLocked(t *testing.T) {
	f, path := newOSFile(t)
	defer closeFile(t, f)
	if _, err := Open(path, ReadOnly); !errors.Is(err, ErrBusy) {
		t.Fatalf("%v; want ErrBusy", err)
	}
}

// QEMU never locks exclusively, but another program may.
func TestExclusiveLockOfAnother(t *testing.T) {
	f, path := newOSFile(t)
	closeFile(t, f)
	other, err := os.OpenFile(path, os.O_RDWR, 0)
	mustDo(t, err)
	defer func() { mustDo(t, other.Close()) }()
	mustDo(t, fcntl(other, unix.F_OFD_SETLK, unix.F_WRLCK, usesBase+permRead, nil))
	if _, err := Open(path, ReadOnly); !errors.Is(err, ErrBusy) {
		t.Fatalf("%v; want ErrBusy", err)
	}
}

// qemuImage returns the path of an image of a format that has tables: of a raw one QEMU locks less.
func qemuImage(t *testing.T) string {
	t.Helper()
	require.Tool(t, "qemu-img", "qemu-io")
	path := filepath.Join(t.TempDir(), "image")
	out, err := exec.CommandContext(t.Context(), "qemu-img", "create", "-q", "-f", "qcow2", path, "1M").CombinedOutput()
	if err != nil {
		t.Fatalf("qemu-img create: %v: %s", err, out)
	}
	return path
}

func TestLocksHoldQEMUOff(t *testing.T) {
	for _, c := range []struct {
		mode    Mode
		command []string
		works   bool
	}{
		{ReadWrite, []string{"qemu-img", "info", "-f", "qcow2"}, false},
		{ReadWrite, []string{"qemu-io", "-f", "qcow2", "-c", "write 0 512"}, false},
		{ReadOnly, []string{"qemu-img", "info", "-f", "qcow2"}, true},
		{ReadOnly, []string{"qemu-io", "-f", "qcow2", "-c", "write 0 512"}, false},
		{Shared, []string{"qemu-img", "info", "-f", "qcow2"}, true},
		{Shared, []string{"qemu-io", "-f", "qcow2", "-c", "write 0 512"}, true},
		{ReadWrite, []string{"qemu-img", "info", "-U", "-f", "qcow2"}, true},
	} {
		t.Run(modeName(c.mode)+" and "+strings.Join(c.command[:2], " "), func(t *testing.T) {
			path := qemuImage(t)
			f, err := Open(path, c.mode)
			mustDo(t, err)
			run := func() ([]byte, error) {
				return exec.CommandContext(t.Context(), c.command[0], append(c.command[1:], path)...).CombinedOutput()
			}
			out, err := run()
			if c.works {
				if err != nil {
					t.Errorf("%v: %s", err, out)
				}
			} else if err == nil || !bytes.Contains(out, []byte("lock")) {
				t.Errorf("%v: %s; want a complaint about a lock", err, out)
			}
			closeFile(t, f)
			if out, err := run(); err != nil {
				t.Errorf("after Close: %v: %s", err, out)
			}
		})
	}
}

func TestLocksOfQEMU(t *testing.T) {
	for name, c := range map[string]struct {
		flags []string
		busy  map[Mode]bool
	}{
		"writer": {nil, map[Mode]bool{ReadOnly: true, ReadWrite: true, Shared: false}},
		"reader": {[]string{"-r"}, map[Mode]bool{ReadOnly: false, ReadWrite: true, Shared: false}},
	} {
		t.Run(name, func(t *testing.T) {
			path := qemuImage(t)
			stop := holdWithQEMU(t, path, c.flags...)
			for mode, busy := range c.busy {
				f, err := Open(path, mode)
				if err == nil {
					closeFile(t, f)
				}
				if busy != errors.Is(err, ErrBusy) || !busy && err != nil {
					t.Errorf("%s: %v", modeName(mode), err)
				}
			}
			stop()
			f, err := Open(path, ReadWrite)
			mustDo(t, err)
			closeFile(t, f)
		})
	}
}

// holdWithQEMU returns when qemu-io has opened path. It holds it until stop is called.
func holdWithQEMU(t *testing.T, path string, flags ...string) (stop func()) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "qemu-io", append(append([]string{"-f", "qcow2"}, flags...), path)...)
	in, err := cmd.StdinPipe()
	mustDo(t, err)
	out, err := cmd.StdoutPipe()
	mustDo(t, err)
	var complaint bytes.Buffer
	cmd.Stderr = &complaint
	mustDo(t, cmd.Start())
	if _, err := out.Read(make([]byte, 64)); err != nil { // the prompt comes when the image is open
		t.Fatalf("qemu-io: %v, %v: %s", err, cmd.Wait(), &complaint)
	}
	return func() {
		mustDo(t, in.Close())
		mustDo(t, cmd.Wait())
	}
}
