package qcow_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// patchHeader puts the n low bytes of v at off.
func (m *handmade) patchHeader(off, n int, v uint64) {
	var p [8]byte
	binary.BigEndian.PutUint64(p[:], v)
	copy(m.b[off:], p[8-n:])
}

// insertExtension puts a header extension of n bytes before those of the image, with as much of data as fits.
func (m *handmade) insertExtension(typ uint32, n uint64, data string) {
	m.h.Extensions = nil
	b, err := m.h.Encode()
	if err != nil {
		m.t.Fatal(err)
	}
	clear(m.b[:m.h.ClusterSize()])
	copy(m.b, b)
	at := int(m.h.HeaderLength)
	m.patchHeader(at, 4, uint64(typ))
	m.patchHeader(at+4, 4, n)
	copy(m.b[at+8:m.h.ClusterSize()], data)
}

// expectRefused expects that opening the image fails with the class, saying what, at little cost and with the file unchanged.
func (m *handmade) expectRefused(o qcow.Options, class error, what string) {
	m.t.Helper()
	f := m.file()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	img, err := qcow.Open(f, o)
	runtime.ReadMemStats(&after)
	if err == nil {
		m.t.Errorf("opened; want an error that says %q", what)
		if err := img.Close(); err != nil {
			m.t.Error(err)
		}
		return
	}
	if !errors.Is(err, class) || !strings.Contains(err.Error(), what) {
		m.t.Errorf("%v; want the class %q and %q", err, class, what)
	}
	if took := after.TotalAlloc - before.TotalAlloc; took > 4<<20 {
		m.t.Errorf("refusing %d bytes allocated %d", len(m.b), took)
	}
	if !bytes.Equal(f.Bytes(), m.b) {
		m.t.Error("the file was changed")
	}
}

// Offsets of header fields (specification, "Header").
const (
	atVersion        = 4
	atBackingOffset  = 8
	atBackingLength  = 16
	atClusterBits    = 20
	atSize           = 24
	atCrypt          = 32
	atL1Entries      = 36
	atL1Offset       = 40
	atRefTable       = 48
	atRefTableLength = 56
	atSnapshots      = 60
	atSnapshotTable  = 64
	atIncompatible   = 72
	atAutoclear      = 88
	atRefcountOrder  = 96
	atHeaderLength   = 100
	atCompression    = 104
)

func TestOpenRefuses(t *testing.T) {
	const cluster = 1024
	corrupt, unsupported := qcow.ErrCorrupt, qcow.ErrUnsupported
	cases := []struct {
		name  string
		patch func(m *handmade)
		class error
		what  string
	}{
		{"empty file", func(m *handmade) { m.b = nil }, corrupt, "not a qcow2 image"},
		{"another format", func(m *handmade) { copy(m.b, "conectix") }, corrupt, "not a qcow2 image"},
		{"version 1", func(m *handmade) { m.patchHeader(atVersion, 4, 1) }, unsupported, "version 1"},
		{"version 4", func(m *handmade) { m.patchHeader(atVersion, 4, 4) }, unsupported, "version 4"},
		{"refcount_order 7", func(m *handmade) { m.patchHeader(atRefcountOrder, 4, 7) }, corrupt, "refcount_order 7"},
		{"header length odd", func(m *handmade) { m.patchHeader(atHeaderLength, 4, 105) }, corrupt, "header length 105"},
		{"header length small", func(m *handmade) { m.patchHeader(atHeaderLength, 4, 96) }, corrupt, "header length 96"},
		{"header length past its cluster", func(m *handmade) { m.patchHeader(atHeaderLength, 4, cluster+8) }, corrupt, "header length 1032"},
		{"header length huge", func(m *handmade) { m.patchHeader(atHeaderLength, 4, 0xfffffff8) }, corrupt, "header length"},
		{"extension too long", func(m *handmade) { m.insertExtension(0x12345678, cluster, "") }, corrupt, "type 0x12345678"},
		{"extension length overflows", func(m *handmade) { m.insertExtension(0x12345678, 0xffffffff, "") }, corrupt, "type 0x12345678"},

		{"size past the L1 table", func(m *handmade) { m.patchHeader(atSize, 8, 1<<30) }, corrupt, "too small for 1073741824 bytes"},
		{"size past every limit", func(m *handmade) { m.patchHeader(atSize, 8, 1<<63) }, corrupt, "virtual size"},
		{"L1 table huge", func(m *handmade) { m.patchHeader(atL1Entries, 4, 0xffffffff) }, corrupt, "L1 table of 4294967295 entries"},
		{"L1 table of the largest size", func(m *handmade) { m.patchHeader(atL1Entries, 4, format.MaxL1Bytes/8) }, corrupt, "past the end of the file"},
		{"L1 table nowhere", func(m *handmade) { m.patchHeader(atL1Offset, 8, 0) }, corrupt, "L1 table offset 0x0"},
		{"L1 table unaligned", func(m *handmade) { m.patchHeader(atL1Offset, 8, 3*cluster+8) }, corrupt, "L1 table offset"},
		{"L1 table past the end", func(m *handmade) { m.patchHeader(atL1Offset, 8, 1<<30) }, corrupt, "past the end of the file"},
		{"L1 table far away", func(m *handmade) { m.patchHeader(atL1Offset, 8, 1<<63) }, corrupt, "too large"},
		{"L1 table in the refcount table", func(m *handmade) { m.patchHeader(atL1Offset, 8, uint64(m.h.RefcountTableOffset)) }, corrupt, "overlaps other metadata"},
		{"L1 entry reserved bits", func(m *handmade) { m.put(m.h.L1Offset, m.entry(m.h.L1Offset)|1) }, corrupt, "reserved bits 0x1"},
		{"L1 entry unaligned", func(m *handmade) { m.put(m.h.L1Offset, 1<<63|512) }, corrupt, "not the start of a cluster"},
		{"L1 entry past the end", func(m *handmade) { m.put(m.h.L1Offset, 1<<63|1<<30) }, corrupt, "past the end of the file"},
		{"L1 entry far away", func(m *handmade) { m.put(m.h.L1Offset, 1<<63|(1<<56-cluster)) }, corrupt, "past the end of the file"},
		{"L1 entry to the L1 table", func(m *handmade) { m.put(m.h.L1Offset, 1<<63|uint64(m.h.L1Offset)) }, corrupt, "overlaps other metadata"},
		{"L1 entries share a table", func(m *handmade) { m.put(m.h.L1Offset+8, m.entry(m.h.L1Offset)) }, corrupt, "overlaps other metadata"},

		{"no refcount table", func(m *handmade) { m.patchHeader(atRefTableLength, 4, 0) }, corrupt, "no refcount table"},
		{"refcount table huge", func(m *handmade) { m.patchHeader(atRefTableLength, 4, 0xffffffff) }, corrupt, "refcount table of 4294967295 clusters"},
		{"refcount table of the largest size", func(m *handmade) { m.patchHeader(atRefTableLength, 4, format.MaxRefcountTableBytes/cluster) }, corrupt, "past the end of the file"},
		{"refcount table nowhere", func(m *handmade) { m.patchHeader(atRefTable, 8, 0) }, corrupt, "refcount table offset 0x0"},
		{"refcount table unaligned", func(m *handmade) { m.patchHeader(atRefTable, 8, cluster+1) }, corrupt, "refcount table offset"},
		{"refcount table past the end", func(m *handmade) { m.patchHeader(atRefTable, 8, 1<<30) }, corrupt, "past the end of the file"},
		{"refcount table without blocks", func(m *handmade) { m.put(m.h.RefcountTableOffset, 0) }, corrupt, "no refcount block covers the header"},
		{"refcount block in the header", func(m *handmade) { m.put(m.h.RefcountTableOffset+8, 512) }, corrupt, "not the start of a cluster"},
		{"refcount block reserved bits", func(m *handmade) { m.put(m.h.RefcountTableOffset, m.entry(m.h.RefcountTableOffset)|4) }, corrupt, "reserved bits 0x4"},
		{"refcount block twice", func(m *handmade) { m.put(m.h.RefcountTableOffset+8, uint64(m.block())) }, corrupt, "overlaps other metadata"},
		{"refcount block past the end", func(m *handmade) { m.put(m.h.RefcountTableOffset+8, 1<<63) }, corrupt, "past the end of the file"},

		{"backing file", func(m *handmade) {
			m.insertExtension(0x12345678, 0, "/etc/shadow")
			m.patchHeader(atBackingOffset, 8, uint64(m.h.HeaderLength)+8)
			m.patchHeader(atBackingLength, 4, 11)
		}, unsupported, `backing file "/etc/shadow"`},
		{"backing file name outside", func(m *handmade) { m.patchHeader(atBackingOffset, 8, 1<<63); m.patchHeader(atBackingLength, 4, 8) }, corrupt, "backing file name"},
		{"encryption without a header", func(m *handmade) { m.patchHeader(atCrypt, 4, 2) }, corrupt, "encryption header"},
		{"encryption method", func(m *handmade) { m.patchHeader(atCrypt, 4, 3) }, unsupported, "encryption method 3"},
		{"snapshots that are none", func(m *handmade) { m.patchHeader(atSnapshots, 4, 3); m.patchHeader(atSnapshotTable, 8, cluster) }, corrupt, "snapshot"},
		{"snapshots past the end", func(m *handmade) { m.patchHeader(atSnapshots, 4, 3); m.patchHeader(atSnapshotTable, 8, 1<<30) }, corrupt, "past the end of the file"},
		{"too many snapshots", func(m *handmade) { m.patchHeader(atSnapshots, 4, 0xffffffff) }, corrupt, "snapshots"},
		{"data file without a name", func(m *handmade) { m.patchHeader(atIncompatible, 8, format.IncompatDataFile) }, unsupported, "does not name its external data file"},
		{"extended L2 with small clusters", func(m *handmade) { m.patchHeader(atIncompatible, 8, format.IncompatExtendedL2) }, corrupt, "extended L2"},
		{"compression type", func(m *handmade) {
			m.patchHeader(atIncompatible, 8, format.IncompatCompression)
			m.patchHeader(atCompression, 1, 2)
		}, unsupported, "compression type 2"},
		{"compression type without its bit", func(m *handmade) { m.patchHeader(atCompression, 1, 1) }, corrupt, "compression type 1"},
		{"unknown feature", func(m *handmade) { m.patchHeader(atIncompatible, 8, 1<<63|1) }, unsupported, "unknown (bit 63)"},
		{"unknown feature with a name", func(m *handmade) {
			m.insertExtension(format.ExtFeatureNames, 48, "\x00\x28time travel\x00")
			m.patchHeader(atIncompatible, 8, 1<<40)
		}, unsupported, "time travel (bit 40)"},
	}
	readable := map[string]bool{ // since who reads needs no refcounts
		"refcount table of the largest size": true, "refcount table past the end": true, "refcount table without blocks": true,
		"refcount block in the header": true, "refcount block reserved bits": true, "refcount block twice": true, "refcount block past the end": true,
	}
	for _, bits := range []uint64{0, 8, 22, 31, 255, 1 << 31} {
		name := fmt.Sprintf("cluster_bits %d", bits)
		cases = append(cases, cases[0])
		last := &cases[len(cases)-1]
		last.name, last.patch, last.what = name, func(m *handmade) { m.patchHeader(atClusterBits, 4, bits) }, name
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			m := newHandmade(t, qcow.CreateOptions{Size: 256 << 10, ClusterSize: cluster}, func(img *qcow.Image) {
				writeAt(t, img, repeated(1, 5000), 0)
			})
			c.patch(m)
			m.expectRefused(qcow.Options{}, c.class, c.what)
			if readable[c.name] {
				img := open(t, m.file(), qcow.Options{ReadOnly: true})
				expectAt(t, img, repeated(1, 5000), 0)
				if err := img.Close(); err != nil {
					t.Fatal(err)
				}
			} else {
				m.expectRefused(qcow.Options{ReadOnly: true}, c.class, c.what)
			}
		})
	}
}

// Without a passphrase nothing is read from an encrypted image, which would be noise.
func TestOpenWithoutPassphrase(t *testing.T) {
	m := newHandmade(t, qcow.CreateOptions{Size: 64 << 10, ClusterSize: 1024}, func(*qcow.Image) {})
	m.patchHeader(atCrypt, 4, 1)
	m.expectRefused(qcow.Options{ReadOnly: true}, qcow.ErrPassphrase, "passphrase")
	m.expectRefused(qcow.Options{}, qcow.ErrUnsupported, "legacy encryption")
}

// An image that a crash has marked dirty, as QEMU does with lazy refcounts, is repaired by its first writer.
func TestOpenRepairsDirtyImage(t *testing.T) {
	m := newHandmade(t, qcow.CreateOptions{Size: 64 << 10, ClusterSize: 1024}, func(img *qcow.Image) {
		writeAt(t, img, repeated(1, 5000), 0)
	})
	m.patchHeader(atIncompatible, 8, format.IncompatDirty)
	for c := range uint64(3) { // refcounts that were not written in time
		m.setRefcount(m.host(c), 0)
	}
	m.setRefcount(m.h.OffsetOf(format.Cluster(len(m.b)/1024-1)), 5)
	f := m.file()
	change(t, f, func(img *qcow.Image) {
		if img.Info().Dirty {
			t.Error("the image is still marked")
		}
		expectAt(t, img, repeated(1, 5000), 0)
		writeAt(t, img, repeated(2, 9000), 20000)
		expectAt(t, img, repeated(1, 5000), 0)
	})
	expectClean(t, f.Bytes())
}

// A repair that nobody has asked for gives nothing up.
func TestOpenLeavesLossToTheUser(t *testing.T) {
	m := newHandmade(t, qcow.CreateOptions{Size: 64 << 10, ClusterSize: 1024}, func(img *qcow.Image) {
		writeAt(t, img, repeated(1, 5000), 0)
	})
	m.patchHeader(atIncompatible, 8, format.IncompatDirty)
	m.put(m.l2Entry(1), uint64(format.NewL2Entry(1<<40, true)))
	f := m.file()
	before := f.Bytes()
	_, err := qcow.Open(f, qcow.Options{})
	expectClass(t, "open", err, qcow.ErrCorrupt)
	if !bytes.Equal(f.Bytes(), before) {
		t.Error("the image was changed")
	}
}

// Images that are marked can be read, and those marked corrupt not written.
func TestOpenMarkedImage(t *testing.T) {
	for _, c := range []struct {
		bit  uint64
		what string
	}{
		{format.IncompatDirty, "marked dirty"},
		{format.IncompatCorrupt, "marked corrupt"},
	} {
		m := newHandmade(t, qcow.CreateOptions{Size: 64 << 10, ClusterSize: 1024}, func(img *qcow.Image) {
			writeAt(t, img, repeated(1, 5000), 0)
		})
		m.patchHeader(atIncompatible, 8, c.bit)
		if c.bit == format.IncompatCorrupt {
			m.expectRefused(qcow.Options{}, qcow.ErrCorrupt, c.what)
		}

		f := m.file()
		img := open(t, f, qcow.Options{ReadOnly: true})
		if info := img.Info(); info.Dirty != (c.bit == format.IncompatDirty) || info.Corrupt != (c.bit == format.IncompatCorrupt) {
			t.Errorf("%s: %+v", c.what, info)
		}
		expectAt(t, img, repeated(1, 5000), 0)
		expectClass(t, "write", func() error { _, err := img.WriteAt([]byte{1}, 0); return err }(), qcow.ErrReadOnly)
		expectClass(t, "discard", img.Discard(0, 64<<10), qcow.ErrReadOnly)
		expectClass(t, "zeroes", img.WriteZeroes(0, 64<<10, true), qcow.ErrReadOnly)
		expectClass(t, "resize", img.Resize(t.Context(), 128<<10), qcow.ErrReadOnly)
		if err := errors.Join(img.Flush(), img.Close()); err != nil {
			t.Error(err)
		}
		if !bytes.Equal(f.Bytes(), m.b) {
			t.Errorf("%s: the file was changed", c.what)
		}
	}
}

// A writer that does not keep up what unknown autoclear features stand for clears their bits; a reader leaves them.
func TestOpenClearsAutoclear(t *testing.T) {
	m := newHandmade(t, qcow.CreateOptions{Size: 64 << 10}, nil)
	m.patchHeader(atAutoclear, 8, 1<<62|1)
	for _, readOnly := range []bool{true, false} {
		f := m.file()
		if err := open(t, f, qcow.Options{ReadOnly: readOnly}).Close(); err != nil {
			t.Fatal(err)
		}
		want := uint64(0)
		if readOnly {
			want = 1<<62 | 1
		}
		if got := binary.BigEndian.Uint64(f.Bytes()[atAutoclear:]); got != want {
			t.Errorf("read-only %v: the autoclear bits are %#x, not %#x", readOnly, got, want)
		}
	}
}

// A file that was cut off, anywhere, loses nothing by being opened: writing is refused, and what can be read is right.
func TestOpenTruncated(t *testing.T) {
	const cluster, size = 512, 96 << 10
	m := newHandmade(t, qcow.CreateOptions{Size: size, ClusterSize: cluster}, func(img *qcow.Image) {
		for off := int64(0); off+3*cluster < size; off += 6 * cluster {
			writeAt(t, img, sectorsOf(uint64(off)+1, 3*cluster), off)
		}
	})
	disk := make([]byte, size)
	img := open(t, m.file(), qcow.Options{ReadOnly: true})
	if _, err := img.ReadAt(disk, 0); err != nil {
		t.Fatal(err)
	}
	lengths := []int{0, 1, 4, 7, 8, 100, 103, 104, 105, 111, 112, 200}
	for n := cluster; n < len(m.b); n += cluster {
		lengths = append(lengths, n-1, n, n+1)
	}
	opened := 0
	for _, n := range lengths {
		f := storage.NewMemoryFrom(bytes.Clone(m.b[:n]))
		// Inside the last cluster nothing but the guest's own bytes are lost, which no table tells.
		if n <= len(m.b)-cluster {
			img, err := qcow.Open(f, qcow.Options{})
			expectClass(t, fmt.Sprintf("open %d of %d bytes", n, len(m.b)), err, qcow.ErrCorrupt)
			if img != nil {
				t.Errorf("an image along with an error")
			}
		}
		img, err := qcow.Open(f, qcow.Options{ReadOnly: true})
		if err != nil {
			expectClass(t, fmt.Sprintf("open %d of %d bytes read-only", n, len(m.b)), err, qcow.ErrCorrupt)
		} else {
			opened++
			readTruncated(t, img, disk, n)
		}
		if !bytes.Equal(f.Bytes(), m.b[:n]) {
			t.Fatalf("opening %d of %d bytes changed the file", n, len(m.b))
		}
	}
	if opened == 0 {
		t.Error("no truncated file could be read")
	}
}

// readTruncated reads each cluster of the image in the first n bytes of a file, and closes it.
func readTruncated(t *testing.T, img *qcow.Image, disk []byte, n int) {
	t.Helper()
	const cluster = 512
	got := make([]byte, cluster)
	for off := 0; off < len(disk); off += cluster {
		if _, err := img.ReadAt(got, int64(off)); err != nil {
			expectClass(t, "read", err, qcow.ErrCorrupt)
			continue
		}
		// The cluster that was cut through has zeroes where its bytes are lost.
		i, cut := firstDifference(got, disk[off:][:cluster]), n%cluster
		if i >= 0 && (cut == 0 || i < cut || firstDifference(got[cut:], make([]byte, cluster-cut)) >= 0) {
			t.Errorf("with %d bytes of the file: byte %d of the disk is wrong", n, off+i)
		}
	}
	if err := img.Close(); err != nil {
		t.Error(err)
	}
}

func TestOpenFailsWithItsFile(t *testing.T) {
	m := newHandmade(t, qcow.CreateOptions{Size: 64 << 10, ClusterSize: 1024}, func(img *qcow.Image) {
		writeAt(t, img, repeated(1, 5000), 0)
	})
	for fail := 0; ; fail++ {
		reads := 0
		f := &hooked{File: m.file(), beforeRead: func([]byte, int64) error {
			if reads++; reads == fail+1 {
				return errInjected
			}
			return nil
		}}
		img, err := qcow.Open(f, qcow.Options{})
		if reads <= fail {
			if err != nil || img.Close() != nil {
				t.Errorf("without a failure: %v", err)
			}
			if fail < 3 { // header, refcount table, L1 table
				t.Errorf("opening took %d reads", fail)
			}
			break
		}
		expectClass(t, fmt.Sprintf("read %d failed", fail), err, errInjected)
	}
}
