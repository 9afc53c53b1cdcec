// Package check judges whether a qcow2 image is consistent. It shares with the engine only package format, so that it can
// serve as an oracle for it: what the engine believes about its own image plays no part here.
//
// # What is checked
//
// A host cluster is used as often as something points at it: the header, the tables that the header points at, refcount
// blocks, L2 tables, guest clusters, and likewise whatever internal snapshots, persistent bitmaps and an encryption
// header use. [Check] counts these references and compares them with the refcounts that the image stores. It also looks
// at every entry on the way: reserved bits, alignment, whether it points inside the file, whether its COPIED
// flag agrees with the stored refcount, and whether a cluster of metadata has a second owner.
//
// Extended L2 entries must agree with their subclusters. With an external data file guest clusters have no refcounts; their
// entries must have COPIED and point to where the guest sees the cluster. Incompatible features that are not known here
// are refused with format.ErrUnsupported.
//
// Guest data is never read, nor what is in an encryption header, and no file but the image is looked at.
//
// # Judgement
//
// A finding is either a leak (space is lost, nothing else) or a corruption (data is lost, or the next writes may lose
// it). The judgement is that of qemu-img check: an image is clean, has leaks or is corrupt here when it is there.
// The package is stricter only where this is said:
//
//   - A refcount above 0 of a cluster past the end of the file is a leak. QEMU does not look there, but its allocator
//     will pass over the cluster when the file has grown that far.
//   - A COPIED flag in an entry that has no cluster is a corruption. QEMU ignores it in L2 tables; no refcount is 1 there.
//   - Sharing a cluster is legal for guest data, and for L2 tables among L1 tables. Every other cluster of metadata has
//     one owner. QEMU takes this to be so only for refcount blocks and otherwise accepts any number of owners when
//     the refcount agrees.
//   - Every cluster that is referred to must start inside the file. QEMU lets a table that is not a whole number of
//     clusters exceed the file by less than a cluster, and reads zeroes there.
//   - The zero flag of an L2 entry is a reserved bit in version 2 and with extended L2 entries. QEMU ignores it with the
//     latter; in version 2 it lets the check pass and fails to read the cluster.
//   - A cluster of an external data file that is not at its guest offset is a corruption. QEMU lets the check pass and fails
//     to read the cluster.
//   - A bitmap must have a name.
//   - What makes qemu-img check give up (exit status 1) because of the contents of a table, such as a snapshot table that
//     cannot be decoded or a misaligned refcount block, is a corruption like any other.
//
// # Cost
//
// L2 tables are read once each, however many L1 entries and snapshots share them. Memory is four bytes plus one stored
// refcount for each cluster of the file that is in use, in pages of 1024 clusters or fewer, so that an image that only
// claims to be large costs little; [Options].MaxMemory bounds it. The context is consulted between tables.
package check
