package dehydrate

import (
	"context"
	"encoding/binary"
	"slices"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// Where header fields are.
const (
	backingNameAt  = 8
	backingSizeAt  = 16
	clusterBitsAt  = 20
	virtualSizeAt  = 24
	l1EntriesAt    = 36
	l1OffsetAt     = 40
	refTableAt     = 48
	refClustersAt  = 56
	snapshotsAt    = 60
	snapshotsOffAt = 64
	fixedSize2     = 72 // of a version 2 header
)

// header holds the pointers of a header as they are in the file, usable or not.
type header struct {
	decoded            *format.Header // nil when it cannot be decoded, its pointers aside
	l1, l1Bytes        uint64
	refTable, refBytes uint64
	snapshots          uint32
	snapshotTable      uint64
}

// readHeader adds the first cluster.
func (d *dehydrator) readHeader(context.Context) error {
	b := make([]byte, min(d.size, 1<<format.MaxClusterBits))
	if err := d.read("header", b, 0); err != nil {
		return err
	}
	if len(b) < fixedSize2 || binary.BigEndian.Uint32(b) != format.Magic {
		return format.Corruptf("header", 0, "not a qcow2 image: wrong magic, or only %d bytes", len(b))
	}
	if v := binary.BigEndian.Uint32(b[4:]); v != 2 && v != 3 {
		return format.Unsupportedf("header", 4, "version %d", v)
	}
	bits := binary.BigEndian.Uint32(b[clusterBitsAt:])
	if bits < format.MinClusterBits || bits > format.MaxClusterBits {
		d.leftOut("everything but the header", 0, "cluster_bits %d", bits)
		d.ranges.add(0, min(d.size, format.SectorSize))
		d.redactRaw(b[:min(len(b), format.SectorSize)])
		return nil
	}
	b = b[:min(uint64(len(b)), 1<<bits)]
	d.header = header{
		l1:            binary.BigEndian.Uint64(b[l1OffsetAt:]),
		l1Bytes:       uint64(binary.BigEndian.Uint32(b[l1EntriesAt:])) * format.EntrySize,
		refTable:      binary.BigEndian.Uint64(b[refTableAt:]),
		refBytes:      uint64(binary.BigEndian.Uint32(b[refClustersAt:])) << bits,
		snapshots:     binary.BigEndian.Uint32(b[snapshotsAt:]),
		snapshotTable: binary.BigEndian.Uint64(b[snapshotsOffAt:]),
	}
	d.ClusterBits = bits
	h, err := format.DecodeHeader(withoutPointers(b, bits))
	if err != nil {
		d.leftOut("header extensions", 0, "%v", err)
		d.ExtendedL2, d.DataFile = rawFeatures(b)
		d.ranges.add(0, uint64(len(b)))
		d.redactRaw(b)
		return nil
	}
	d.header.decoded, d.Geometry = h, h.Geometry
	d.ranges.add(0, uint64(len(b)))
	d.redactNames(b, h)
	return nil
}

// withoutPointers returns a header that can be decoded however wrong the size and the pointers to tables are.
func withoutPointers(b []byte, bits uint32) []byte {
	b = slices.Clone(b)
	binary.BigEndian.PutUint64(b[virtualSizeAt:], 0)
	binary.BigEndian.PutUint32(b[l1EntriesAt:], 0)
	binary.BigEndian.PutUint64(b[refTableAt:], 1<<bits)
	binary.BigEndian.PutUint32(b[refClustersAt:], 1)
	binary.BigEndian.PutUint32(b[snapshotsAt:], 0)
	return b
}

// rawFeatures returns what the incompatible features of a header say of L2 entries.
func rawFeatures(b []byte) (extendedL2, dataFile bool) {
	if binary.BigEndian.Uint32(b[4:]) < 3 || len(b) < format.IncompatibleOffset+8 {
		return false, false
	}
	features := binary.BigEndian.Uint64(b[format.IncompatibleOffset:])
	return features&format.IncompatExtendedL2 != 0, features&format.IncompatDataFile != 0
}
