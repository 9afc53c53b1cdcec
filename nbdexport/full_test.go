package nbdexport_test

import (
	"bytes"
	"context"
	"errors"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/qcow-csi/qcow-csi/nbdexport"
	"github.com/qcow-csi/qcow-csi/nbdexport/nbdtest"
	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/check"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// imageIn makes an empty image in f and opens it.
func imageIn(t *testing.T, f storage.File, size int64) *qcow.Image {
	t.Helper()
	if err := qcow.Create(f, qcow.CreateOptions{Size: size}); err != nil {
		t.Fatal(err)
	}
	img, err := qcow.Open(f, qcow.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// wantClean checks the file of an image that is closed.
func wantClean(t *testing.T, mem *storage.Memory) {
	t.Helper()
	report, err := check.Check(context.Background(), storage.NewMemoryFrom(mem.Bytes()), check.Options{})
	if err != nil || !report.Clean() {
		t.Errorf("check: %v, %v", report, err)
	}
}

// TestFullDisk writes until there is no space left: the client is told, what it was acknowledged is there, the image is
// consistent, and all goes on once there is room.
func TestFullDisk(t *testing.T) {
	const size, piece = 16 << 20, 96 << 10
	forEachStyle(t, func(t *testing.T, style nbdtest.Style) {
		mem := storage.NewMemory()
		img := imageIn(t, mem, size)
		t.Cleanup(func() { // after the server
			if err := img.Close(); err != nil {
				t.Error(err)
			}
			wantClean(t, mem)
		})
		var failed atomic.Int32
		client := connectIn(t, style, nbdexport.NewImageBackend(img, nbdexport.ImageOptions{
			Failed: func(_ string, _, _ int64, err error) {
				failed.Add(1)
				if !errors.Is(err, qcow.ErrNoSpace) {
					t.Errorf("failure: %v", err)
				}
			},
		}), map[bool][]string{true: {alloc}}[style != nbdtest.Simple]...)
		mem.Limit(4 << 20)
		want := make([]byte, size)
		refused := 0
		write := func(flags uint16) {
			for off := 0; off+piece <= size; off += 2 * piece {
				p := bytes.Repeat([]byte{byte(off/piece + 1)}, piece)
				r := nbdtest.Request{Command: nbdtest.CmdWrite, Flags: flags, Offset: uint64(off), Length: piece, Payload: p}
				switch reply := client.Exchange(r); {
				case reply.Err == nil:
					copy(want[off:], p)
				case errors.Is(reply.Err, syscall.ENOSPC):
					refused++
				default:
					t.Fatalf("write at %d: %v", off, reply.Err)
				}
			}
		}
		write(0)
		write(nbdtest.FlagFUA)
		if refused == 0 || refused == 2*(size/piece/2) || int(failed.Load()) != refused {
			t.Fatalf("%d writes were refused, and %d failures told of", refused, failed.Load())
		}
		zeroes := nbdtest.Request{Command: nbdtest.CmdWriteZeroes, Flags: nbdtest.FlagNoHole, Offset: size / 2, Length: size / 2}
		if reply := client.Exchange(zeroes); reply.Err != nil && !errors.Is(reply.Err, syscall.ENOSPC) {
			t.Errorf("zeroes: %v", reply.Err)
		}
		// Whatever became of these, all that is not zero anyway is written once more.
		if reply := client.Exchange(nbdtest.Request{Command: nbdtest.CmdFlush}); reply.Err != nil {
			t.Errorf("flush on a full disk: %v", reply.Err)
		}
		mem.Limit(0)
		refused = 0
		write(0)
		if refused != 0 {
			t.Errorf("%d writes were refused where there was room again", refused)
		}
		for off := 0; off < size; off += 1 << 20 {
			if got, err := client.ReadBytes(uint64(off), 1<<20); err != nil || !bytes.Equal(got, want[off:][:1<<20]) {
				t.Errorf("read at %d: %v, or other data", off, err)
			}
		}
		client.Disconnect()
	})
}

// TestFaultsBelow lets the file under an image fail, once and for ever: the client is told, and is served on.
func TestFaultsBelow(t *testing.T) {
	for name, fault := range map[string]storage.Fault{
		"once":     {At: 3, Err: syscall.EIO},
		"for ever": {At: 3, Err: syscall.EIO, Forever: true},
	} {
		t.Run(name, func(t *testing.T) {
			forEachStyle(t, func(t *testing.T, style nbdtest.Style) {
				mem := storage.NewMemory()
				if err := qcow.Create(mem, qcow.CreateOptions{Size: mib}); err != nil {
					t.Fatal(err)
				}
				img, err := qcow.Open(storage.NewFaults(mem, &fault), qcow.Options{})
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { _ = img.Close() }) // may fail, too
				client := connectRoughly(t, style, nbdexport.NewImageBackend(img, nbdexport.ImageOptions{}))
				told := 0
				for off := uint64(0); off < mib; off += 64 << 10 {
					if err := client.WriteBytes(off, make([]byte, 4096)); errors.Is(err, syscall.EIO) {
						told++
					} else if err != nil {
						t.Errorf("write at %d: %v", off, err)
					}
				}
				if told == 0 {
					t.Error("the client was told of no error")
				}
				if _, err := client.ReadBytes(0, 4096); err != nil {
					t.Errorf("read afterwards: %v", err)
				}
				client.Disconnect()
			})
		})
	}
}
