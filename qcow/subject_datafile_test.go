package qcow_test

import (
	"bytes"
	"errors"
	"os"
	"testing"
	"time"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// external makes an image with its data file, "data", in memory.
func external(t testing.TB, o qcow.CreateOptions) (f, data *storage.Memory) {
	t.Helper()
	f, data = storage.NewMemory(), storage.NewMemory()
	o.DataFile, o.DataFileName = data, "data"
	do(t, qcow.Create(f, o))
	return f, data
}

// The data file is the one that the gate opens for the name in the image; an image without one asks for none.
func TestDataFileIsAskedFor(t *testing.T) {
	f, data := external(t, qcow.CreateOptions{Size: 1 << 20})
	before := f.Bytes()
	for _, readOnly := range []bool{true, false} {
		asked := qcow.Reference{}
		_, err := qcow.Open(f, qcow.Options{ReadOnly: readOnly, Gate: func(r qcow.Reference) (qcow.Opened, error) {
			asked = r
			return qcow.Opened{}, os.ErrNotExist
		}})
		expectClass(t, "open without the data file", err, os.ErrNotExist)
		if want := (qcow.Reference{Role: qcow.DataFile, Name: "data", Format: "raw", ReadOnly: readOnly}); asked != want {
			t.Errorf("asked for %+v", asked)
		}
		_, err = qcow.Open(f, qcow.Options{ReadOnly: readOnly})
		expectClass(t, "open without a gate", err, qcow.ErrUnsupported)
	}
	if !bytes.Equal(f.Bytes(), before) {
		t.Error("the image has changed")
	}
	internal := create(t, qcow.CreateOptions{Size: 1 << 20})
	img := open(t, internal, qcow.Options{Gate: func(r qcow.Reference) (qcow.Opened, error) {
		t.Errorf("asked for %+v", r)
		return qcow.Opened{File: data, Format: "raw"}, nil
	}})
	writeAt(t, img, repeated(1, 512), 0)
	do(t, img.Close())
	if len(bytes.Trim(data.Bytes(), "\x00")) > 0 {
		t.Error("the data file of another image was written to")
	}
}

// Every cluster has its place in the data file, whatever it holds. What the format can't do with such an image is refused, and changes nothing. Zeroes of a
// raw data file are in that file; of another they may be in the tables alone, and the old data below them.
func TestDataFileLayout(t *testing.T) {
	const cluster, size = 64 << 10, 1 << 20
	for _, raw := range []bool{true, false} {
		f, data := external(t, qcow.CreateOptions{Size: size, DataFileRaw: raw})
		gate := files{"data": data}.gate
		img := open(t, f, qcow.Options{Gate: gate})
		writeAt(t, img, repeated(1, 4*cluster), 0)
		writeAt(t, img, repeated(2, 100), 10*cluster+5)
		do(t, img.WriteZeroes(cluster, cluster, false))
		do(t, img.WriteZeroes(2*cluster, cluster, true))
		want := append(repeated(1, cluster), make([]byte, size-cluster)...)
		copy(want[3*cluster:], repeated(1, cluster))
		copy(want[10*cluster+5:], repeated(2, 100))
		expect(t, "disk", diskOf(t, img), want)

		expectClass(t, "compression", img.WriteCompressed(repeated(3, cluster), 0), qcow.ErrUnsupported)
		_, err := img.CreateSnapshot(t.Context(), "s", time.Unix(1, 0))
		expectClass(t, "snapshot", err, qcow.ErrUnsupported)
		expectClass(t, "apply", img.ApplySnapshot(t.Context(), "s"), qcow.ErrNotFound)
		for e, err := range img.Extents(0, size) {
			if err != nil || e.Kind == qcow.ExtentData && int64(e.Host) != e.Offset || e.Offset == 0 && e.Kind != qcow.ExtentData {
				t.Errorf("raw %t: %+v, %v", raw, e, err)
			}
		}
		do(t, img.Flush())
		if raw {
			expect(t, "raw data file", data.Bytes(), want)
		} else if got := data.Bytes(); !bytes.Equal(got[:cluster], want[:cluster]) || !bytes.Equal(got[10*cluster:11*cluster], want[10*cluster:11*cluster]) {
			t.Error("the data is not where the guest has it")
		}
		do(t, img.Discard(3*cluster, cluster))
		clear(want[3*cluster:][:cluster])
		do(t, img.Close())
		img = open(t, f, qcow.Options{Gate: gate, ReadOnly: true})
		expect(t, "disk after a discard", diskOf(t, img), want)
		if raw {
			expect(t, "raw data file after a discard", data.Bytes(), want)
		}
		at(t, f).expectSound()
		if n := len(f.Bytes()); n > 6*cluster {
			t.Errorf("raw %t: the image itself has %d bytes", raw, n)
		}
	}
}

// A flush includes the data file: when that can't be made durable nothing is.
func TestDataFileIsFlushed(t *testing.T) {
	f, data := external(t, qcow.CreateOptions{Size: 1 << 20})
	h, synced := &hooked{File: data}, 0
	img := open(t, f, qcow.Options{Gate: files{"data": h}.gate})
	h.set(func() { h.beforeSync = func() error { synced++; return nil } })
	writeAt(t, img, repeated(1, 512), 0)
	before := synced
	do(t, img.Flush())
	if synced == before {
		t.Error("the data file was not flushed")
	}
	h.set(func() { h.beforeSync = func() error { return errInjected } })
	writeAt(t, img, repeated(2, 512), 0)
	expectClass(t, "flush", img.Flush(), errInjected)
	_, err := img.WriteSync(repeated(3, 512), 0)
	if err == nil {
		t.Error("a durable write has succeeded")
	}
	if err := img.Close(); err == nil {
		t.Error("close has succeeded")
	}
}

// A write that fails in the data file fails for the guest, and costs neither clusters nor what the guest had there; repeated it succeeds.
func TestDataFileWriteFailsOnce(t *testing.T) {
	const cluster = 64 << 10
	f, data := external(t, qcow.CreateOptions{Size: 1 << 20})
	h := &hooked{File: data}
	img := open(t, f, qcow.Options{Gate: files{"data": h}.gate})
	writeAt(t, img, repeated(1, cluster), 0)
	do(t, img.WriteZeroes(cluster, cluster, false))
	do(t, img.Flush())
	want := append(repeated(1, cluster), make([]byte, 15*cluster)...)
	for _, off := range []int64{100, cluster + 100, 5*cluster + 100} { // data, zeroes, nothing
		h.set(func() {
			h.beforeWrite = func([]byte, int64) error {
				h.set(func() { h.beforeWrite = nil })
				return errInjected
			}
		})
		_, err := img.WriteAt(repeated(7, 300), off)
		if !errors.Is(err, errInjected) {
			t.Fatalf("write at %d: %v", off, err)
		}
		expect(t, "disk", diskOf(t, img), want)
		writeAt(t, img, repeated(7, 300), off)
		copy(want[off:], repeated(7, 300))
		expect(t, "disk", diskOf(t, img), want)
	}
	do(t, img.Close())
	at(t, f).expectSound()
	img = open(t, f, qcow.Options{Gate: files{"data": data}.gate})
	expect(t, "disk", diskOf(t, img), want)
	if n := len(entriesOf(t, f)); n != 3 {
		t.Errorf("%d clusters", n)
	}
	if r := at(t, f).report(); r.AllocatedClusters != 3 || at(t, f).h.Incompatible != format.IncompatDataFile {
		t.Error(r)
	}
}
