// Package judge says what a power cut or a kill in the middle of an operation on a qcow2 image leaves.
//
// A [Trial] is what was recorded of an operation: the images before it, and all that it did to their files. [Judge] draws
// from the states that [storage.GroupCrashStates] enumerates with its default options, as it does for the engine's own crash
// tests, and holds each against three things:
//
//   - Is it in order? qemu-img check and package check say so, independently of each other.
//   - Is it right? QEMU reads the disk and every snapshot. What is allowed is the trial's [Rule].
//   - Does it stay right? QEMU writes to the disk, without a repair before, as a virtual machine that starts after the
//     power cut does. The snapshots, and what was not written, must not change by it.
//
// It does not know who did the operation: QEMU or anybody else.
package judge
