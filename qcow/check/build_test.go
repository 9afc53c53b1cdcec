package check_test

import (
	"encoding/binary"
	"io"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// memory is a file in memory.
type memory []byte

func (m memory) ReadAt(p []byte, off int64) (int, error) {
	if off >= int64(len(m)) {
		return 0, io.EOF
	}
	n := copy(p, m[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (m memory) Size() (int64, error) { return int64(len(m)), nil }

// builder makes a valid image by hand: header, refcount table, one refcount block and the L1 table in clusters 0 to 3,
// everything else behind them in the order of the calls.
type builder struct {
	t     testing.TB
	h     format.Header
	bytes []byte
	l2    map[uint64]format.HostOffset // by index in the L1 table

	snapshots []byte // the snapshot table
}

const (
	tableAt = 1 // clusters
	blockAt = 2
	l1At    = 3
)

func newBuilder(t testing.TB, clusterBits, refcountOrder uint32, size uint64) *builder {
	return newBuilderOf(t, format.Geometry{ClusterBits: clusterBits, RefcountOrder: refcountOrder}, size)
}

func newBuilderOf(t testing.TB, g format.Geometry, size uint64) *builder {
	b := &builder{t: t, l2: make(map[uint64]format.HostOffset)}
	b.h = format.Header{
		Geometry:              g,
		Size:                  size,
		L1Entries:             uint32(g.L1EntriesFor(size)),
		L1Offset:              g.OffsetOf(l1At),
		RefcountTableOffset:   g.OffsetOf(tableAt),
		RefcountTableClusters: 1,
	}
	b.alloc(1)
	b.alloc(1)
	b.alloc(1)
	b.alloc(b.h.L1Bytes())
	b.put(g.OffsetOf(tableAt), uint64(g.OffsetOf(blockAt)))
	for c := range uint64(len(b.bytes)) >> g.ClusterBits { // those from before there was a block
		b.setRefcount(c, 1)
	}
	return b
}

func (b *builder) entry(off format.HostOffset) uint64  { return format.Entry(b.bytes[off:], 0) }
func (b *builder) put(off format.HostOffset, v uint64) { format.PutEntry(b.bytes[off:], 0, v) }
func (b *builder) block() []byte                       { return b.bytes[b.h.OffsetOf(blockAt):][:b.h.ClusterSize()] }

func (b *builder) refcount(cl uint64) uint64 {
	return format.Refcount(b.block(), b.h.RefcountOrder, cl)
}

func (b *builder) setRefcount(cl, v uint64)             { format.PutRefcount(b.block(), b.h.RefcountOrder, cl, v) }
func (b *builder) cluster(off format.HostOffset) uint64 { return uint64(b.h.ClusterOf(off)) }
func (b *builder) l1Entry(i uint64) format.HostOffset   { return b.h.L1Offset + format.HostOffset(i*8) }

func (b *builder) l2Entry(guest uint64) format.HostOffset {
	g := format.GuestOffset(guest << b.h.ClusterBits)
	return b.l2[b.h.L1Index(g)] + format.HostOffset(b.h.L2Index(g)*b.h.L2EntrySize())
}

// alloc appends clusters for n bytes.
func (b *builder) alloc(n uint64) format.HostOffset {
	off := format.HostOffset(len(b.bytes))
	clusters := b.h.ClustersFor(n)
	b.bytes = append(b.bytes, make([]byte, clusters<<b.h.ClusterBits)...)
	if first := b.cluster(off); first > blockAt && b.entry(b.h.OffsetOf(tableAt)) != 0 {
		for c := range clusters {
			b.setRefcount(first+c, 1)
		}
	}
	return off
}

// set sets the L2 entry of a guest cluster, making the L2 table where there is none.
func (b *builder) set(guest uint64, e format.L2Entry) {
	i := b.h.L1Index(format.GuestOffset(guest << b.h.ClusterBits))
	if b.l2[i] == 0 {
		b.l2[i] = b.alloc(1)
		b.put(b.l1Entry(i), uint64(format.NewL1Entry(b.l2[i], true)))
	}
	b.put(b.l2Entry(guest), uint64(e))
}

// setSubclusters sets the L2 entry of a guest cluster of an image with extended L2 entries.
func (b *builder) setSubclusters(guest uint64, e format.L2Entry, s format.Subclusters) {
	b.set(guest, e)
	b.put(b.l2Entry(guest)+8, uint64(s))
}

// data gives a guest cluster a host cluster.
func (b *builder) data(guest uint64) format.HostOffset {
	b.set(guest, 0) // first the L2 table
	off := format.HostOffset(guest << b.h.ClusterBits)
	if !b.h.DataFile {
		off = b.alloc(1)
	}
	b.set(guest, format.NewL2Entry(off, true))
	if b.h.ExtendedL2 {
		b.setSubclusters(guest, format.NewL2Entry(off, true), format.AllData)
	}
	return off
}

// compressed gives a guest cluster n sectors at off.
func (b *builder) compressed(guest uint64, off format.HostOffset, n uint64) {
	x := 62 - (b.h.ClusterBits - 8)
	b.set(guest, format.L2Entry(1<<62|(n-1)<<x|uint64(off))) // not by format's own encoder
}

// snapshot adds a snapshot of everything that there is.
func (b *builder) snapshot(name string) {
	share := func(entry format.HostOffset) {
		e := b.entry(entry)
		if off := format.L2Entry(e).Offset(); off != 0 {
			b.setRefcount(b.cluster(off), b.refcount(b.cluster(off))+1)
			b.put(entry, e&^(1<<63))
		}
	}
	for i, l2 := range b.l2 {
		for j := range b.h.L2Entries() {
			share(l2 + format.HostOffset(j*b.h.L2EntrySize()))
		}
		share(b.l1Entry(i))
	}
	l1 := b.alloc(b.h.L1Bytes())
	copy(b.bytes[l1:], b.bytes[b.h.L1Offset:][:b.h.L1Bytes()])

	e := make([]byte, 40+16)
	binary.BigEndian.PutUint64(e, uint64(l1))
	binary.BigEndian.PutUint32(e[8:], b.h.L1Entries)
	binary.BigEndian.PutUint16(e[12:], 1)
	binary.BigEndian.PutUint16(e[14:], uint16(len(name)))
	binary.BigEndian.PutUint32(e[36:], 16)
	b.snapshots = append(b.snapshots, make([]byte, -len(b.snapshots)&7)...)
	b.snapshots = append(append(append(b.snapshots, e...), '0'+byte(b.h.Snapshots)), name...)
	b.h.Snapshots++
}

// bitmap adds a persistent bitmap with one cluster of data.
func (b *builder) bitmap(name string) (directory, table, data format.HostOffset) {
	directory, table, data = b.alloc(1), b.alloc(1), b.alloc(1)
	e := b.bytes[directory:]
	binary.BigEndian.PutUint64(e, uint64(table))
	binary.BigEndian.PutUint32(e[8:], 1)
	e[16], e[17] = 1, 31
	binary.BigEndian.PutUint16(e[18:], uint16(len(name)))
	copy(e[24:], name)
	b.put(table, uint64(data))

	ext := make([]byte, 24)
	binary.BigEndian.PutUint32(ext, 1)
	binary.BigEndian.PutUint64(ext[8:], uint64(24+len(name)+7)&^7)
	binary.BigEndian.PutUint64(ext[16:], uint64(directory))
	b.h.Extensions = append(b.h.Extensions, format.Extension{Type: format.ExtBitmaps, Data: ext})
	b.h.Autoclear |= format.AutoclearBitmaps
	return directory, table, data
}

// image writes the snapshot table and the header, and returns the file.
func (b *builder) image() memory {
	b.t.Helper()
	if b.h.Snapshots > 0 && b.h.SnapshotsOffset == 0 {
		b.h.SnapshotsOffset = b.alloc(uint64(len(b.snapshots)))
		copy(b.bytes[b.h.SnapshotsOffset:], b.snapshots)
	}
	if uint64(len(b.bytes))>>b.h.ClusterBits > b.h.BlockEntries() {
		b.t.Fatalf("%d clusters are more than one refcount block describes", len(b.bytes)>>b.h.ClusterBits)
	}
	h, err := b.h.Encode()
	if err != nil {
		b.t.Fatal(err)
	}
	clear(b.bytes[:b.h.ClusterSize()])
	copy(b.bytes, h)
	return b.bytes
}
