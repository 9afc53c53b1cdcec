//go:build race

package qcow_test

// stride is how many cases of an enumeration there are for one that is run. Enumerations run in one goroutine, where the race detector
// finds nothing and makes them ten times slower.
const stride = 25
