// Package nbd attaches exports through the kernel's NBD client.
//
// # How a device comes about
//
//	pod I/O -> /dev/nbdN -> socket pair -> nbdexport.ServeTransmission, in this process -> nbdexport.Backend
//
// Devices are set up by generic netlink (family "nbd", include/uapi/linux/nbd-netlink.h). The kernel chooses the
// number: looking for a free device oneself is a race with every other user of NBD on the node. It gets one end of a
// socket pair, and the device's [attach.Tag] as the "backend identifier", which it shows in /sys/block/nbdN/backend:
// that is how List and Detach, in this process or a later one, know their devices and leave those of others alone.
//
// There is one connection for each device, on purpose. With several, the kernel sends a request again on another
// connection while the first try may still be under way here, and a late write could overwrite a newer one.
//
// # When the connection is lost
//
// It is lost when this process dies, but also when the kernel gives up on it: a request was not answered within
// the request timeout, or the kernel had no memory to send one. The kernel then holds requests back for the
// dead-connection timeout, and fails them after that.
//
// While this process lives it reconnects: as soon as every request of the old connection has ended, so that none is
// overtaken by its own repetition, it hands the kernel a new socket. If that does not work within the dead-connection
// timeout, it disconnects the device, so that nothing waits for it for ever. A request that was under way is sent
// again when its request timeout has passed: that is how long I/O stalls.
//
// # Detaching
//
// Detach holds the device exclusively while it works, which fails when the device is mounted or part of another
// device, in any namespace. A process that merely has the device open goes unnoticed, and gets errors from then on:
// the kernel does not say. The device is flushed, then disconnected, both by an assistant process, because it means
// waiting for this one. Detach returns when the kernel has dropped the device and the last request has ended.
//
// A device that has lost its server cannot be opened without waiting for it. So there the mount table that this process
// sees, and the device's holders, tell whether it is in use.
//
// # Limits
//
// It takes Linux 5.14 (backend identifiers) and CAP_SYS_ADMIN. The netlink family exists in the initial network
// namespace only, so a pod needs host networking, and the host's /dev, where the nodes appear. The kernel reads the
// partition table of a device when it is first opened, unless the module was loaded with max_part=0, as Probe does
// when it loads the module.
package nbd
