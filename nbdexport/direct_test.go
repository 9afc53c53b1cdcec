package nbdexport_test

import (
	"bytes"
	"testing"
	"unsafe"

	"github.com/qcow-csi/qcow-csi/nbdexport"
	"github.com/qcow-csi/qcow-csi/nbdexport/nbdtest"
)

// direct is a backend that wants buffers aligned to pages.
type direct struct {
	nbdexport.Backend
	t *testing.T
}

func (d direct) Info() nbdexport.Info {
	i := d.Backend.Info()
	i.Direct = true
	return i
}

func (d direct) check(p []byte) {
	if at := uintptr(unsafe.Pointer(unsafe.SliceData(p))); at%4096 != 0 {
		d.t.Errorf("a buffer of %d bytes at %#x", len(p), at)
	}
}

func (d direct) ReadAt(p []byte, off int64) (int, error) {
	d.check(p)
	return d.Backend.ReadAt(p, off)
}

func (d direct) ReadExtent(p []byte, off int64) (int, bool, error) {
	d.check(p)
	return d.Backend.ReadExtent(p, off)
}

func (d direct) WriteAt(p []byte, off int64) (int, error) {
	d.check(p)
	return d.Backend.WriteAt(p, off)
}

func (d direct) WriteSync(p []byte, off int64) (int, error) {
	d.check(p)
	return d.Backend.WriteSync(p, off)
}

// TestDirectBackendGetsAlignedBuffers has requests of all sizes, so that some would be carried out in the buffers of the connection.
func TestDirectBackendGetsAlignedBuffers(t *testing.T) {
	forEachStyle(t, func(t *testing.T, style nbdtest.Style) {
		client := connectIn(t, style, direct{newMemory(4 * mib), t})
		for i, n := range []int{4096, 8192, 32 << 10, 64 << 10, 128 << 10, mib} {
			for _, flags := range []uint16{0, nbdtest.FlagFUA} {
				p := bytes.Repeat([]byte{byte(i + 1)}, n)
				write := nbdtest.Request{Command: nbdtest.CmdWrite, Flags: flags, Offset: 4096, Length: uint64(n), Payload: p}
				if _, err := client.Do(write); err != nil {
					t.Fatal(err)
				}
				if got, err := client.ReadBytes(4096, n); err != nil || !bytes.Equal(got, p) {
					t.Fatalf("read of %d bytes: %v, or other bytes", n, err)
				}
			}
		}
		client.Disconnect()
	})
}
