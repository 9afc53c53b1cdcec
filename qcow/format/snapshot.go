package format

import (
	"encoding/binary"
	"slices"
)

// An entry of the snapshot table (specification, "Snapshots"): fixed fields, extra data, ID and name. It starts at a
// multiple of 8 bytes from the start of the table.
const (
	snapshotFixed = 40
	snapshotAlign = 8

	// Extra data begins with these fields, each of which an entry may lack together with what follows it.
	snapshotVMState  = 8  // end of the size of the VM state, in 64 bits
	snapshotDiskSize = 16 // end of the virtual size; version 3 requires it
	snapshotICount   = 24 // end of the instruction count

	noICount = ^uint64(0)
)

// Snapshot is an entry of the snapshot table.
type Snapshot struct {
	L1Offset    HostOffset // of the snapshot's L1 table
	L1Entries   uint32
	ID          string // unique in the image, a number in practice
	Name        string
	Seconds     uint32 // time of the snapshot since the epoch
	Nanoseconds uint32 // the fraction of it
	VMClock     uint64 // time that the guest had been running for, in nanoseconds
	VMStateSize uint64 // bytes of VM state, which follow the virtual disk; 0: none
	DiskSize    uint64 // virtual size in bytes; 0 in an incomplete entry, where it is the image's
	ICount      uint64 // instructions that the guest had executed; ^0: not recorded
	Extra       []byte // extra data behind these fields, kept as it is
	Incomplete  bool   // the entry was decoded from one without DiskSize, as only version 2 has it
}

// DecodeSnapshots decodes a snapshot table of n entries. It wants the bytes from the start of the table on as far as they
// can belong to it: to the end of the file, at most MaxSnapshotTableBytes. used is the size of the table in bytes. It checks the
// sizes, not what they point to. It fails with ErrCorrupt and the entries before the one that is wrong;
// the offset in the error counts from the start of the table.
func DecodeSnapshots(b []byte, n uint32) (list []Snapshot, used uint64, err error) {
	if n > MaxSnapshots {
		return nil, 0, Corruptf("snapshot table", 0, "%d snapshots exceed %d", n, MaxSnapshots)
	}
	b = b[:min(len(b), MaxSnapshotTableBytes)]
	for i := range n {
		at := (used + snapshotAlign - 1) &^ (snapshotAlign - 1)
		if at > uint64(len(b)) {
			return list, used, Corruptf("snapshot table", HostOffset(at), "entry %d is missing", i)
		}
		s, size, err := decodeSnapshot(b[at:], i, at)
		if err != nil {
			return list, used, err
		}
		list, used = append(list, s), at+size
	}
	return list, used, nil
}

// decodeSnapshot decodes entry i, which b begins with and which is at the offset `at` of the table.
func decodeSnapshot(b []byte, i uint32, at uint64) (s Snapshot, size uint64, err error) {
	if len(b) < snapshotFixed {
		return s, 0, Corruptf("snapshot table", HostOffset(at), "entry %d is cut off", i)
	}
	id, name := uint64(binary.BigEndian.Uint16(b[12:])), uint64(binary.BigEndian.Uint16(b[14:]))
	extra := uint64(binary.BigEndian.Uint32(b[36:]))
	size = snapshotFixed + extra + id + name
	switch {
	case extra > MaxSnapshotExtra:
		return s, 0, Corruptf("snapshot table", HostOffset(at), "entry %d has %d bytes of extra data, more than %d", i, extra, MaxSnapshotExtra)
	case size > uint64(len(b)):
		return s, 0, Corruptf("snapshot table", HostOffset(at), "entry %d of %d bytes is cut off", i, size)
	}
	s = Snapshot{
		L1Offset:    HostOffset(binary.BigEndian.Uint64(b[0:])),
		L1Entries:   binary.BigEndian.Uint32(b[8:]),
		Seconds:     binary.BigEndian.Uint32(b[16:]),
		Nanoseconds: binary.BigEndian.Uint32(b[20:]),
		VMClock:     binary.BigEndian.Uint64(b[24:]),
		VMStateSize: uint64(binary.BigEndian.Uint32(b[32:])),
		ICount:      noICount,
		Incomplete:  extra < snapshotDiskSize,
	}
	x := b[snapshotFixed:][:extra]
	if extra >= snapshotVMState {
		s.VMStateSize = binary.BigEndian.Uint64(x[0:])
	}
	if extra >= snapshotDiskSize {
		s.DiskSize = binary.BigEndian.Uint64(x[8:])
	}
	if extra >= snapshotICount {
		s.ICount = binary.BigEndian.Uint64(x[16:])
	}
	if extra > snapshotICount {
		s.Extra = slices.Clone(x[snapshotICount:])
	}
	b = b[snapshotFixed+extra:]
	s.ID, s.Name = string(b[:id]), string(b[id:][:name])
	return s, size, nil
}

// EncodeSnapshots returns the snapshot table, in which every entry is complete: the caller has set the DiskSize of those
// that were not. The caller also keeps to the limits: MaxSnapshots, 65535 bytes of an ID or a name, MaxSnapshotExtra with 24
// bytes for the fields.
func EncodeSnapshots(list []Snapshot) []byte {
	var b []byte
	for _, s := range list {
		b = append(b, make([]byte, -len(b)&(snapshotAlign-1))...)
		b = binary.BigEndian.AppendUint64(b, uint64(s.L1Offset))
		b = binary.BigEndian.AppendUint32(b, s.L1Entries)
		b = binary.BigEndian.AppendUint16(b, uint16(len(s.ID)))
		b = binary.BigEndian.AppendUint16(b, uint16(len(s.Name)))
		b = binary.BigEndian.AppendUint32(b, s.Seconds)
		b = binary.BigEndian.AppendUint32(b, s.Nanoseconds)
		b = binary.BigEndian.AppendUint64(b, s.VMClock)
		b = binary.BigEndian.AppendUint32(b, uint32(min(s.VMStateSize, 1<<32-1)))
		b = binary.BigEndian.AppendUint32(b, uint32(snapshotICount+len(s.Extra)))
		b = binary.BigEndian.AppendUint64(b, s.VMStateSize)
		b = binary.BigEndian.AppendUint64(b, s.DiskSize)
		b = binary.BigEndian.AppendUint64(b, s.ICount)
		b = append(b, s.Extra...)
		b = append(b, s.ID...)
		b = append(b, s.Name...)
	}
	return b
}
