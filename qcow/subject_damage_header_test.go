package qcow_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/check"
	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/repair"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// What a header says beyond what is known here stays in it, whatever is changed: extensions in both versions, compatible features in version 3.
func TestUnknownPartsOfTheHeaderStay(t *testing.T) {
	const text = "something that a later version knows"
	for _, version := range []int{2, 3} {
		m := newHandmade(t, qcow.CreateOptions{Size: 1 << 20, Version: version}, nil)
		m.insertExtension(0x12345678, uint64(len(text)), text)
		if version == 3 {
			m.patchHeader(80, 8, 1<<42)
		}
		f := m.file()
		// Names are shorter, longer, and gone; the image gets larger, smaller, and a snapshot.
		for i, do := range []func() error{
			func() error { return qcow.RebaseUnsafe(f, "base", "raw") },
			func() error { return qcow.RebaseUnsafe(f, strings.Repeat("b", 1000), "qcow2") },
			func() error { return qcow.RebaseUnsafe(f, "", "") },
			func() error {
				img := open(t, f, qcow.Options{})
				_, err := img.CreateSnapshot(t.Context(), "s", time.Unix(1, 0))
				return errors.Join(err, img.Resize(t.Context(), 2<<40), img.Resize(t.Context(), 512), img.Close())
			},
			func() error { return repairMarked(t, f) },
			func() error { return qcow.Amend(t.Context(), f, qcow.AmendOptions{Version: 3, RefcountBits: 64}) },
		} {
			if err := do(); err != nil {
				t.Fatal(err)
			}
			h := at(t, f).h
			if e := h.Extension(0x12345678); e == nil || string(e.Data) != text || version == 3 && h.Compatible != 1<<42 {
				t.Errorf("version %d, after change %d: %+v", version, i, h)
			}
			if h.BackingFile == "" {
				expectClean(t, f.Bytes())
			}
		}
	}
}

// repairMarked marks the image in f corrupt, where it can be, and gives it an autoclear feature that is not known, and repairs it.
func repairMarked(t *testing.T, f *storage.Memory) error {
	m := at(t, f)
	if m.h.Version == 2 {
		return nil
	}
	for off, bits := range map[int64]uint64{format.IncompatibleOffset: format.IncompatCorrupt, format.AutoclearOffset: 1 << 50} {
		if _, err := f.WriteAt(binary.BigEndian.AppendUint64(nil, bits), off); err != nil {
			return err
		}
	}
	_, err := repair.Run(t.Context(), f, repair.Options{Mode: repair.All})
	if h := at(t, f).h; h.Incompatible != 0 || h.Autoclear != 0 {
		t.Errorf("features %#x, %#x after the repair", h.Incompatible, h.Autoclear)
	}
	return err
}

// An entry may point to the end of the world. Nothing is allocated for what lies between.
func TestClusterFarBehindTheFile(t *testing.T) {
	m := newHandmade(t, qcow.CreateOptions{Size: 1 << 20, ClusterSize: 512}, func(img *qcow.Image) { writeAt(t, img, repeated(1, 8192), 0) })
	const far = 32 << 50
	m.put(m.l2Entry(3), uint64(format.NewL2Entry(far, true)))
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	r := m.report()
	_, err := repair.Run(t.Context(), m.file(), repair.Options{Mode: repair.All, DryRun: true})
	do(t, err)
	runtime.ReadMemStats(&after)
	if took := after.TotalAlloc - before.TotalAlloc; took > 16<<20 {
		t.Errorf("checking and repairing %d bytes took %d bytes of memory", len(m.b), took)
	}
	// One cluster is named from where none can be, and the one that was is lost.
	if r.Corruptions != 1 || r.Leaks != 1 || r.Findings[0].Kind != check.OutsideFile || !strings.Contains(r.Findings[0].Detail, fmt.Sprintf("%#x", uint64(far))) {
		t.Error(r)
	}
	f, report := m.repaired(repair.All)
	if report.Count(repair.ClusterLost) != 1 || len(f.Bytes()) > len(m.b)+8192 {
		t.Errorf("%v; %d bytes became %d", report, len(m.b), len(f.Bytes()))
	}
}

// A file that loses its end while it is open costs what was there, and nothing else.
func TestTruncatedWhileOpen(t *testing.T) {
	m := newHandmade(t, qcow.CreateOptions{Size: 256 << 10, ClusterSize: 4096}, func(img *qcow.Image) {
		for c := range int64(16) { // ascending in the file
			writeAt(t, img, repeated(byte(1+c), 4096), c*4096)
		}
	})
	for _, readOnly := range []bool{true, false} {
		f := m.file()
		img := open(t, f, qcow.Options{ReadOnly: readOnly})
		do(t, f.Truncate(int64(m.host(10))))
		got := make([]byte, 16*4096)
		n, err := img.ReadAt(got, 0)
		if err != nil && !errors.Is(err, qcow.ErrCorrupt) && !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("read: %v", err)
		}
		for i := range n {
			if v := byte(1 + i/4096); got[i] != v && (i < 10*4096 || got[i] != 0) {
				t.Fatalf("byte %d is %#x", i, got[i])
			}
		}
		if n < 10*4096 {
			t.Errorf("%d bytes were read: %v", n, err)
		}
		for e, err := range img.Extents(0, img.Size()) {
			if err != nil {
				expectClass(t, "extents", err, qcow.ErrCorrupt)
			} else if e.Offset < 16*4096 && e.Kind != qcow.ExtentData {
				t.Errorf("%+v", e)
			}
		}
		if !readOnly {
			writeAt(t, img, repeated(99, 4096), 2*4096)
			writeAt(t, img, repeated(98, 4096), 12*4096) // which is there again then
			expectAt(t, img, repeated(98, 4096), 12*4096)
		}
		do(t, img.Close())
		if r := at(t, f).report(); readOnly != (r.Corruptions == 6) {
			t.Errorf("read-only %t: %v", readOnly, r)
		}
		mended, _ := at(t, f).repaired(repair.All)
		img = open(t, mended, qcow.Options{})
		expectAt(t, img, repeated(10, 4096), 9*4096)
		expectAt(t, img, make([]byte, 4096), 11*4096)
		do(t, img.Close())
	}
}

// Options of any value are taken for what comes closest, and the image works with them; those that contradict each other are refused before
// anything is done.
func TestOddOptions(t *testing.T) {
	f := create(t, qcow.CreateOptions{Size: 4 << 20, ClusterSize: 4096})
	for i, o := range []qcow.Options{
		{CacheBytes: 1},
		{CacheBytes: -1, ReserveBytes: -1, BitmapBytes: -1},
		{CacheBytes: 1<<63 - 1, ReserveBytes: 1<<63 - 1, BitmapBytes: 1<<63 - 1},
		{ReserveBytes: 1, DetectZeroes: true},
		{ReserveBytes: 4095, Passphrase: []byte("for nothing")},
		{Budget: qcow.NewCacheBudget(0)},
		{Budget: qcow.NewCacheBudget(-1), CacheBytes: 512},
	} {
		img := open(t, f, o)
		p := repeated(byte(1+i), 1<<20)
		writeAt(t, img, p, 700_000)
		expectAt(t, img, p, 700_000)
		do(t, img.WriteZeroes(1<<20, 100_000, i%2 == 0))
		do(t, img.Discard(700<<10, 40<<10))
		expectAt(t, img, make([]byte, 100_000), 1<<20)
		expectAt(t, img, make([]byte, 40<<10), 700<<10)
		expectAt(t, img, p[:1000], 700_000)
		do(t, img.Close())
		at(t, f).expectSound()
	}
	expectClean(t, f.Bytes())
	before := f.Bytes()
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	for _, o := range []qcow.Options{{Snapshot: "s"}, {WithoutBacking: true}, {ReadOnly: true, Snapshot: "s"}} {
		if img, err := qcow.Open(f, o); err == nil {
			t.Errorf("opened with %+v", o)
			do(t, img.Close())
		}
	}
	if img, err := qcow.OpenContext(ended, f, qcow.Options{}); err == nil {
		do(t, img.Close()) // nothing took long enough to end for
	}
	if !bytes.Equal(f.Bytes(), before) {
		t.Error("what was refused has changed the image")
	}
}
