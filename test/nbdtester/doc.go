// Package nbdtester runs nbd-tester-client, the test program of the project that made the protocol, against package
// nbdexport: the parts of its test suite (tests/run/simple_test) that are about a server, and not about nbd-server.
//
// It needs QCOW_CSI_LONG=1, Debian's archive and gcc: the source package nbd and the headers of its libraries are fetched to
// a temporary directory, by apt with a configuration of its own, and nothing is installed.
package nbdtester
