package format

// Limits of the format. Where the specification leaves a size open the bound is QEMU's (block/qcow2.h), so that
// every image accepted here is accepted there.
const (
	Magic = 0x514649fb // "QFI\xfb", the first four bytes of every image

	MinClusterBits = 9  // 512 B
	MaxClusterBits = 21 // 2 MiB

	DefaultClusterBits   = 16 // 64 KiB
	DefaultRefcountOrder = 4  // 16-bit refcounts
	MaxRefcountOrder     = 6  // 64-bit refcounts

	MaxL1Bytes            = 32 << 20 // of the active L1 table and of each snapshot's
	MaxRefcountTableBytes = 8 << 20
	MaxSnapshots          = 65536

	// MaxHostOffset bounds every host offset: bits 9 to 55 of a table entry.
	MaxHostOffset HostOffset = 1 << 56

	// SectorSize is the unit of a virtual disk's size in bytes, and the largest write that a disk is taken to do
	// atomically.
	SectorSize = 512
)
