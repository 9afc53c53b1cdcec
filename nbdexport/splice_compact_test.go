package nbdexport_test

import (
	"bytes"
	"errors"
	"testing"
	"time"

	"github.com/qcow-csi/qcow-csi/nbdexport"
	"github.com/qcow-csi/qcow-csi/nbdexport/nbdtest"
	"github.com/qcow-csi/qcow-csi/qcow"
)

// TestCompactWaitsForReaders compacts an image whose clusters are in a reply that the client has not taken yet: they must not be given to other
// data before.
func TestCompactWaitsForReaders(t *testing.T) {
	const length = 256 << 10
	img := openImage(t, createImage(t, 4*mib), false)
	client := connect(t, nbdexport.NewImageBackend(img, nbdexport.ImageOptions{}))
	data := bytes.Repeat([]byte("0123456789abcdef"), length/16)
	for _, off := range []uint64{0, mib} {
		if err := client.WriteBytes(off, data); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := client.Do(nbdtest.Request{Command: nbdtest.CmdTrim, Length: length}); err != nil {
		t.Fatal(err)
	}
	client.Send(nbdtest.Request{Command: nbdtest.CmdRead, Cookie: 7, Offset: mib, Length: length}.Encode())
	header := client.Receive(16) // the data follows, and waits

	compacted := make(chan error, 1)
	go func() {
		_, err := img.Compact(t.Context(), nil)
		compacted <- err
	}()
	select {
	case err := <-compacted:
		t.Errorf("Compact did not wait for the client: %v", err)
	case <-time.After(50 * time.Millisecond): // a chance to be wrong, no proof of being right
	}
	if got := client.Receive(length); header[15] != 7 || !bytes.Equal(got, data) {
		t.Error("the reply is another one")
	}
	if err := <-compacted; err != nil {
		t.Error(err)
	}
	if got, err := client.ReadBytes(mib, length); err != nil || !bytes.Equal(got, data) {
		t.Errorf("after compaction: %v, or other data", err)
	}

	client.Send(nbdtest.Request{Command: nbdtest.CmdRead, Offset: mib, Length: length}.Encode())
	client.Receive(16)
	if _, err := img.Compact(t.Context(), nil); !errors.Is(err, qcow.ErrBusy) {
		t.Errorf("with a client that takes nothing: %v, want ErrBusy", err)
	}
	client.Receive(length)
	client.Disconnect()
}
