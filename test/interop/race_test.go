//go:build race

package interop_test

// The images of the matrix are worked on one request at a time, where the race detector finds little: it sees every eighth.
const stride = 8
