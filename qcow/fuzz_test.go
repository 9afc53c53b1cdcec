package qcow_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/check"
	"github.com/qcow-csi/qcow-csi/qcow/codec"
	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/repair"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// fuzzShapes are the images that the fuzzer damages. Those with refcounts of 16 bits have a snapshot and compressed clusters too.
var fuzzShapes = []qcow.CreateOptions{
	{Size: 64 << 10, ClusterSize: 512, RefcountBits: 16},
	{Size: 40<<10 + 512, ClusterSize: 512, RefcountBits: 64},
	{Size: 100 << 10, ClusterSize: 1024, RefcountBits: 1},
	{Size: 256 << 10, ClusterSize: 4096, RefcountBits: 8},
	{Size: 1 << 20, ClusterSize: 65536, RefcountBits: 16},
	{Size: 100 << 10, ClusterSize: 1024, RefcountBits: 16, Version: 2},
	{Size: 256 << 10, ClusterSize: 16 << 10, RefcountBits: 16, ExtendedL2: true},
	{Size: 128 << 10, ClusterSize: 2048, RefcountBits: 16, Compression: codec.Zstd},
}

const (
	fuzzFileLimit = 4 << 20
	fuzzSteps     = 64
	fuzzWindow    = 256 << 10 // bytes of the disk that are compared with the model
)

// fuzzBases are made once: the fuzzer runs thousands of inputs a second.
func fuzzBases(f *testing.F) []*handmade {
	bases := make([]*handmade, len(fuzzShapes))
	for i, o := range fuzzShapes {
		bases[i] = newHandmade(f, o, func(img *qcow.Image) {
			cluster := int64(o.ClusterSize)
			writeAt(f, img, repeated(1, 5*cluster), cluster)
			writeAt(f, img, repeated(2, cluster), o.Size-cluster)
			if err := img.Discard(2*cluster, cluster); err != nil {
				f.Fatal(err)
			}
			if o.RefcountBits != 16 {
				return
			}
			if err := img.WriteCompressed(repeated(3, 3*cluster), 8*cluster); err != nil {
				f.Fatal(err)
			}
			if _, err := img.CreateSnapshot(f.Context(), "base", time.Unix(1, 0)); err != nil {
				f.Fatal(err)
			}
			writeAt(f, img, repeated(4, 2*cluster), 4*cluster)
		})
	}
	return bases
}

// bytecode hands out the bytes of a fuzzer's input, zeroes when it has ended.
type bytecode []byte

func (c *bytecode) byte() byte {
	if len(*c) == 0 {
		return 0
	}
	b := (*c)[0]
	*c = (*c)[1:]
	return b
}

func (c *bytecode) uint(n int) (v uint64) {
	for range n {
		v = v<<8 | uint64(c.byte())
	}
	return v
}

// damage changes the image as code says: patches of a place, chosen by what it is, and a value, chosen to be near to valid.
func damage(m *handmade, code bytecode) []byte {
	b := m.file().Bytes()
	patch := func(off format.HostOffset, n int, v uint64) {
		var p [8]byte
		binary.BigEndian.PutUint64(p[:], v)
		if int(off)+n <= len(b) {
			copy(b[off:], p[8-n:])
		}
	}
	fields := []struct {
		off format.HostOffset
		n   int
	}{{8, 8}, {16, 4}, {20, 4}, {24, 8}, {32, 4}, {36, 4}, {40, 8}, {48, 8}, {56, 4}, {60, 4}, {64, 8}, {72, 8}, {80, 8}, {88, 8}, {96, 4}, {100, 4}, {104, 1}, {116, 4}}
	for len(code) > 0 {
		where, what := code.byte(), code.byte()
		off, n := format.HostOffset(0), 8
		switch where % 8 {
		case 0:
			f := fields[int(where/8)%len(fields)]
			off, n = f.off, f.n
		case 1:
			off = m.h.L1Offset + 8*format.HostOffset(where/8)
		case 2:
			off = m.l2Table(1) + 8*format.HostOffset(where/8)
		case 3:
			off = m.h.SnapshotsOffset + 8*format.HostOffset(where/8)
		case 4:
			off = m.h.RefcountTableOffset + 8*format.HostOffset(where/8)
		case 5:
			off, n = m.block()+format.HostOffset(where/8), 1
		case 6:
			off, n = format.HostOffset(code.uint(2)), 1
		case 7:
			b = b[:min(len(b), int(code.uint(3)))]
			continue
		}
		v := uint64(0)
		switch what % 8 {
		case 0:
			v = uint64(what / 8)
		case 1, 2, 3:
			v = uint64(what/8)<<m.h.ClusterBits | 1<<63
		case 4:
			v = uint64(what/8) << m.h.ClusterBits
		case 5:
			v = 1 << (code.byte() % 64)
		case 6:
			v = code.uint(8)
		case 7:
			v = ^uint64(what / 8)
		}
		patch(off, n, v)
	}
	return b
}

// program does what code says to an image, and to a model of the first bytes of its disk. When the image was sound, both must agree.
type program struct {
	t     *testing.T
	img   *qcow.Image
	sound bool
	model []byte
	kept  []keptSnapshot
}

// keptSnapshot is a snapshot that the program has taken, with the model of then.
type keptSnapshot struct {
	id    string
	model []byte
}

func (p *program) run(code bytecode) {
	for range fuzzSteps {
		if len(code) == 0 {
			return
		}
		op := code.byte()
		size := p.img.Size()
		off, n := int64(code.uint(3)), int64(code.uint(2))
		if op >= 128 {
			off = max(size-off%4096, 0) // near the end
		}
		if size == 0 {
			off, n = 0, 0
		} else {
			off %= size
			n = min(n, size-off)
		}
		p.step(op, off, n)
	}
}

func (p *program) step(op byte, off, n int64) {
	var err error
	switch op % 16 {
	case 0, 1:
		_, err = p.img.WriteAt(repeated(op, n), off)
		p.changed(err, off, n, op)
	case 2:
		err = p.img.WriteZeroes(off, n, true)
		p.changed(err, off, n, 0)
	case 3:
		err = p.img.WriteZeroes(off, n, false)
		p.changed(err, off, n, 0)
	case 4:
		err = p.img.Discard(off, n)
		cluster := int64(p.img.Info().ClusterSize)
		first, end := (off+cluster-1)/cluster*cluster, off+n
		if end != p.img.Size() {
			end = end / cluster * cluster
		}
		if first < end {
			p.changed(err, first, end-first, 0)
		}
	case 5:
		err = p.img.Flush()
	case 6:
		size := p.img.Size()
		if err = p.img.Resize(context.Background(), (size+off%(64<<10)+511)/512*512); err == nil && size < fuzzWindow {
			p.model = append(p.model, make([]byte, min(p.img.Size(), fuzzWindow)-size)...)
		}
	case 7:
		p.compare(off, n)
		for _, err := range p.img.Extents(off, n) {
			p.tolerate(err)
		}
	case 8:
		cluster := int64(p.img.Info().ClusterSize)
		off, n = off/cluster*cluster, n/cluster*cluster
		if n = min(n, (p.img.Size()-off)/cluster*cluster); n > 0 {
			err = p.img.WriteCompressed(repeated(op, n), off)
			p.changed(err, off, n, op)
		}
	case 9:
		_, err = p.img.WriteSync(repeated(op, n), off)
		p.changed(err, off, n, op)
	case 10:
		_, err = p.img.Compact(context.Background(), nil)
	case 11:
		if err = p.img.Resize(context.Background(), (p.img.Size()-off%(8<<10))/512*512); err == nil {
			p.model = p.model[:min(int64(len(p.model)), p.img.Size())]
		}
	case 12, 13, 14:
		err = p.snapshot(op%16, off)
	}
	p.tolerate(err)
}

// snapshot creates a snapshot, for which refcounts may be too narrow, or applies or deletes one of those that it has created.
func (p *program) snapshot(op byte, choice int64) error {
	ctx := context.Background()
	if op == 12 {
		s, err := p.img.CreateSnapshot(ctx, "kept", time.Unix(1, 0))
		if err == nil {
			p.kept = append(p.kept, keptSnapshot{s.ID, bytes.Clone(p.model)})
		}
		return tolerateOf(err, qcow.ErrInvalid)
	}
	if len(p.kept) == 0 {
		return tolerateOf(p.img.ApplySnapshot(ctx, "none"), qcow.ErrNotFound)
	}
	i := int(choice % int64(len(p.kept)))
	if op == 13 {
		err := p.img.ApplySnapshot(ctx, p.kept[i].id)
		if err == nil {
			p.model = bytes.Clone(p.kept[i].model)
			p.compare(0, int64(len(p.model)))
		}
		return err
	}
	err := p.img.DeleteSnapshot(ctx, p.kept[i].id)
	if err == nil {
		p.kept = slices.Delete(p.kept, i, i+1)
	}
	return err
}

// tolerateOf returns err unless it is other.
func tolerateOf(err, other error) error {
	if errors.Is(err, other) {
		return nil
	}
	return err
}

// tolerate accepts the errors that a sound image may give: a full disk.
func (p *program) tolerate(err error) {
	if err == nil || errors.Is(err, qcow.ErrNoSpace) {
		return
	}
	if p.sound {
		p.t.Fatalf("a sound image fails: %v", err)
	}
	if !errors.Is(err, qcow.ErrCorrupt) && !errors.Is(err, qcow.ErrUnsupported) && !errors.Is(err, qcow.ErrInvalid) {
		p.t.Fatalf("an error without a class: %v", err)
	}
}

// changed notes that n bytes at off have the value v. What a request that failed leaves there is unknown.
func (p *program) changed(err error, off, n int64, v byte) {
	if off >= int64(len(p.model)) {
		return
	}
	part := p.model[off:min(off+n, int64(len(p.model)))]
	if err != nil {
		p.sound = false
	}
	for i := range part {
		part[i] = v
	}
}

func (p *program) compare(off, n int64) {
	got := make([]byte, n)
	_, err := p.img.ReadAt(got, off)
	p.tolerate(err)
	if !p.sound || off >= int64(len(p.model)) {
		return
	}
	want := p.model[off:min(off+n, int64(len(p.model)))]
	if i := firstDifference(got[:len(want)], want); i >= 0 {
		p.t.Fatalf("byte %d of the disk is %#x, not %#x", off+int64(i), got[i], want[i])
	}
}

// sound reports whether nothing is wrong with an image but that refcounts are too high: what a crash may leave.
func sound(r *check.Report) bool { return r.Corruptions == 0 }

// FuzzOpen damages a valid image, uses what can still be opened, and repairs what is left. Nothing may panic, hang, or take memory without a bound, and the
// bytes of the header that say what the rest means never change. A sound image must also keep its
// data, and stay sound.
func FuzzOpen(f *testing.F) {
	bases := fuzzBases(f)
	use := []byte("\x00\x00\x02\x00\x10\x00\x04\x00\x00\x00\x40\x00\x05\x00\x00\x00\x00\x00\x01\x00\x00\x00\x80\x00\x06\x00\x40\x00\x00\x00\x80\x00\x00\x10\x08\x00\x02\x00\x00\x00\xff\xff\x07\x00\x00\x00\xff\xff")
	keep := []byte("\x0c\x00\x00\x00\x00\x00\x08\x00\x00\x00\x40\x00\x00\x00\x08\x00\x30\x00\x0c\x00\x00\x01\x00\x00\x05\x00\x00\x00\x00\x00\x0e\x00\x00\x00\x00\x00\x0d\x00\x00\x01\x00\x00" +
		"\x09\x00\x00\x00\x20\x00\x0e\x00\x00\x01\x00\x00\x0b\x00\x10\x00\x00\x00\x0a\x00\x00\x00\x00\x00\x07\x00\x00\x00\xff\xff")
	for i := range fuzzShapes {
		for _, patches := range []string{
			"", "\x03\x11", "\x0b\x11", "\x13\x05",
			"\x02\x09", "\x02\x11", "\x02\x19", "\x02\x21", "\x0a\x31", "\x0a\x32\x12\x31", // L2 entries that point at tables
			"\x01\x00", "\x01\x21", "\x04\x00", "\x04\x11", "\x05\x00", "\x05\x07", "\x0d\x00",
			"\x18\x06\x00\x00\x00\x00\x00\x10\x00\x00", "\x28\x00", "\x58\x04", "\x68\x04", // header
			"\x07\x00\x08\x00", "\x07\x00\x04\x01",
		} {
			f.Add(byte(i), []byte(patches), use)
			f.Add(byte(i), []byte(patches), keep)
		}
	}
	f.Fuzz(func(t *testing.T, shape byte, patches, code []byte) {
		m := bases[int(shape)%len(bases)]
		content := damage(m, patches)
		var head [24]byte
		copy(head[:], content)
		file := storage.NewMemoryFrom(content)
		file.Limit(fuzzFileLimit)
		report, checkErr := check.Check(t.Context(), file, check.Options{})

		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		img, err := qcow.Open(file, qcow.Options{ReserveBytes: int64(shape) << 10})
		runtime.ReadMemStats(&after)
		if took := after.TotalAlloc - before.TotalAlloc; took > 8<<20 {
			t.Fatalf("opening %d bytes allocated %d", len(content), took)
		}
		if err != nil {
			// No space: it is marked dirty, and the repair wants more of the file than there may be.
			if !errors.Is(err, qcow.ErrCorrupt) && !errors.Is(err, qcow.ErrUnsupported) && !errors.Is(err, qcow.ErrNoSpace) {
				t.Fatalf("an error without a class: %v", err)
			}
			return
		}
		p := &program{t: t, img: img, sound: checkErr == nil && sound(report)}
		p.model = make([]byte, min(img.Size(), fuzzWindow))
		if _, err = img.ReadAt(p.model, 0); errors.Is(err, qcow.ErrCorrupt) && strings.Contains(err.Error(), "compressed cluster") {
			p.sound = false // the checker does not look at data
		}
		p.tolerate(err)
		p.run(code)
		p.compare(0, min(img.Size(), fuzzWindow))
		stillSound := p.sound // a request that failed for want of space leaves the data open, but not the tables
		p.tolerate(img.Close())
		if now := file.Bytes(); firstDifference(now[:min(len(now), 24)], head[:min(len(now), 24)]) >= 0 {
			t.Fatalf("the header became % x", now[:24])
		}
		if stillSound {
			if report, err := check.Check(t.Context(), file, check.Options{}); err != nil || report.Corruptions > 0 {
				t.Fatalf("a sound image was damaged: %v, %v", report, err)
			}
		}
		mend(t, file)
	})
}

// mend repairs what is left of an image. A repair that succeeds leaves one that can be read to its end.
func mend(t *testing.T, file *storage.Memory) {
	t.Helper()
	file = storage.NewMemoryFrom(file.Bytes()) // its owner has closed it
	file.Limit(fuzzFileLimit)
	if _, err := repair.Run(t.Context(), file, repair.Options{Mode: repair.All, MaxMemory: 128 << 20}); err != nil {
		if !errors.Is(err, qcow.ErrCorrupt) && !errors.Is(err, qcow.ErrUnsupported) && !errors.Is(err, qcow.ErrNoSpace) {
			t.Fatalf("an error without a class: %v", err)
		}
		return
	}
	if report, err := check.Check(t.Context(), file, check.Options{}); err != nil || !report.Clean() {
		t.Fatalf("repaired: %v, %v", report, err)
	}
	img := open(t, file, qcow.Options{ReadOnly: true, WithoutBacking: true})
	_, err := img.ReadAt(make([]byte, min(img.Size(), fuzzWindow)), 0)
	if err != nil && !errors.Is(err, qcow.ErrCorrupt) { // what a compressed cluster holds no repair knows
		t.Fatalf("read what was repaired: %v", err)
	}
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
}
