// Package attach turns exports into block devices of this node's kernel.
//
// An [Attacher] is one way of doing that: package attach/nbd hands the kernel's NBD client a socket, package
// attach/fuse puts a loop device over a file of a private FUSE mount. [Select] chooses between them. Package
// attach/attachfake is an attacher without a kernel, for tests of what stands above; package attach/attachtest is the
// suite that every attacher passes.
//
// # Whose device is it
//
// Processes come and go, devices stay. So nothing about a device is kept in memory alone: every device carries in the
// kernel a [Tag], which names its owner (the driver's name, so that two drivers on a node never touch each other's
// devices) and its volume, and List and Detach go by the tags that they read back. A process that starts finds what
// an earlier one left behind, with Device.Served false, and can detach it.
//
// # One operation at a time
//
// An operation on a volume for which another one is under way fails at once with [ErrBusy]; operations on different
// volumes run side by side. Callers that want to wait instead have queues of their own.
//
// # What the kernel sees
//
// [Request.Geometry] derives the size, the block size and the read-only flag of the device from the backend, equally
// for all attachers, so that a filesystem made through one of them mounts through the other.
package attach
