// Package fuse attaches exports through the kernel's FUSE and loop drivers. It is the fallback for kernels without an NBD
// client.
//
// # How a device comes about
//
//	pod I/O -> /dev/loopN -> file of a FUSE mount -> this process -> nbdexport.Backend
//
// Every device has a FUSE mount of its own, which holds one file. The mount is never put anywhere in the tree of
// directories: there is a file descriptor for it in this process, and there is the file, which the loop device has
// open. So nobody can read a volume around its device, nothing that walks over the node's mounts can hang on it, and
// nothing is left to clean up: when both are closed the mount goes away, the kernel ends the connection, and the
// server returns. When this process dies, the kernel ends the connection too.
//
// The file is named by its [attach.Tag], escaped as in a URL. The kernel shows it in
// /sys/block/loopN/loop/backing_file, and that is how List and Detach, in this process or a later one, know their
// devices; losetup shows it to people.
//
// What waits for the server, which is opening the file, configuring the loop device, flushing and clearing it, is done by
// assistant processes. Who uses this package keeps to the same rule: no I/O from this process to a device that it
// serves. Were the process killed at such a moment, it could not die.
//
// # Data path
//
// The loop device uses direct I/O, and the file allows nothing else (FOPEN_DIRECT_IO): a page is cached once, above
// the loop device, by the filesystem on it. Requests arrive here side by side, up to 1 MiB each. Attributes are not
// cached, so that a grown file is seen at once.
//
// # What becomes of requests
//
//	read, write    ReadAt, WriteAt
//	flush, FUA     fsync of the file: Flush
//	discard        punching a hole: WriteZeroes that may unmap. The loop driver also does so for requests to
//	               write zeroes, and those must become zeroes to the last byte, which Discard does not promise.
//	write zeroes   as above or, when the space is to be kept, FALLOC_FL_ZERO_RANGE: WriteZeroes that may not unmap
//
// An error that matches ENOSPC reaches the filesystem as ENOSPC, every other one as EIO.
//
// # Limits
//
//   - The death of this process is an I/O error for whatever is mounted: the kernel drops the connection with it, and there
//     is no handing it over. Such volumes are to be unstaged and staged again. (attach/nbd holds the I/O instead.)
//   - A flush holds back writes that arrive while it runs, and so does a discard: the kernel takes the file's lock for both.
//   - A discard that covers part of a cluster writes zeroes there. The granularity that the device announces, the backend's
//     preferred block, makes filesystems leave such pieces out.
//   - Under extreme memory pressure the kernel may wait for this process to write dirty pages of its own device, while the
//     process waits for memory. Give it a memory limit with room, and no swap on such a device.
//   - The data passes through two drivers: more CPU per request than attach/nbd.
//
// It takes Linux 5.8 (LOOP_CONFIGURE), the drivers fuse and loop, and CAP_SYS_ADMIN; in a container also the host's /dev.
package fuse
