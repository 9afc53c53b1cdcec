// Package repair makes damaged qcow2 images consistent again. It works on the file, below the engine, which uses it for images
// that lazy refcounts left dirty; it shares nothing with package check, which judges what it has done.
//
// # What is repaired
//
// Mode [All] leaves an image in which a check finds nothing. It rebuilds the refcounts from nothing, whatever the old ones are:
// they may be too low or too high, outside the file, on top of something else, or gone. In the tables of the disk and of
// the snapshots:
//
//   - COPIED becomes what the refcount says, in the tables of the active disk; in those of snapshots it means nothing.
//   - Reserved bits, flags without a host cluster, zero flags in version 2, and compressed ranges that exceed the file lose
//     what is wrong with them. What they mean is not in doubt.
//   - An entry that points between clusters, outside the file or at a header can't be followed. Guest clusters that had data
//     there read as zeroes from now on, in version 2, which has no such clusters, as unallocated; the same goes for all that an
//     L1 entry mapped. Each is reported ([ClusterLost], [TableLost]): this is data that was lost before. What an entry says
//     of zeroes, or of subclusters without data, stays. In an image with an external data file nothing is lost but L2 tables,
//     because the place of a cluster there is its place on the disk; a raw data file makes up for these too. But where snapshots, or
//     entries of an image that names no data file, speak against the mark of such a file, the repair fails.
//   - A table on which another structure lies, or which the file cuts off, moves: to a copy that is its own. So guest data that lies
//     on metadata stays where it is, which matters when its place is part of its key, and each has the bytes that both had.
//   - An L2 table that the active L1 table names twice is copied, so that each part of the disk has its own.
//   - Guest data that is referred to twice is shared: its refcount is 2, COPIED clear. Where the refcount is too narrow for that,
//     and the data not encrypted, it is copied. Where nothing helps the repair fails and names the cluster.
//   - A snapshot whose L1 table can't be found is dropped, and so are all entries of the snapshot table from the first one on
//     that can't be decoded ([SnapshotDropped]). Entries without what version 3 requires are completed.
//   - Bitmaps are dropped, by clearing the bit that vouches for them, when anything about them is wrong, when another structure lies
//     on them, or when a guest cluster was lost: a bitmap that misses a change makes a wrong backup, none makes a full one.
//
// The marks for dirty and corrupt are cleared, and autoclear bits that are not known, as every writer has to. What could
// be read before can be read after, bit by bit; what could not is either in the report or can be now.
//
// # Leaks
//
// Mode [Leaks] only lowers refcounts that exceed the references, and gives the clusters back that become free. If nothing else is
// wrong the result is that of mode All; COPIED is set where a refcount becomes 1. If something is, only the refcounts change:
//
//   - Refcounts that are too low stay so. Lowering others does no harm to them.
//   - If anything cannot be followed, nothing is changed at all, and the leaks are reported as kept: the clusters that seem leaked
//     may be what the lost pointer meant, and somebody may know how to find that out. Mode All is how to give it up.
//   - If the refcounts must be rebuilt, because what they are stored in is damaged or a cluster in use has refcount 0, it fails.
//
// # Crashes
//
// Nothing that the header reaches is ever changed. Everything new (refcount table and blocks, copies of all tables in which an
// entry changes) is built in clusters to which nothing refers, neither in what is made nor in what was, nor any pointer
// that leads out of the file; those inside the file come first. Stored refcounts play no part in that. Then, between two
// syncs, one write inside the first 512-byte sector switches to it. So a crash leaves the image as it was or repaired. The same
// holds for errors: a full disk leaves the image as it was, and its length. Only then is the space of what became free given
// back, and the end of the file cut off.
//
// # Cost
//
// L2 tables are read twice, however many L1 entries share them; guest data is not read at all, unless it is copied. Memory is
// four bytes and one stored refcount for each cluster that is in use, in pages of 1024 clusters or fewer, and some tens of
// bytes for each L2 table; [Options].MaxMemory bounds it, and 256 MiB suffice for every file of less than 1 GiB. A repair that would make
// more than the image is, 64 MiB aside, is refused.
package repair
