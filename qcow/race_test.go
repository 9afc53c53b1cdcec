//go:build race

package qcow_test

// raced says that the race detector is on. It finds nothing in an enumeration, which runs in one goroutine, and makes it ten times slower.
const raced = true
