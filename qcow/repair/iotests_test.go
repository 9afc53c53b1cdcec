package repair_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow/repair"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// The subjects of QEMU's iotests 007, 039, 060, 108, 214 and 261, with QEMU's tools to make the images and to judge them.

// bench is an image in a directory of its own.
type bench struct {
	t    *testing.T
	path string
}

func newBench(t *testing.T, size string, options ...string) *bench {
	t.Helper()
	require.Tool(t, "qemu-img", "qemu-io")
	b := &bench{t, filepath.Join(t.TempDir(), "image.qcow2")}
	args := []string{"create", "-q", "-f", "qcow2"}
	for _, o := range options {
		args = append(args, "-o", o)
	}
	run(t, "qemu-img", append(args, b.path, size)...)
	return b
}

func (b *bench) io(commands ...string) {
	b.t.Helper()
	args := []string{"-f", "qcow2"}
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	exit, said := status(b.t, "qemu-io", append(args, b.path)...)
	if exit != 0 || strings.Contains(said, "failed") || strings.Contains(said, "error") {
		b.t.Fatalf("qemu-io %q: %d\n%s", commands, exit, said)
	}
}

func (b *bench) content() []byte {
	b.t.Helper()
	image, err := os.ReadFile(b.path)
	if err != nil {
		b.t.Fatal(err)
	}
	return image
}

// poke changes bytes of the file, which grows if need be.
func (b *bench) poke(off int, bytes ...byte) {
	b.t.Helper()
	image := b.content()
	image = append(image, make([]byte, max(off+len(bytes)-len(image), 0))...)
	copy(image[off:], bytes)
	if err := os.WriteFile(b.path, image, 0o600); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) poke64(off int, v uint64) {
	b.t.Helper()
	b.poke(off, binary.BigEndian.AppendUint64(nil, v)...)
}

// repair repairs the image, which afterwards is clean, as QEMU sees it too, and keeps what it said.
func (b *bench) repair(kinds ...repair.Kind) *repair.Report {
	b.t.Helper()
	image := b.content()
	got, report := mustRepair(b.t, image, repair.All)
	for _, k := range kinds {
		if report.Count(k) == 0 {
			b.t.Errorf("not reported: %v in %v", k, report)
		}
	}
	if s := unclean(got); s != "" {
		b.t.Errorf("after %v: %s", report, s)
	}
	if lost := contentOf(image).lost(contentOf(got)); lost != "" {
		b.t.Error(lost)
	}
	if err := os.WriteFile(b.path, got, 0o600); err != nil {
		b.t.Fatal(err)
	}
	run(b.t, "qemu-img", "check", "-q", "-f", "qcow2", b.path)
	return report
}

// Where qemu-img puts things, with clusters of 64 KiB.
const (
	tableAt = 0x10000
	blockAt = 0x20000
	l1At    = 0x30000
	l2At    = 0x40000
)

// TestUnusableRefcounts rebuilds what refcounts are stored in.
func TestUnusableRefcounts(t *testing.T) {
	t.Run("no refcount table", func(t *testing.T) {
		b := newBench(t, "64M")
		b.io("write -P 42 0 64k")
		b.poke64(48, 0)
		b.poke(56, 0, 0, 0, 0)
		b.repair(repair.RefcountsRebuilt, repair.RefcountRaised)
		b.io("read -P 42 0 64k")
	})
	t.Run("data cluster without refcount where there is no block", func(t *testing.T) {
		b := newBench(t, "64M", "cluster_size=512")
		b.io("write 0 0x1b200")
		if n := len(b.content()); n != 0x20000 { // all that the first refcount block covers
			t.Fatalf("the file has %#x bytes", n)
		}
		b.poke64(0x1ccc8, 1<<63|0x20000)
		b.poke(0x20000, bytes.Repeat([]byte{42}, 512)...)
		b.io("read -P 42 0x1b200 512")
		b.repair(repair.RefcountRaised)
		b.io("read -P 42 0x1b200 512")
	})
	for name, off := range map[string]uint64{
		"behind the end":                       0x100000,
		"so far that the end overflows int64":  0x7fffffffffff0000,
		"so far that the end overflows uint64": 0xffffffffffff0000,
	} {
		t.Run("refcount block "+name, func(t *testing.T) {
			b := newBench(t, "64M")
			b.poke64(tableAt+8, off)
			if off == 0x100000 {
				b.poke(blockAt+0x20, 0, 1)
			}
			b.repair(repair.RefcountsRebuilt)
		})
	}
}

// TestRebuildNeedsNoRoom rebuilds refcounts in a file with a hole: it does not grow.
func TestRebuildNeedsNoRoom(t *testing.T) {
	b := newBench(t, "64M")
	b.io("write -P 1 0 256k", "write -P 2 256k 64k", "discard 0 256k")
	length := len(b.content())
	b.poke64(48, 0)
	b.poke(56, 0, 0, 0, 0)
	b.repair(repair.RefcountsRebuilt)
	if n := len(b.content()); n > length {
		t.Errorf("the file grew from %d to %d bytes", length, n)
	}
	b.io("read -P 2 256k 64k")
}

// TestCompressedRange repairs compressed clusters whose ranges are longer than their data.
func TestCompressedRange(t *testing.T) {
	b := newBench(t, "64M")
	b.io("write -c -P 1 0 64k", "write -c -P 2 64k 64k", "write -c -P 3 128k 64k")
	image := b.content()
	for i := range 3 {
		e := binary.BigEndian.Uint64(image[l2At+8*i:])
		b.poke64(l2At+8*i, e|0xff<<54) // as many sectors as there can be
	}
	b.repair()
	b.io("read -P 1 0 64k", "read -P 2 64k 64k", "read -P 3 128k 64k")
	b.io("write -P 4 0 64k", "write -P 5 128k 64k", "read -P 2 64k 64k")
	run(t, "qemu-img", "check", "-q", "-f", "qcow2", b.path)
}

// TestSnapshotTable repairs snapshot tables.
func TestSnapshotTable(t *testing.T) {
	prepare := func(t *testing.T) (b *bench, table int) {
		b = newBench(t, "64M")
		for i := range 3 {
			b.io(fmt.Sprintf("write -P %d 0 64k", i+1))
			run(t, "qemu-img", "snapshot", "-c", fmt.Sprint("s", i), b.path)
		}
		return b, int(binary.BigEndian.Uint64(b.content()[64:]))
	}
	apply := func(b *bench, i int) {
		b.t.Helper()
		run(b.t, "qemu-img", "snapshot", "-a", fmt.Sprint("s", i), b.path)
		b.io(fmt.Sprintf("read -P %d 0 64k", i+1))
		run(b.t, "qemu-img", "check", "-q", "-f", "qcow2", b.path)
	}
	// entry returns an entry with n bytes of extra data for s1.
	entry := func(b *bench, at, n int) []byte {
		e := bytes.Clone(b.content()[at:][:64+3])
		names := bytes.Clone(e[64:])
		binary.BigEndian.PutUint32(e[36:], uint32(n))
		return append(append(e[:40:40], make0(n, e[40:64])...), names...)
	}
	for name, extra := range map[string]int{"no extra data": 0, "only the size of the VM state": 8, "unknown extra data": 1025, "64 KiB of extra data": 65536} {
		t.Run(name, func(t *testing.T) {
			b, at := prepare(t)
			b.poke(at, entry(b, at, extra)...)
			b.poke(60, 0, 0, 0, 1) // the others are where they were, which is nowhere
			b.repair(repair.SnapshotCorrected)
			apply(b, 0)
		})
	}
	t.Run("L1 table at an impossible place", func(t *testing.T) {
		b, at := prepare(t)
		b.poke64(at+72, 0x2a00)
		image := b.content()
		got, report := mustRepair(t, image, repair.All)
		if report.Count(repair.SnapshotDropped) != 1 {
			t.Error(report)
		}
		b.poke(0, got...)
		b.repair()
		apply(b, 0)
		apply(b, 2)
	})
	t.Run("more snapshots than there can be", func(t *testing.T) {
		b, _ := prepare(t)
		b.poke(60, 0, 1, 0, 1)
		got, report := mustRepair(t, b.content(), repair.All)
		if report.Count(repair.SnapshotDropped) == 0 {
			t.Error(report)
		}
		if s := unclean(got); s != "" {
			t.Error(s)
		}
	})
	t.Run("table nowhere", func(t *testing.T) {
		b, _ := prepare(t)
		b.poke64(64, 0x123456789)
		got, report := mustRepair(t, b.content(), repair.All)
		if report.Count(repair.SnapshotDropped) != 1 || binary.BigEndian.Uint32(got[60:]) != 0 {
			t.Error(report)
		}
		if s := unclean(got); s != "" {
			t.Error(s)
		}
	})
}

// make0 returns n bytes that begin with b, as far as they go.
func make0(n int, b []byte) []byte {
	x := make([]byte, n)
	copy(x, b)
	return x
}

// TestOverlap takes structures apart that lie on each other.
func TestOverlap(t *testing.T) {
	t.Run("L2 table on the L1 table", func(t *testing.T) {
		b := newBench(t, "64M")
		b.poke64(l1At, 1<<63|l1At)
		b.repair(repair.TableMoved)
		b.io("write -P 42 0 512", "read -P 42 0 512")
	})
	t.Run("guest data on a refcount block", func(t *testing.T) {
		b := newBench(t, "64M")
		b.poke64(l1At, 1<<63|l2At)
		b.poke(blockAt+8, 0, 1)
		b.poke(l2At+0xffff, 0)
		b.poke64(l2At, 1<<63|blockAt)
		b.poke(79, 2) // the corrupt bit
		b.repair(repair.RefcountsRebuilt, repair.MarkCleared)
		b.io("write -P 42 0 512", "read -P 42 0 512")
	})
	t.Run("guest data on an L2 table of a snapshot", func(t *testing.T) {
		b := newBench(t, "64M")
		b.io("write -P 1 0 512")
		run(t, "qemu-img", "snapshot", "-c", "foo", b.path)
		b.io("write -P 2 0 512")
		b.poke64(0x80000, 1<<63|l2At)
		b.repair(repair.TableMoved, repair.LeakRepaired)
		b.io("write -P 4 0 512", "read -P 4 0 512")
		run(t, "qemu-img", "snapshot", "-a", "foo", b.path)
		b.io("read -P 1 0 512")
	})
	t.Run("an L2 table that two parts of the disk share", func(t *testing.T) {
		b := newBench(t, "2G")
		b.io("write -P 1 0 64k")
		b.poke64(l1At+8, 1<<63|l2At)
		b.repair(repair.TableCopied, repair.RefcountRaised, repair.CopiedCleared)
		b.io("read -P 1 0 64k", "read -P 1 512M 64k", "write -P 2 512M 64k", "read -P 1 0 64k")
	})
	t.Run("a header that is not allocated", func(t *testing.T) {
		b := newBench(t, "64M")
		b.poke(blockAt, 0, 0)
		b.repair(repair.RefcountRaised)
		b.io("write 0 64k")
	})
	t.Run("a refcount block that is not allocated", func(t *testing.T) {
		b := newBench(t, "64M")
		b.poke(blockAt, make([]byte, 8)...)
		b.repair(repair.RefcountRaised)
		b.io("write 0 64k")
	})
	for name, at := range map[string]int{"refcount block": tableAt, "L2 table": l1At, "guest cluster": l2At} {
		t.Run(name+" that is not at the start of a cluster", func(t *testing.T) {
			b := newBench(t, "64M")
			b.io("write -P 5 64k 64k", "write -P 6 128k 64k")
			image := b.content()
			b.poke64(at, binary.BigEndian.Uint64(image[at:])|0x2a00)
			b.repair()
			if at == tableAt {
				b.io("read -P 5 64k 64k")
			}
			b.io("write -P 7 0 64k", "read -P 7 0 64k")
		})
	}
}

// TestDirty repairs images that lazy refcounts left dirty.
func TestDirty(t *testing.T) {
	for _, options := range []string{"lazy_refcounts=on", "lazy_refcounts=on,cluster_size=512", "lazy_refcounts=on,refcount_bits=1"} {
		t.Run(options, func(t *testing.T) {
			b := newBench(t, "128M", options)
			// The tool kills itself.
			status(t, "qemu-io", "-f", "qcow2", "-c", "write -P 0x5a 0 512", "-c", "write -P 0x5b 1M 200k", "-c", "sigraise 9", b.path)
			if image := b.content(); image[79] != 1 {
				t.Fatalf("incompatible features %#x: not dirty", image[79])
			}
			b.repair(repair.MarkCleared, repair.RefcountRaised)
			if image := b.content(); image[79] != 0 {
				t.Errorf("incompatible features %#x", image[79])
			}
			b.io("read -P 0x5a 0 512", "read -P 0x5b 1M 200k", "write -P 1 64M 512", "read -P 0x5b 1M 200k")
		})
	}
	t.Run("dirty, but right", func(t *testing.T) {
		b := newBench(t, "128M", "lazy_refcounts=on")
		b.io("write -P 0x5a 0 512")
		b.poke(79, 1)
		image := b.content()
		if report := b.repair(repair.MarkCleared); report.Count() != 1 {
			t.Error(report)
		}
		image[79] = 0
		if !bytes.Equal(b.content(), image) {
			t.Error("more than the mark has changed")
		}
	})
}

// TestManySnapshots rebuilds the refcounts of an image with many snapshots.
func TestManySnapshots(t *testing.T) {
	b := newBench(t, "1M", "cluster_size=4096")
	for i := range 10 {
		b.io(fmt.Sprintf("write -P %d 0 64k", i), fmt.Sprintf("write -P %d %dk 4k", 100+i, 100+4*i))
		run(t, "qemu-img", "snapshot", "-c", fmt.Sprintf("test-%d", i), b.path)
	}
	image := b.content()
	clear(image[0x2000:0x3000]) // the refcount block
	if err := os.WriteFile(b.path, image, 0o600); err != nil {
		t.Fatal(err)
	}
	b.repair(repair.RefcountRaised)
	for i := range 10 {
		run(t, "qemu-img", "snapshot", "-a", fmt.Sprintf("test-%d", i), b.path)
		run(t, "qemu-img", "check", "-q", "-f", "qcow2", b.path)
		b.io(fmt.Sprintf("read -P %d 0 64k", i), fmt.Sprintf("read -P %d %dk 4k", 100+i, 100+4*i))
	}
}
