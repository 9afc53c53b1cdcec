// Package format holds the on-disk structures of a qcow2 image of version 2 or 3: the header and its extensions, the
// entries of the L1, L2 and refcount tables, the tables of snapshots and bitmaps, and the limits that bound them. It
// follows QEMU's docs/interop/qcow2.txt ("the specification" in the comments below), whose terms it uses.
//
// The package is pure: it reads and writes byte slices and never a file. Nothing it decodes is trusted: every
// decoder checks what it returns, so that a caller can index tables with decoded values once it has compared them
// with the length of the real file.
//
// Three integer types keep the address spaces apart. A [GuestOffset] is a byte of the virtual disk, a [HostOffset]
// a byte of the image file, a [Cluster] the number of a host cluster (host offset divided by the cluster size).
// They convert into each other only through a [Geometry].
//
// An image with extended L2 entries has twice as wide ones. A [MappingEntry] is either; [Geometry.CheckEntry] says whether
// it is sound, [Geometry.Kind] what it makes of a subcluster.
//
// The header of an image in use changes by [Header.Rewrite], in steps none of which a crash can make unreadable.
package format
