package nbdexport_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/qcow-csi/qcow-csi/nbdexport"
	"github.com/qcow-csi/qcow-csi/nbdexport/nbdtest"
)

// splicing is a backend that moves its data into pipes, so many bytes at a time, until so many are moved of a request.
type splicing struct {
	*nbdtest.Memory
	piece, stop int
	err         error // at the stop
}

func (s *splicing) Splice(pipe int, off int64, n int) (int, error) {
	if n = min(n, s.piece); int(off)%mib >= s.stop {
		return 0, s.err
	}
	p := make([]byte, n)
	if _, err := s.ReadAt(p, off); err != nil && !errors.Is(err, io.EOF) {
		return 0, err
	}
	return unix.Write(pipe, p)
}

// TestSplice reads by way of pipes: whole, in pieces, and where a backend can't go on, which is no concern of the client.
func TestSplice(t *testing.T) {
	b := newMemory(2 * mib)
	contents := make([]byte, 2*mib)
	for i := range contents {
		contents[i] = byte(i>>9 | i | 1)
	}
	if _, err := b.WriteAt(contents, 0); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]splicing{
		"whole":               {b, mib, mib, nil},
		"pieces":              {b, 102_400, mib, nil},
		"stops":               {b, 102_400, 300_000, nil},
		"fails":               {b, 102_400, 300_000, syscall.EIO},
		"stops at once":       {b, mib, 0, nil},
		"fails at the second": {b, 4096, 4096, syscall.EIO},
	} {
		t.Run(name, func(t *testing.T) {
			forEachStyle(t, func(t *testing.T, style nbdtest.Style) {
				client := connectIn(t, style, &test)
				for _, r := range []struct{ off, n int }{
					{0, mib}, {0, 512}, {512, 32 << 10}, {1, 64<<10 + 1}, {4096, 500_000}, {mib, mib}, {mib - 1, 100_000}, {0, 2 * mib},
				} {
					if got, err := client.ReadBytes(uint64(r.off), r.n); err != nil || !bytes.Equal(got, contents[r.off:][:r.n]) {
						t.Errorf("%d bytes at %d: %v, or other data", r.n, r.off, err)
					}
				}
				client.Disconnect()
			})
		})
	}
}

// TestSplicedReplyIsCut has clients that leave in the middle of a reply. What they have not taken nobody else gets.
func TestSplicedReplyIsCut(t *testing.T) {
	b := newMemory(2 * mib)
	if _, err := b.WriteAt(bytes.Repeat([]byte("secret"), mib/6), mib); err != nil {
		t.Fatal(err)
	}
	public := bytes.Repeat([]byte("public!!"), mib/8)
	if _, err := b.WriteAt(public, 0); err != nil {
		t.Fatal(err)
	}
	addr := nbdtest.Serve(t, "unix", offer(&splicing{b, 64 << 10, mib, nil}))
	for i := range 60 {
		rude := nbdtest.Dial(t, addr)
		rude.GoIn(nbdtest.Styles[i%3], "")
		read := nbdtest.Request{Command: nbdtest.CmdRead, Offset: mib, Length: mib - 8}
		rude.Post(read)
		for range 4 { // more than the socket has room for
			read.Cookie++
			rude.Post(read)
		}
		rude.Receive(i * 1000)
		rude.Close()
		client := nbdtest.Dial(t, addr)
		client.GoIn(nbdtest.Styles[i%3], "")
		if got, err := client.ReadBytes(0, mib); err != nil || !bytes.Equal(got, public) {
			t.Fatal(errors.Join(err, fmt.Errorf("round %d: other data", i)))
		}
		client.Disconnect()
	}
}

// TestSplicedImage reads an image, whose data is moved from the page cache, at every kind of place.
func TestSplicedImage(t *testing.T) {
	const size = 4 * mib
	img := openImage(t, createImage(t, size), false)
	contents := make([]byte, size)
	for i := range contents {
		contents[i] = byte(i>>9 | i | 1)
	}
	if _, err := img.WriteAt(contents, 0); err != nil {
		t.Fatal(err)
	}
	forEachStyle(t, func(t *testing.T, style nbdtest.Style) {
		client := connectIn(t, style, nbdexport.NewImageBackend(img, nbdexport.ImageOptions{}))
		for _, off := range []int{0, 1, 511, 512, 4095, 4096, 65535, 65536, 65537, mib + 1} {
			for _, n := range []int{32<<10 - 1, 32 << 10, 64 << 10, 64<<10 + 1, mib - 4096, mib - 1, mib, mib + 1} {
				if got, err := client.ReadBytes(uint64(off), n); err != nil || !bytes.Equal(got, contents[off:][:n]) {
					t.Errorf("%d bytes at %d: %v, or other data", n, off, err)
				}
			}
		}
		client.Disconnect()
	})
}
