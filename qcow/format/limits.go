package format

// Limits of the format. Where the specification leaves a size open the bound is QEMU's (block/qcow2.h), so that
// every image accepted here is accepted there.
const (
	Magic = 0x514649fb // "QFI\xfb", the first four bytes of every image

	MinClusterBits           = 9  // 512 B
	MaxClusterBits           = 21 // 2 MiB
	MinExtendedL2ClusterBits = 14 // 16 KiB: a subcluster has at least a sector

	DefaultClusterBits   = 16 // 64 KiB
	DefaultRefcountOrder = 4  // 16-bit refcounts, the only ones of version 2
	MaxRefcountOrder     = 6  // 64-bit refcounts

	MaxL1Bytes            = 32 << 20 // of the active L1 table and of each snapshot's
	MaxRefcountTableBytes = 8 << 20
	MaxBackingName        = 1023 // bytes

	MaxSnapshots          = 65536
	MaxSnapshotTableBytes = 64 << 20
	MaxSnapshotExtra      = 1024 // bytes of extra data of a snapshot

	MaxBitmaps              = 65535
	MaxBitmapDirectoryBytes = MaxBitmaps * 1024
	MaxBitmapTableEntries   = 1 << 27
	MaxBitmapDataBytes      = 512 << 20 // of the clusters that a bitmap table points to
	MaxBitmapName           = 1023      // bytes
	MinBitmapGranularity    = 9         // log2 of the bytes that a bit stands for
	MaxBitmapGranularity    = 31

	// MaxHostOffset bounds every host offset: bits 9 to 55 of a table entry.
	MaxHostOffset HostOffset = 1 << 56

	// SectorSize is the unit of a virtual disk's size in bytes, and the largest write that a disk is taken to do
	// atomically.
	SectorSize = 512
)
