// Package volume tests everything below the driver in one piece, on real data: an image, the engine, an attacher, a block
// device of the kernel, a filesystem on it. Its tests run on this machine, by attach/fuse or what the kernel has, and
// package vm has them run in a guest by attach/nbd.
package volume
