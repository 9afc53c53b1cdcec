// Package format holds the on-disk structures of a qcow2 image: the header and its extensions, the entries of
// the L1, L2 and refcount tables, and the limits that bound them. It follows QEMU's docs/interop/qcow2.txt ("the
// specification" in the comments below), whose terms it uses.
//
// The package is pure: it reads and writes byte slices and never a file. Nothing it decodes is trusted: every
// decoder checks what it returns, so that a caller can index tables with decoded values once it has compared them
// with the length of the real file.
//
// Three integer types keep the address spaces apart. A [GuestOffset] is a byte of the virtual disk, a [HostOffset]
// a byte of the image file, a [Cluster] the number of a host cluster (host offset divided by the cluster size).
// They convert into each other only through a [Geometry].
package format
