package main

import (
	"reflect"
	"slices"
	"testing"
)

// TestImageMeasureIsQEMUs compares with what qemu-img measures.
func TestImageMeasureIsQEMUs(t *testing.T) {
	t.Chdir(t.TempDir())
	rawDisk(t, "raw", 5<<20)
	mustQEMU(t, "convert", "-f", "raw", "-O", "qcow2", "raw", "disk")
	qemuIO(t, "disk", "write -z 1M 1M", "write -P 1 3M 300k")
	mustQEMU(t, "create", "-q", "-f", "qcow2", "-b", "disk", "-F", "qcow2", "overlay", "7M")
	qemuIO(t, "overlay", "write -P 1 6M 64k", "write -P 1 100k 2M")
	mustQEMU(t, "create", "-q", "-f", "qcow2", "-o", "compat=0.10", "old", "7M")
	mustQEMU(t, "convert", "-f", "raw", "-O", "qcow2", "raw", "bitmaps")
	mustQEMU(t, "bitmap", "--add", "-g", "512", "bitmaps", "fine")
	mustQEMU(t, "bitmap", "--add", "bitmaps", "coarse")
	for _, args := range [][]string{
		{"--size", "1G"},
		{"--size", "0"},
		{"--size", "1G", "-o", "cluster_size=512"},
		{"--size", "3T", "-o", "cluster_size=2M,refcount_bits=64"},
		{"--size", "1G", "-o", "preallocation=full"},
		{"--size", "1G", "-o", "preallocation=metadata"},
		{"--size", "1G", "-o", "extended_l2=on"},
		{"-f", "raw", "raw"},
		{"-f", "raw", "-o", "cluster_size=4k", "raw"},
		{"-f", "qcow2", "disk"},
		{"-f", "qcow2", "overlay"},
		{"-f", "qcow2", "old"},
		{"-f", "qcow2", "-o", "compat=0.10", "disk"},
		{"-f", "qcow2", "bitmaps"},
		{"-f", "qcow2", "-o", "cluster_size=4k", "bitmaps"},
		{"-f", "qcow2", "-o", "backing_file=base,backing_fmt=raw", "disk"},
		{"-f", "qcow2", "-O", "raw", "overlay"},
		{"--size", "5M", "-O", "raw"},
	} {
		theirs := append([]string{"measure", "--output=json"}, args...)
		if !slices.Contains(args, "-O") { // where QEMU's default is raw
			theirs = append(theirs, "-O", "qcow2")
		}
		var got, want any
		decode(t, mustQEMU(t, theirs...), &want)
		decode(t, mustImage(t, append([]string{"measure", "--output=json"}, args...)...), &got)
		if !reflect.DeepEqual(got, want) {
			t.Errorf("measure %q: %v, want %v", args, got, want)
		}
	}
	if got, want := mustImage(t, "measure", "bitmaps"), mustQEMU(t, "measure", "-O", "qcow2", "-f", "qcow2", "bitmaps"); got != want {
		t.Errorf("%q, want %q", got, want)
	}
	// The size of a LUKS header does not depend on a passphrase; 2 MiB is QEMU's.
	var plain, luks imageMeasure
	decode(t, mustImage(t, "measure", "--output=json", "--size", "1G"), &plain)
	decode(t, mustImage(t, "measure", "--output=json", "--size", "1G", "-o", "encrypt.format=luks"), &luks)
	if d := luks.Required - plain.Required; d < 1<<20 || d > 4<<20 {
		t.Errorf("encryption takes %d bytes", d)
	}
}

func TestImageMeasureRefuses(t *testing.T) {
	path := create(t)
	refuses(t, "either", "measure")
	refuses(t, "either", "measure", "--size", "1G", path)
	refuses(t, "not a number", "measure", "--size", "-1")
	refuses(t, "is none of", "measure", "--size", "1G", "-O", "raw", "-o", "compat=1.1")
	refuses(t, "is none of", "measure", "--size", "1G", "-o", "colour=blue")
	refuses(t, "cluster size 3", "measure", "--size", "1G", "-o", "cluster_size=3")
	refuses(t, "none", "measure", path+".none")
}
