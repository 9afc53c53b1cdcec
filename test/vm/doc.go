// Package vm runs tests in a guest whose kernel has what this machine's may lack: NBD, above all. The guest is User
// Mode Linux (Debian's package user-mode-linux): a kernel that is an ordinary process, needs no privileges or
// virtualization, and boots in a second.
//
// A test of this package calls [Run] with a package whose tests are for guests. Run builds their binary and boots a
// guest whose root is the host's, read-only. Process 1 is the command vm/init: it mounts the usual places, loads
// modules and runs the binary. Host and guest share one directory, which is a temporary directory of the test and the
// only part of the host that a guest can write to; package vm/handover names the files in it.
//
// The binary is built with the tag "vmguest". Tests that make sense in a guest only have it, so that nothing runs
// them on a host by accident. In a guest they are root and may do as they like: it is thrown away. It has one CPU,
// and starts processes slowly, tens of milliseconds each.
package vm
