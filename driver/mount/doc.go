// Package mount makes, mounts, grows and measures the filesystems of volumes, and guards the one operation that
// destroys data: making one.
//
// # Mounter and Host
//
// [Mounter] is what the CSI services use. [Host] is the real one; mountfake has one in memory, and mounttest a suite
// that both pass. A Mounter remembers nothing: what is mounted it reads from the kernel's mount table at every call,
// so that a plugin that was killed finds everything as it left it, and repeats any step safely.
//
// # The format guard
//
// [EnsureFilesystem] is the only caller of Format. A device that shows no filesystem is not a blank device: reads may
// fail (blkid answers "nothing found", exit code 2, to a device of which it could not read one byte), the wrong image
// may be behind it, or a signature may be damaged in front of intact data. So mkfs takes three witnesses that agree:
//
//   - our own record says that this volume was never formatted,
//   - the engine says that no cluster of its image was ever allocated,
//   - the device answers every read and shows zeroes wherever a signature could stand.
//
// The record goes from never formatted to formatting, durably, before mkfs begins, and to formatted before anything
// is mounted. Hence the invariant on which a second attempt rests: a volume whose record says formatting was never
// mounted and never published, so what an interrupted mkfs left behind is ours alone and may be overwritten. The same
// holds for raw block volumes: [EnsureRawBlock] records them before they are published, and no filesystem is ever
// made over them.
//
// Nothing here erases signatures (wipefs) or repairs filesystems.
//
// # Why programs, and how they run
//
// The plugin serves the device whose filesystem it mounts. A thread of the plugin that waited in the kernel for that
// device could neither be killed nor let go of the sockets that the kernel needs to see closed. So what waits for a
// device uninterruptibly (mount, umount, mkfs, resize) runs in processes of its own; what happens in the plugin
// itself only looks at tables or reads through the page cache, where a signal ends the wait.
//
// Every program runs without a shell, with LC_ALL=C and nothing else of the plugin's environment but PATH. It is
// killed, with what it started, when the context ends, and by the kernel when the plugin dies: a forgotten mkfs would
// go on writing while a new plugin makes its own. A call returns only when its program is gone, even if that takes
// longer than the context allows. And mkfs holds its device exclusively, so that a second one cannot begin.
//
// k8s.io/mount-utils supplies command lines and the list of errors that mean a dead mount. Its mounters are not used:
// both run programs without a context, and New, unlike NewWithoutSystemd, puts mount(8) into a systemd scope, which
// is for filesystems with a daemon of their own and needs the host's systemd within the plugin's container. Neither
// is its parser of the mount table: one mount with an empty source anywhere on the node makes it fail altogether. Its
// SafeFormatAndMount and ResizeFs take blkid's word for blank, and the former formats on it.
package mount
