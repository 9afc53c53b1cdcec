//go:build !race

package qcow_test

const stride = 1
