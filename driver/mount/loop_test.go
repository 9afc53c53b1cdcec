package mount_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/qcow-csi/qcow-csi/test/require"
)

// loop is a loop device over a file, detached when its test ends, or when its process does.
type loop struct {
	path    string
	backing string
	f       *os.File
}

// newLoop makes a loop device over a sparse file of size bytes.
func newLoop(t *testing.T, size int64) *loop {
	t.Helper()
	backing := filepath.Join(t.TempDir(), "backing")
	f, err := os.Create(backing)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
		t.Fatal(err)
	}
	return attachLoop(t, backing, 0)
}

// attachLoop makes a loop device over the file backing.
func attachLoop(t *testing.T, backing string, flags uint32) *loop {
	t.Helper()
	require.Root(t)
	file, err := os.OpenFile(backing, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer closeFile(t, file)
	f, err := configureFreeLoop(t, &unix.LoopConfig{
		Fd: uint32(file.Fd()), Info: unix.LoopInfo64{Flags: flags | unix.LO_FLAGS_AUTOCLEAR},
	})
	require.Feature(t, err == nil, fmt.Sprintf("needs loop devices: %v", err))
	l := &loop{path: f.Name(), backing: backing, f: f}
	t.Cleanup(func() { closeFile(t, f) }) // the last close detaches
	return l
}

func closeFile(t *testing.T, f *os.File) {
	t.Helper()
	if err := f.Close(); err != nil {
		t.Error(err)
	}
}

// configureFreeLoop sets up any free loop device. Others look for one as well, so that what is free may not stay so.
func configureFreeLoop(t *testing.T, config *unix.LoopConfig) (*os.File, error) {
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer closeFile(t, control)
	for {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, err
		}
		f, err := os.OpenFile(fmt.Sprintf("/dev/loop%d", n), os.O_RDWR, 0)
		if err != nil {
			return nil, err
		}
		err = unix.IoctlLoopConfigure(int(f.Fd()), config)
		if err == nil {
			return f, nil
		}
		if err := errors.Join(err, f.Close()); !errors.Is(err, unix.EBUSY) {
			return nil, err
		}
	}
}

// resize makes the file and the device size bytes long.
func (l *loop) resize(t *testing.T, size int64) {
	t.Helper()
	if err := os.Truncate(l.backing, size); err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetInt(int(l.f.Fd()), unix.LOOP_SET_CAPACITY, 0); err != nil {
		t.Fatal(err)
	}
}

// write writes p to the device, durably.
func (l *loop) write(t *testing.T, p []byte, off int64) {
	t.Helper()
	if _, err := l.f.WriteAt(p, off); err != nil {
		t.Fatal(err)
	}
	if err := l.f.Sync(); err != nil {
		t.Fatal(err)
	}
}
