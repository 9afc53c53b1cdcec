package main

import (
	"slices"
	"strings"
	"testing"
)

func bitmapsOf(t *testing.T, path string) (list []listedBitmap) {
	t.Helper()
	decode(t, mustImage(t, "bitmap", "--output=json", path), &list)
	return list
}

// TestImageBitmap works on bitmaps in turns with QEMU.
func TestImageBitmap(t *testing.T) {
	t.Chdir(t.TempDir())
	mustImage(t, "create", "disk", "8M")
	mustImage(t, "create", "other", "8M")
	if list := bitmapsOf(t, "disk"); list == nil || len(list) > 0 {
		t.Errorf("%+v", list)
	}
	if out := mustImage(t, "bitmap", "disk"); out != "" {
		t.Error(out)
	}
	if out := mustImage(t, "bitmap", "disk", "small", "--add", "-g", "32K"); out != "Bitmap small of disk: add\n" {
		t.Error(out)
	}
	mustImage(t, "bitmap", "other", "theirs", "--add")
	qemuIO(t, "disk", "write 1M 1k", "write 4M 64k")
	qemuIO(t, "other", "write 7M 1k")
	var did changedBitmap
	decode(t, mustImage(t, "bitmap", "--output=json", "disk", "sum", "--add", "--disable", "--merge", "small"), &did)
	if !slices.Equal(did.Actions, []string{"add", "disable", "merge"}) {
		t.Errorf("%+v", did)
	}
	mustImage(t, "bitmap", "disk", "sum", "--merge", "theirs", "-b", "other")
	mustQEMU(t, "bitmap", "--add", "--disable", "disk", "qemu")
	mustQEMU(t, "bitmap", "--merge", "small", "disk", "qemu")
	mustQEMU(t, "check", "-q", "disk")
	want := []listedBitmap{
		{"small", 32 << 10, true, false, 96 << 10},
		{"sum", 64 << 10, false, false, 192 << 10},
		{"qemu", 64 << 10, false, false, 128 << 10},
	}
	if list := bitmapsOf(t, "disk"); !slices.Equal(list, want) {
		t.Errorf("%+v, want %+v", list, want)
	}
	sameInfo(t, "disk")
	if out := mustImage(t, "bitmap", "disk"); !strings.Contains(out, "32 KiB       96 KiB enabled\n") || !strings.Contains(out, "64 KiB      192 KiB disabled\n") {
		t.Error(out)
	}
	mustImage(t, "bitmap", "disk", "small", "--clear", "--disable")
	mustImage(t, "bitmap", "disk", "qemu", "--remove")
	mustImage(t, "bitmap", "disk", "sum", "--enable")
	want = []listedBitmap{{"small", 32 << 10, false, false, 0}, {"sum", 64 << 10, true, false, 192 << 10}}
	if list := bitmapsOf(t, "disk"); !slices.Equal(list, want) {
		t.Errorf("%+v, want %+v", list, want)
	}
}

func TestImageBitmapRefuses(t *testing.T) {
	path := create(t)
	mustImage(t, "bitmap", path, "there", "--add")
	for why, args := range map[string][]string{
		"Its name comes":                {"--add"},
		"what is to be done":            {"there"},
		"already":                       {"there", "--add"},
		"not found":                     {"none", "--clear"},
		`--remove: bitmap "none"`:       {"none", "--remove"},
		`"none": not found`:             {"there", "--merge", "none"},
		"granularity of 3":              {"new", "--add", "-g", "3"},
		"takes no value":                {"there", "--clear=false"},
		"no such file":                  {"there", "--merge", "x", "-b", path + ".none"},
		"needs an argument: --merge":    {"there", "--merge"},
		"accepts between 1 and 2 arg(s": {"there", "more", "--clear"},
	} {
		refuses(t, why, append([]string{"bitmap", path}, args...)...)
	}
	old := path + ".old"
	mustImage(t, "create", "-o", "compat=0.10", old, "1M")
	refuses(t, "version 2", "bitmap", old, "x", "--add")
}
