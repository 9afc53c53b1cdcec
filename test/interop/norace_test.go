//go:build !race

package interop_test

const stride = 1
