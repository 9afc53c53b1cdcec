package repair_test

import (
	"encoding/binary"

	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/repair"
)

// builder makes an image by hand, without refcounts: a repair adds them.
type builder struct {
	h         format.Header
	bytes     []byte
	l2        map[uint64]format.HostOffset // by place in the L1 table
	snapshots []format.Snapshot
}

func newBuilder(h format.Header) *builder {
	b := &builder{h: h, l2: make(map[uint64]format.HostOffset)}
	b.h.L1Entries = uint32(h.L1EntriesFor(h.Size))
	b.h.RefcountTableOffset, b.h.RefcountTableClusters = format.HostOffset(h.ClusterSize()), 1
	b.alloc(2 * h.ClusterSize()) // the header, and a refcount table without blocks
	b.h.L1Offset = b.alloc(b.h.L1Bytes())
	return b
}

// alloc appends clusters for n bytes.
func (b *builder) alloc(n uint64) format.HostOffset {
	off := format.HostOffset(len(b.bytes))
	b.bytes = append(b.bytes, make([]byte, b.h.ClustersFor(n)<<b.h.ClusterBits)...)
	return off
}

// set sets the entry of a guest cluster.
func (b *builder) set(guest uint64, e format.MappingEntry) {
	at := format.GuestOffset(guest << b.h.ClusterBits)
	i := b.h.L1Index(at)
	if b.l2[i] == 0 {
		b.l2[i] = b.alloc(b.h.ClusterSize())
		format.PutEntry(b.bytes[b.h.L1Offset:], i, uint64(format.NewL1Entry(b.l2[i], true)))
	}
	b.h.PutMappingEntry(b.bytes[b.l2[i]:], b.h.L2Index(at), e)
}

// data gives a guest cluster a host cluster full of v.
func (b *builder) data(guest uint64, v byte) {
	e := format.MappingEntry{}
	if b.h.ExtendedL2 {
		e.Subclusters = 0xf0000000ffff
	}
	b.set(guest, e) // the table comes first
	off := format.HostOffset(guest << b.h.ClusterBits)
	if !b.h.DataFile {
		off = b.alloc(b.h.ClusterSize())
		for i := range b.h.ClusterSize() {
			b.bytes[uint64(off)+i] = v
		}
	}
	e.L2Entry = format.NewL2Entry(off, true)
	b.set(guest, e)
}

// snapshot adds a snapshot of everything that there is.
func (b *builder) snapshot(id string) {
	l1 := b.alloc(b.h.L1Bytes())
	copy(b.bytes[l1:], b.bytes[b.h.L1Offset:][:b.h.L1Bytes()])
	b.snapshots = append(b.snapshots, format.Snapshot{L1Offset: l1, L1Entries: b.h.L1Entries, ID: id, Name: "snapshot " + id, DiskSize: b.h.Size})
}

// bitmap adds a bitmap with one cluster of bits.
func (b *builder) bitmap(name string) {
	directory, table, bits := b.alloc(1), b.alloc(1), b.alloc(1)
	b.bytes[bits] = 0xaa
	format.PutEntry(b.bytes[table:], 0, uint64(bits))
	n := copy(b.bytes[directory:], format.EncodeBitmaps([]format.Bitmap{{TableOffset: table, TableEntries: 1, GranularityBits: 31, Name: name}}))
	ext := format.BitmapsExtension{Count: 1, DirectorySize: uint64(n), DirectoryOffset: directory}
	b.h.SetExtension(format.ExtBitmaps, ext.Encode())
	b.h.Autoclear |= format.AutoclearBitmaps
}

// unfinished returns the image without refcounts.
func (b *builder) unfinished() []byte {
	if len(b.snapshots) > 0 && b.h.SnapshotsOffset == 0 {
		table := format.EncodeSnapshots(b.snapshots)
		b.h.Snapshots, b.h.SnapshotsOffset = uint32(len(b.snapshots)), b.alloc(uint64(len(table)))
		copy(b.bytes[b.h.SnapshotsOffset:], table)
	}
	header, err := b.h.Encode()
	if err != nil {
		panic(err) // of a test's own making
	}
	copy(b.bytes, header)
	return b.bytes
}

// image returns the finished image.
func (b *builder) image() []byte {
	image, _, err := repaired(b.unfinished(), repair.Options{Mode: repair.All})
	if err != nil {
		panic(err)
	}
	return image
}

// fuzzSubjects are what the fuzzer starts from.
var fuzzSubjects = []fuzzSubject{
	{bits: 9, order: 0, features: ""},
	{bits: 9, order: 1, features: "snapshot"},
	{bits: 9, order: 4, features: "snapshot bitmap compressed"},
	{bits: 9, order: 6, features: "snapshot bitmap backing"},
	{bits: 12, order: 3, features: "snapshot bitmap compressed"},
	{bits: 9, order: 4, version: 2, features: "snapshot compressed"},
	{bits: 14, order: 4, extended: true, features: "snapshot bitmap backing"},
	{bits: 9, order: 4, dataFile: true, features: "bitmap"},
	{bits: 9, order: 4, features: "luks snapshot"},
}

type fuzzSubject struct {
	bits, order, version uint32
	extended, dataFile   bool
	features             string
}

func (s fuzzSubject) build() []byte {
	has := func(f string) bool { return subject{features: s.features}.has(f) }
	g := format.Geometry{ClusterBits: s.bits, RefcountOrder: s.order, ExtendedL2: s.extended, DataFile: s.dataFile}
	h := format.Header{Geometry: g, Version: s.version, Size: 100 << s.bits}
	if has("backing") {
		h.BackingFile = "base"
	}
	b := newBuilder(h)
	if has("luks") {
		pointer := make([]byte, 16)
		binary.BigEndian.PutUint64(pointer, uint64(b.alloc(3<<s.bits)))
		binary.BigEndian.PutUint64(pointer[8:], 3<<s.bits)
		b.h.SetExtension(format.ExtFullDisk, pointer)
		b.h.CryptMethod = 2
	}
	b.data(0, 1)
	b.data(1, 2)
	if has("snapshot") {
		b.snapshot("1")
		b.l2 = map[uint64]format.HostOffset{} // the disk gets tables of its own
		b.data(1, 3)
		b.snapshot("2") // which this one shares
	}
	b.data(70, 4)
	if s.version != 2 && !s.extended {
		b.set(71, format.MappingEntry{L2Entry: format.ZeroPlain})
	}
	if has("compressed") {
		// 'stored' deflate data: a header of five bytes for each block, then the bytes.
		n := g.ClusterSize()
		off := b.alloc(n + 5)
		stored := append([]byte{1, byte(n), byte(n >> 8), ^byte(n), ^byte(n >> 8)}, make([]byte, n)...)
		for i := range n {
			stored[5+i] = 'c'
		}
		copy(b.bytes[off:], stored)
		b.set(3, format.MappingEntry{L2Entry: format.NewCompressedEntry(g, off, n)})
		b.set(4, format.MappingEntry{L2Entry: format.NewCompressedEntry(g, off, n)})
	}
	if has("bitmap") {
		b.bitmap("dirty")
	}
	return b.image()
}
