package qcow_test

import (
	"errors"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// A sink is a file that forgets what is written to it, but for where that was and its first bytes.
type sink struct {
	size   int64
	writes []span
	head   []byte
}

func (s *sink) ReadAt(p []byte, _ int64) (int, error) { clear(p); return len(p), nil }

func (s *sink) WriteAt(p []byte, off int64) (int, error) {
	s.writes = append(s.writes, span{off, int64(len(p))})
	if off < int64(len(s.head)) {
		copy(s.head[off:], p)
	}
	return len(p), nil
}

func (s *sink) WriteSync(p []byte, off int64) (int, error)     { return s.WriteAt(p, off) }
func (s *sink) Size() (int64, error)                           { return s.size, nil }
func (s *sink) Truncate(size int64) error                      { s.size = size; return nil }
func (s *sink) Allocate(int64, int64) error                    { return nil }
func (s *sink) PunchHole(int64, int64) error                   { return nil }
func (s *sink) Splice(int, int64, int) (int, error)            { return 0, nil }
func (s *sink) NextData(off int64) (start, end int64, _ error) { return off, s.size, nil }
func (s *sink) Sync() error                                    { return nil }
func (s *sink) Close() error                                   { return nil }

// One write that with what is copied around it has more bytes than a signed number of 32 bits can say.
func TestWriteOfTwoGiB(t *testing.T) {
	const cluster, size, off, n = 2 << 20, 4 << 30, 768, 1<<31 - 512
	data := &sink{head: make([]byte, off+1)}
	f := files{"data": data, "base": storage.NewMemoryFrom(repeated(5, 1<<20))}
	top := create(t, qcow.CreateOptions{
		Size: size, ClusterSize: cluster, DataFile: data, DataFileName: "data", BackingFile: "base", BackingFormat: "raw",
	})
	gate := func(r qcow.Reference) (qcow.Opened, error) {
		if r.Role == qcow.DataFile {
			r.Format = "raw"
		}
		return f.gate(r)
	}
	img := open(t, top, qcow.Options{Gate: gate})
	p, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON|unix.MAP_NORESERVE)
	if err != nil {
		t.Fatal(err)
	}
	p[0] = 7 // nobody looks at the rest, which takes no memory so
	if k, err := img.WriteAt(p, off); err != nil || k != n {
		t.Fatalf("%d bytes, %v", k, err)
	}
	if i := firstDifference(data.head, append(repeated(5, off), 7)); i >= 0 {
		t.Errorf("byte %d of the data file is %#x", i, data.head[i])
	}
	end := int64(0)
	for _, w := range data.writes { // one behind the other
		if w.off != end {
			t.Errorf("%+v after %d bytes", w, end)
		}
		end = w.off + w.n
	}
	if end != (off+n+cluster-1)/cluster*cluster {
		t.Errorf("the writes end at %d", end)
	}
	last := int64(0)
	for e, err := range img.Extents(0, size) {
		if err != nil {
			t.Fatal(err)
		}
		if e.Kind == qcow.ExtentData && e.Depth == 0 {
			last = e.Offset + e.Length
		}
	}
	if last != end {
		t.Errorf("the clusters end at %d, the writes at %d", last, end)
	}
	if err := errors.Join(img.Close(), unix.Munmap(p)); err != nil {
		t.Fatal(err)
	}
	(&chain{t: t, files: files{"top": top}}).expectClean("top")
}
