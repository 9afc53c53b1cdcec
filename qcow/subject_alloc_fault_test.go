package qcow_test

import (
	"bytes"
	"errors"
	"fmt"
	"syscall"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/check"
	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// growthRun takes an image beyond its refcount table and its L1 table, on a file that fails at some point, and keeps what must be in it.
type growthRun struct {
	img   *qcow.Image
	fault storage.Fault
	want  []byte // of the disk when it is growthNew bytes long
	doubt []span // where a request failed: nobody knows what is there, but for whole sectors of before or after
	small bool   // the disk may not have grown
}

const (
	growthFull = 1980 << 10 // nearly all that a refcount table of one cluster leads to
	growthOld  = 3 << 20    // an L1 table of two clusters is for 4 MiB
	growthNew  = 5 << 20
)

// do does a step, once more if it fails, and says whether it is done.
func (r *growthRun) do(t *testing.T, step func() error) bool {
	t.Helper()
	err := step()
	if err != nil && !errors.Is(err, r.fault.Err) {
		t.Fatalf("the fault surfaced as %v", err)
	}
	if err == nil {
		return true
	}
	again := step()
	if again != nil && !errors.Is(again, r.fault.Err) {
		t.Fatalf("after %v, again: %v", err, again)
	}
	return again == nil
}

func (r *growthRun) write(t *testing.T, v byte, off, n int64) {
	t.Helper()
	p := repeated(v, n)
	if !r.do(t, func() error { _, err := r.img.WriteAt(p, off); return err }) {
		r.doubt = append(r.doubt, span{off, n})
		return
	}
	copy(r.want[off:], p)
}

func (r *growthRun) run(t *testing.T) {
	t.Helper()
	r.write(t, 2, growthFull, 100<<10)
	if r.do(t, func() error { return r.img.Resize(t.Context(), growthNew) }) {
		r.write(t, 3, growthNew-20<<10, 20<<10)
	} else {
		r.small = true
	}
	if r.do(t, func() error { return r.img.Discard(64<<10, 64<<10) }) {
		clear(r.want[64<<10 : 128<<10])
	} else {
		r.doubt = append(r.doubt, span{64 << 10, 64 << 10})
	}
	r.do(t, r.img.Flush)
	r.write(t, 4, 100<<10, 20<<10)
}

// verify reads all that the run may have touched, and something around it.
func (r *growthRun) verify(t *testing.T, img *qcow.Image) {
	t.Helper()
	size := img.Size()
	if size != growthNew && !(r.small && size == growthOld) {
		t.Fatalf("the disk has %d bytes", size)
	}
	for _, w := range []span{{0, 160 << 10}, {growthFull - 40<<10, 180 << 10}, {growthOld - 40<<10, 40 << 10}, {growthNew - 40<<10, 40 << 10}} {
		if w.off+w.n > size {
			continue
		}
		got, want := make([]byte, w.n), bytes.Clone(r.want[w.off:][:w.n])
		if _, err := img.ReadAt(got, w.off); err != nil {
			t.Fatal(err)
		}
		for _, s := range r.doubt {
			first, end := max(s.off, w.off)-w.off, min(s.off+s.n, w.off+w.n)-w.off
			if first < end {
				copy(want[first:end], got[first:])
			}
		}
		expect(t, fmt.Sprintf("from %d on", w.off), got, want)
	}
}

// Each change that the growth of the tables makes fails once or from then on. What was acknowledged is there, what was not can be repeated, and
// no cluster has two owners; where the file works again and the image was closed, none has lost its own.
func TestFaultTableGrowth(t *testing.T) {
	f := create(t, qcow.CreateOptions{Size: growthOld, ClusterSize: 512, RefcountBits: 64})
	img := open(t, f, qcow.Options{ReserveBytes: 1})
	writeAt(t, img, repeated(1, growthFull), 0)
	closeClean(t, img, f)
	image, content := f.Bytes(), append(repeated(1, growthFull), make([]byte, growthNew-growthFull)...)
	if len(image) > 2<<20 {
		t.Fatalf("the refcount table has grown already, the file has %d bytes", len(image))
	}
	noSpace := fmt.Errorf("%w: %w", storage.ErrNoSpace, syscall.ENOSPC)
	for name, fault := range map[string]storage.Fault{
		"EIO once":         {Err: syscall.EIO},
		"EIO for ever":     {Err: syscall.EIO, Forever: true},
		"ENOSPC once":      {Err: noSpace},
		"ENOSPC for ever":  {Err: noSpace, Forever: true},
		"short write once": {Err: noSpace, Short: true},
	} {
		t.Run(name, func(t *testing.T) {
			total := 0
			for at := 0; ; at += stride {
				fault.At = at
				n := growthFault(t, image, bytes.Clone(content), fault)
				if n == 0 {
					break
				}
				total += n
			}
			t.Logf("%d faults", total)
		})
	}
}

// growthFault does one run on an image with that content and returns how many operations failed.
func growthFault(t *testing.T, image, content []byte, fault storage.Fault) int {
	t.Helper()
	mem := storage.NewMemoryFrom(bytes.Clone(image))
	faults := storage.NewFaults(mem, &fault)
	r := &growthRun{img: open(t, faults, qcow.FilledByTakers(qcow.Options{ReserveBytes: 64 * 512})), fault: fault, want: content}
	r.run(t)
	r.verify(t, r.img)
	closeErr := r.img.Close()
	_, injected := faults.Count()
	report, err := check.Check(t.Context(), mem, check.Options{})
	if err != nil || report.Corruptions > 0 || closeErr == nil && report.Leaks > 0 {
		t.Fatalf("fault at %d, %v: %v %v", fault.At, closeErr, err, report)
	}
	r.img, r.doubt, r.fault = open(t, mem, qcow.Options{}), nil, storage.Fault{Err: syscall.EIO}
	r.small = false
	r.run(t) // and so nothing is in doubt any more
	r.verify(t, r.img)
	if err := r.img.Close(); err != nil {
		t.Fatal(err)
	}
	return injected
}

// failingOnce fails the first write of data that begins with v.
func failingOnce(f storage.File, v byte) *hooked {
	h := &hooked{File: f}
	h.beforeWrite = func(p []byte, _ int64) error {
		if p[0] != v {
			return nil
		}
		h.set(func() { h.beforeWrite = nil })
		return errInjected
	}
	return h
}

// A write of data that fails and is done again leaves no cluster behind, and takes none that somebody has.
func TestDataWriteFailsOnce(t *testing.T) {
	const cluster = 4096
	f := create(t, qcow.CreateOptions{Size: 1 << 20, ClusterSize: cluster})
	img := open(t, failingOnce(f, 7), qcow.Options{ReserveBytes: 1})
	writeAt(t, img, repeated(1, cluster), 0)
	_, err := img.WriteAt(repeated(7, 2*cluster), cluster)
	expectClass(t, "write", err, errInjected)
	expectAt(t, img, append(repeated(1, cluster), make([]byte, 3*cluster)...), 0)
	writeAt(t, img, repeated(8, cluster), 4*cluster)
	writeAt(t, img, repeated(7, 2*cluster), cluster)
	expectAt(t, img, append(repeated(1, cluster), repeated(7, 2*cluster)...), 0)
	expectAt(t, img, repeated(8, cluster), 4*cluster)
	closeClean(t, img, f)
	if n := len(f.Bytes()); n != 9*cluster { // the header, four tables, four clusters of data
		t.Errorf("the file has %d bytes", n)
	}
}

// A write into zeroes that keep their cluster leaves them with it when it fails.
func TestWriteIntoAllocatedZeroesFails(t *testing.T) {
	const cluster = 64 << 10
	m := zeroAllocated(t, 1<<20, 2, 4)
	host := m.host(2)
	f := m.file()
	img := open(t, failingOnce(f, 7), qcow.Options{ReserveBytes: 1})
	_, err := img.WriteAt(repeated(7, cluster), 2*cluster)
	expectClass(t, "write", err, errInjected)
	expectAt(t, img, make([]byte, 2*cluster), 2*cluster)
	closeClean(t, img, f)
	after := &handmade{t: t, b: f.Bytes(), h: m.h}
	if e := format.L2Entry(after.entry(after.l2Entry(2))); e.Kind() != format.ZeroAllocated || e.Offset() != host {
		t.Errorf("the entry is %#x, the cluster was at %#x", uint64(e), uint64(host))
	}
}

// A new L2 table that could not be linked is nobody's: the next one to need a table gets one of its own.
func TestTableIsNotHandedOutTwice(t *testing.T) {
	const table = 512 * 64 // bytes that an L2 table maps
	noSpace := fmt.Errorf("%w: %w", storage.ErrNoSpace, syscall.ENOSPC)
	for at, failed := 0, 1; failed > 0; at++ { // the write of the file with this number
		mem := create(t, qcow.CreateOptions{Size: 8 * table, ClusterSize: 512})
		f, writes := &hooked{File: mem}, 0
		f.beforeWrite = func([]byte, int64) error {
			if writes++; writes-1 == at {
				return noSpace
			}
			return nil
		}
		img := open(t, f, qcow.Options{ReserveBytes: 1})
		failed = 0
		for i := range int64(4) {
			for { // the guest does not give up
				_, err := img.WriteAt(repeated(byte(i+1), 1024), i*table)
				if err == nil {
					break
				}
				expectClass(t, "write", err, noSpace)
				if failed++; failed > 1 {
					t.Fatalf("write %d: one fault fails twice", at)
				}
			}
		}
		for i := range int64(4) {
			expectAt(t, img, append(repeated(byte(i+1), 1024), make([]byte, 512)...), i*table)
		}
		f.set(func() { f.beforeWrite = nil })
		if err := img.Close(); err != nil {
			t.Fatal(err)
		}
		(&chain{t: t, files: files{"image": mem}}).expectClean("image")
	}
}
