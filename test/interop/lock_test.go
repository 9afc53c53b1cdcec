package interop_test

import (
	"errors"
	"io"
	"net"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// TestQEMUHeedsLocksTakenHere holds an image open, and lets QEMU try.
func TestQEMUHeedsLocksTakenHere(t *testing.T) {
	require.Tool(t, "qemu-img", "qemu-io")
	path := imagePath(t)
	create(t, path, qcow.CreateOptions{Size: 1 << 20})
	readers := [][]string{
		{"qemu-img", "info", path},
		{"qemu-img", "check", "-f", "qcow2", path},
		{"qemu-img", "map", "-f", "qcow2", path},
		{"qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, path + ".raw"},
		{"qemu-io", "-r", "-f", "qcow2", "-c", "read 0 512", path},
	}
	writers := [][]string{
		{"qemu-io", "-f", "qcow2", "-c", "write 0 512", path},
		{"qemu-img", "resize", "-f", "qcow2", path, "2M"},
		{"qemu-img", "check", "-r", "all", "-f", "qcow2", path},
		{"qemu-img", "snapshot", "-c", "s", path},
	}
	mustFail := func(commands [][]string) {
		t.Helper()
		for _, c := range commands {
			if out, ok := try(t, c[0], c[1:]...); ok || !strings.Contains(out, "lock") {
				t.Errorf("%q: succeeded %t:\n%s", c, ok, out)
			}
		}
	}
	mustWork := func(commands [][]string) {
		t.Helper()
		for _, c := range commands {
			run(t, c[0], c[1:]...)
		}
	}

	img := open(t, path, storage.ReadWrite)
	mustFail(readers)
	mustFail(writers)
	mustWork([][]string{{"qemu-img", "info", "--force-share", path}})
	closeImage(t, img)

	img = open(t, path, storage.ReadOnly)
	other := open(t, path, storage.ReadOnly) // readers do not exclude each other
	mustWork(readers)
	mustFail(writers)
	closeImage(t, other)
	mustFail(writers)
	closeImage(t, img)

	mustWork(readers)
	mustWork(writers[:3])
}

// TestQEMUsLocksAreHeededHere has qemu-nbd hold an image open, and tries here.
func TestQEMUsLocksAreHeededHere(t *testing.T) {
	require.Tool(t, "qemu-nbd")
	path := imagePath(t)
	create(t, path, qcow.CreateOptions{Size: 1 << 20})
	busy := func(mode storage.Mode) {
		t.Helper()
		if f, err := storage.Open(path, mode); !errors.Is(err, storage.ErrBusy) {
			if err == nil {
				err = f.Close()
			}
			t.Errorf("Open of an image that QEMU holds: %v", err)
		}
	}

	stop := serve(t, path)
	busy(storage.ReadWrite)
	busy(storage.ReadOnly)
	stop()

	stop = serve(t, "-r", path)
	busy(storage.ReadWrite)
	closeImage(t, open(t, path, storage.ReadOnly))
	stop()

	closeImage(t, open(t, path, storage.ReadWrite)) // the locks ended with the process
	mustBeClean(t, path)
}

// serve starts qemu-nbd on a unix socket, and returns once it has the image open and serves it.
func serve(t *testing.T, args ...string) (stop func()) {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s")
	cmd := exec.CommandContext(t.Context(), "qemu-nbd", append([]string{"-f", "qcow2", "-t", "-k", socket}, args...)...)
	var output strings.Builder
	cmd.Stdout, cmd.Stderr = &output, &output
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	for !greets(t, socket) {
		select {
		case err := <-ended:
			t.Fatalf("qemu-nbd: %v\n%s", err, output.String())
		case <-time.After(10 * time.Millisecond):
		}
	}
	return func() {
		t.Helper()
		if err := cmd.Process.Kill(); err != nil {
			t.Error(err)
		}
		if err := <-ended; err == nil {
			t.Errorf("qemu-nbd had ended by itself:\n%s", output.String())
		}
	}
}

// greets says whether a server on the socket speaks NBD. qemu-nbd makes the socket before it opens the image, and greets after that.
func greets(t *testing.T, socket string) bool {
	t.Helper()
	conn, err := (&net.Dialer{}).DialContext(t.Context(), "unix", socket)
	if err != nil {
		return false
	}
	_, err = io.ReadFull(conn, make([]byte, 8))
	if closeErr := conn.Close(); closeErr != nil {
		t.Error(closeErr)
	}
	return err == nil
}
