package qcow_test

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/check"
	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// disks is what must be in an image.
type disks struct {
	want []byte // the active one
	kept []keptDisk
}

// matches reads all disks of an image at rest.
func (d *disks) matches(image []byte) error {
	img, err := qcow.Open(storage.NewMemoryFrom(image), qcow.Options{ReadOnly: true})
	if err != nil {
		return err
	}
	list := img.Snapshots()
	if len(list) != len(d.kept) {
		return fmt.Errorf("%d snapshots instead of %d", len(list), len(d.kept))
	}
	if err := holds(img, d.want); err != nil {
		return fmt.Errorf("active: %w", err)
	}
	for i, k := range d.kept {
		if list[i].Name != k.name {
			return fmt.Errorf("snapshot %d is %q instead of %q", i, list[i].Name, k.name)
		}
		if img, err = qcow.Open(storage.NewMemoryFrom(image), qcow.Options{ReadOnly: true, Snapshot: k.name}); err != nil {
			return err
		}
		if err := holds(img, k.content); err != nil {
			return fmt.Errorf("snapshot %q: %w", k.name, err)
		}
	}
	return nil
}

func holds(img *qcow.Image, want []byte) error {
	if img.Size() != int64(len(want)) {
		return fmt.Errorf("the disk has %d bytes instead of %d", img.Size(), len(want))
	}
	got := make([]byte, len(want))
	if _, err := img.ReadAt(got, 0); err != nil {
		return err
	}
	if i := firstDifference(got, want); i >= 0 {
		return fmt.Errorf("byte %d is %#x instead of %#x", i, got[i], want[i])
	}
	return nil
}

// A blow is an operation that changes an image at one blow.
type blow struct {
	name  string
	do    func(t *testing.T, img *qcow.Image) error
	after func(before disks) disks
}

var blows = []blow{
	{"create", func(t *testing.T, img *qcow.Image) error {
		_, err := img.CreateSnapshot(t.Context(), "new", time.Unix(1, 0))
		return err
	}, func(d disks) disks {
		return disks{d.want, append(slices.Clip(d.kept), keptDisk{"new", d.want})}
	}},
	{
		"delete", func(t *testing.T, img *qcow.Image) error { return img.DeleteSnapshot(t.Context(), "second") },
		func(d disks) disks { return disks{d.want, append(d.kept[:1:1], d.kept[2:]...)} },
	},
	{
		"delete the last made", func(t *testing.T, img *qcow.Image) error { return img.DeleteSnapshot(t.Context(), "third") },
		func(d disks) disks { return disks{d.want, d.kept[:2]} },
	},
	{
		"apply", func(t *testing.T, img *qcow.Image) error { return img.ApplySnapshot(t.Context(), "first") },
		func(d disks) disks { return disks{d.kept[0].content, d.kept} },
	},
	{
		"shrink", func(t *testing.T, img *qcow.Image) error { return img.Resize(t.Context(), 11<<10) },
		func(d disks) disks { return disks{d.want[:11<<10], d.kept} },
	},
}

// brokenDisk makes an image with snapshots, in which there is something to give back, and opens it over faults.
func brokenDisk(t *testing.T) (f *storage.Memory, before disks) {
	const size = 40 << 10
	f = create(t, qcow.CreateOptions{Size: size, ClusterSize: 512, RefcountBits: 16})
	before.want = make([]byte, size)
	change(t, f, func(img *qcow.Image) {
		for i, name := range []string{"first", "second", "third"} {
			for k := range int64(6) {
				p := repeated(byte(1+10*int64(i)+k), 2000)
				off := (k*7 + int64(i)) * 900
				writeAt(t, img, p, off)
				copy(before.want[off:], p)
			}
			if err := img.Discard(20<<10, 4<<10); err != nil {
				t.Fatal(err)
			}
			clear(before.want[20<<10:][:4<<10])
			before.kept = append(before.kept, keptDisk{name, bytes.Clone(before.want)})
			if name == "third" {
				break
			}
			if _, err := img.CreateSnapshot(t.Context(), name, time.Unix(1, 0)); err != nil {
				t.Fatal(err)
			}
		}
	})
	// The last one is made by QEMU: it shares L2 tables with the disk.
	s := &shelf{t: t, path: t.TempDir() + "/image.qcow2"}
	s.store(f.Bytes())
	s.run("qemu-img", "snapshot", "-c", "third", s.path)
	f = storage.NewMemoryFrom(s.load())
	expectClean(t, f.Bytes())
	if err := before.matches(f.Bytes()); err != nil {
		t.Fatal(err)
	}
	return f, before
}

// atomicHeader is a file that changes the header as a whole or not at all, as a disk does with a sector.
type atomicHeader struct{ storage.File }

func (f atomicHeader) WriteAt(p []byte, off int64) (int, error) {
	if off == format.SwitchOffset && len(p) < format.SwitchLength {
		return 0, nil
	}
	return f.File.WriteAt(p, off)
}

// TestSnapshotFault lets the k-th change of the file fail, for every k, while an operation changes the image at one blow: it is done
// or not, says so, and nothing else is lost.
func TestSnapshotFault(t *testing.T) {
	require.Tool(t, "qemu-img")
	image, before := brokenDisk(t)
	noSpace := fmt.Errorf("%w: %w", storage.ErrNoSpace, syscall.ENOSPC)
	for _, kind := range []struct {
		name  string
		fault storage.Fault
	}{
		{"EIO once", storage.Fault{Err: syscall.EIO}},
		{"EIO for ever", storage.Fault{Err: syscall.EIO, Forever: true}},
		{"ENOSPC once", storage.Fault{Err: noSpace}},
		{"ENOSPC for ever", storage.Fault{Err: noSpace, Forever: true}},
		{"short write once", storage.Fault{Err: noSpace, Short: true}},
		{"short write for ever", storage.Fault{Err: syscall.EIO, Short: true, Forever: true}},
	} {
		for _, b := range blows {
			for _, calm := range []bool{true, false} {
				t.Run(fmt.Sprintf("%s/%s/calm=%v", b.name, kind.name, calm), func(t *testing.T) {
					cases := 0
					for at := 0; ; at += stride {
						fault := kind.fault
						fault.At = at
						c := blowCase{t: t, blow: b, fault: fault, f: storage.NewMemoryFrom(image.Bytes()), before: before, calm: calm}
						if !c.run() {
							break
						}
						cases++
					}
					if cases < 10/stride {
						t.Errorf("only %d cases", cases)
					}
				})
			}
		}
	}
}

// blowCase is an operation that meets one fault.
type blowCase struct {
	t *testing.T
	blow
	fault  storage.Fault
	f      *storage.Memory
	before disks
	calm   bool // nothing is to be given back when the operation begins
}

func (c *blowCase) fatalf(msg string, args ...any) {
	c.t.Helper()
	c.t.Fatalf("fault at %d: %s", c.fault.At, fmt.Sprintf(msg, args...))
}

// run returns false when the fault lies behind all that the operation did.
func (c *blowCase) run() bool {
	const reserve = 6
	switchable := &switchableFaults{File: c.f}
	img := open(c.t, switchable, qcow.FilledByTakers(qcow.Options{ReserveBytes: reserve * 512}))
	c.before.want = bytes.Clone(c.before.want)
	writeAt(c.t, img, repeated(0x77, 3000), 5000) // leaves a reserve, and old clusters to give back
	copy(c.before.want[5000:], repeated(0x77, 3000))
	if c.calm {
		for range 2 {
			if err := img.Flush(); err != nil {
				c.fatalf("%v", err)
			}
		}
	}
	was := c.f.Bytes()

	faults := storage.NewFaults(atomicHeader{c.f}, &c.fault)
	switchable.set(faults)
	err := c.do(c.t, img)
	_, injected := faults.Count()
	switchable.set(c.f)
	c.verify(img, err, was, reserve)
	if err := img.Close(); err != nil && !errors.Is(err, c.fault.Err) {
		c.fatalf("close: %v", err)
	}
	c.reopen()
	return injected > 0
}

// verify looks at the image right after the operation.
func (c *blowCase) verify(img *qcow.Image, err error, was []byte, reserve int) {
	after := c.after(c.before)
	now := c.f.Bytes()
	wentWell, stayed := after.matches(now), c.before.matches(now)
	poisoned := false
	if err != nil {
		if !errors.Is(err, c.fault.Err) {
			c.fatalf("surfaced as %v", err)
		}
		_, writeErr := img.WriteAt(repeated(1, 512), 0)
		if poisoned = writeErr != nil; !poisoned {
			c.before.want = append(repeated(1, 512), c.before.want[512:]...)
		}
	}
	switch {
	case err == nil && wentWell != nil:
		c.fatalf("done, but %v", wentWell)
	case err != nil && !poisoned && stayed != nil:
		c.fatalf("refused, but %v", stayed)
	case wentWell != nil && stayed != nil:
		c.fatalf("neither done (%v) nor not (%v)", wentWell, stayed)
	case c.calm && err != nil && !poisoned && !c.fault.Forever && !bytes.Equal(now, was):
		c.fatalf("refused, but the file differs, from byte %d on, and has %d bytes instead of %d", firstDifference(now, was), len(now), len(was))
	}
	report, checkErr := check.Check(c.t.Context(), storage.NewMemoryFrom(now), check.Options{})
	if checkErr != nil || report.Corruptions > 0 || c.calm && report.Leaks > reserve {
		c.fatalf("%v, %v", checkErr, report)
	}
	if err == nil || poisoned {
		return
	}
	if err := c.do(c.t, img); err != nil {
		c.fatalf("again: %v", err)
	}
}

// reopen opens the image again and goes on with it.
func (c *blowCase) reopen() {
	after := c.after(c.before)
	wentWell, stayed := after.matches(c.f.Bytes()), c.before.matches(c.f.Bytes())
	if wentWell != nil && stayed != nil {
		c.fatalf("opened again: neither done (%v) nor not (%v)", wentWell, stayed)
	}
	again := open(c.t, c.f, qcow.Options{})
	if stayed == nil {
		if err := c.do(c.t, again); err != nil {
			c.fatalf("after opening again: %v", err)
		}
	}
	for _, s := range again.Snapshots() {
		if err := again.DeleteSnapshot(c.t.Context(), s.ID); err != nil {
			c.fatalf("delete: %v", err)
		}
	}
	if err := holds(again, after.want); err != nil {
		c.fatalf("at last: %v", err)
	}
	if err := again.Close(); err != nil {
		c.fatalf("close: %v", err)
	}
	report, err := check.Check(c.t.Context(), c.f, check.Options{})
	if err != nil || report.Corruptions > 0 {
		c.fatalf("at last: %v, %v", err, report)
	}
}

// switchableFaults is a file whose operations go by way of another one for a while.
type switchableFaults struct {
	storage.File
}

func (s *switchableFaults) set(f storage.File) { s.File = f }

// TestSnapshotFullDisk gives an operation a little more space each time, until it has enough: before that it is refused, and leaves the
// file as it was.
func TestSnapshotFullDisk(t *testing.T) {
	require.Tool(t, "qemu-img")
	image, before := brokenDisk(t)
	refusals := 0
	for _, b := range blows {
		t.Run(b.name, func(t *testing.T) {
			before := disks{bytes.Clone(before.want), before.kept}
			copy(before.want[24<<10:], repeated(0x66, 16<<10))
			after := b.after(before)
			for room := int64(0); ; room += 512 {
				f := storage.NewMemoryFrom(image.Bytes())
				img := open(t, f, qcow.FilledByTakers(qcow.Options{}))
				writeAt(t, img, repeated(0x66, 16<<10), 24<<10) // takes what is free in the file
				if err := img.Flush(); err != nil {
					t.Fatal(err)
				}
				was := f.Bytes()
				f.Limit(int64(len(was)) + room)
				err := b.do(t, img)
				if err != nil {
					expectClass(t, "full", err, qcow.ErrNoSpace)
					if !bytes.Equal(f.Bytes(), was) {
						t.Fatalf("with room for %d bytes: the file has changed", room)
					}
				}
				want := &before
				if err == nil {
					want = &after
				}
				if err := want.matches(f.Bytes()); err != nil {
					t.Fatalf("with room for %d bytes: %v", room, err)
				}
				if err := img.Close(); err != nil {
					t.Fatal(err)
				}
				expectClean(t, f.Bytes())
				if err == nil {
					refusals += int(room / 512)
					return
				}
			}
		})
	}
	if refusals < 5 {
		t.Errorf("only %d refusals", refusals)
	}
}
