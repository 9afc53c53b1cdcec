//go:build !race

package qcow_test

const raced = false
