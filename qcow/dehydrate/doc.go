// Package dehydrate takes the metadata out of a qcow2 image, for reports of damage, and makes an image of it again. A dump holds
// every table and no guest data: neither plain clusters nor compressed ones. What comes out of [Rehydrate] is a sparse
// file of the length of the original in which a check finds what it finds in the original.
//
// # What is in a dump
//
// The first cluster, with the header, its extensions and the name of the backing file; the refcount table and its blocks; the L1
// tables of the disk and of the snapshots, and all L2 tables that they name; the snapshot table; the directory of the
// bitmaps, their tables and their bits, if the header vouches for them; the encryption header. Tables that do not
// fill their last cluster are cut where they end, because what is behind may be old guest data.
//
// Key material is not in a dump, unless [Options].KeyMaterial asks for it: of a LUKS header only the 592 bytes of its description
// are there, zeroes for the rest, and zeroes for everything when it does not begin like a LUKS header. [Options].RedactNames
// replaces the names of the backing file and the data file by as many x. Names of snapshots and bitmaps stay.
//
// In a damaged image one cluster can be both guest data and a table, as two pointers say. If the header itself names the table
// it is in the dump. If another table names it, either pointer may be the wrong one, and it is left out
// unless [Options].Ambiguous asks for it; what a check says of the dump may then differ. What cannot be followed, because
// a pointer leads between clusters or out of the file, is left out too. [Result] counts and lists all that.
//
// # Format
//
// A dump is a stream. All integers are big-endian, all checksums CRC-32C (Castagnoli). It begins with 32 bytes:
//
//	 0  8 bytes  magic "QCSIMETA"
//	 8  uint32   version, 1
//	12  uint32   flags: bit 0 key material was zeroed, bit 1 names were redacted, bit 2 something was left out;
//	             the others are 0, and a reader ignores them
//	16  uint64   length of the original in bytes
//	24  uint32   0
//	28  uint32   checksum of these 28 bytes
//
// Runs follow, in the order of their offsets, none overlapping another or exceeding the length:
//
//	 0  uint32   kind: 1 content, 2 zeroes
//	 4  uint32   length in bytes, at least 1; of content at most 1 MiB
//	 8  uint64   offset in the original
//	16           the content; nothing for zeroes
//	    uint32   checksum of the run so far
//
// Zeroes are there to tell what is zero from what is not in the dump. After the last run the stream ends with:
//
//	 0  uint32   kind 3
//	 4  uint32   0
//	 8  uint64   number of runs
//	16  uint32   checksum of the whole stream so far
package dehydrate
