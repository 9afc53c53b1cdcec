// Command qemucrash shows what a power cut in the middle of an operation leaves of a qcow2 image that QEMU works on: how
// many of the possible states does qemu-img check call corrupt, and in how many is data wrong?
//
//	go run ./test/qemucrash [-states 200] [-seed 1] [-operation snapshot-delete] [-keep DIR] [-json]
//
// QEMU's own tools do each operation on an image with some data and two internal snapshots (requests that free clusters
// have an image without snapshots, which would keep them), and package recording logs what they do to the file. Package judge
// draws states from what the engine's own crash tests enumerate of such a log, with the same options: between two syncs any
// subset of what was written, punched and truncated, writes torn between sectors, and what a kill leaves. Each is checked with
// qemu-img check and with the engine's independent checker, read with qemu-img convert, written to, and read again.
//
// The image comes in two shapes: with QEMU's default cluster size, small enough to follow a log by eye; and with small clusters,
// so that an operation concerns many tables, and an L1 table fills more than one sector.
//
// For a seed and a version of QEMU everything is repeatable, as far as QEMU itself does things in the same order. A recording
// from which the final file does not result is an error, never a result.
//
// It needs qemu-img, qemu-io and gcc.
package main
