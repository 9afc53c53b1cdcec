package main

import (
	"fmt"
	"math"
	"path/filepath"
	"strings"
	"testing"
)

// TestImageResize takes a disk through sizes, together with QEMU.
func TestImageResize(t *testing.T) {
	path := create(t)
	theirs := write(t, path+".qemu", string(read(t, path)))
	for _, c := range []struct {
		arg  string
		want int64
	}{
		{"20M", 20 << 20},
		{"+512K", 20<<20 + 512<<10},
		{"2G", 2 << 30},
		{"2G", 2 << 30},
		{"-1G", 1 << 30},
		{"100M", 100 << 20},
		{"-96M", 4 << 20},
		{"+1M", 5 << 20},
	} {
		mustImage(t, "resize", "--shrink", path, c.arg)
		mustQEMU(t, "resize", "-q", "-f", "qcow2", "--shrink", theirs, c.arg)
		if i := infoOf(t, path); i.VirtualSize != c.want {
			t.Errorf("resize %s: %d bytes, want %d", c.arg, i.VirtualSize, c.want)
		}
		alike(t, "qcow2", theirs, "qcow2", path)
	}
	mustImage(t, "resize", path, "+1")
	var r resized
	decode(t, mustImage(t, "resize", "--output=json", path, "6M"), &r)
	if want := (resized{path, 5<<20 + 512, 6 << 20}); r != want {
		t.Errorf("%+v, want %+v", r, want)
	}
	// A sign may come before the image, and with flags anywhere.
	mustImage(t, "resize", "-1M", path, "-q", "--shrink")
	if i := infoOf(t, path); i.VirtualSize != 5<<20 {
		t.Errorf("%+v", i)
	}
}

func TestImageResizeWithPreallocation(t *testing.T) {
	for preallocation, least := range map[string]int64{"off": 0, "metadata": 0, "falloc": 4 << 20, "full": 4 << 20} {
		path := create(t)
		mustImage(t, "resize", "--preallocation", preallocation, path, "+4M")
		i := infoOf(t, path)
		if i.VirtualSize != 14<<20 || i.ActualSize < least || least == 0 && i.ActualSize > 2<<20 {
			t.Errorf("%s: %+v", preallocation, i)
		}
		mustQEMU(t, "check", "-q", path)
	}
	refuses(t, "preallocation", "resize", "--preallocation", "some", create(t), "+4M")
	refuses(t, "preallocation", "resize", "--preallocation", "full", "--shrink", create(t), "-4M")
}

func TestImageResizeRefuses(t *testing.T) {
	path := create(t)
	for arg, why := range map[string]string{
		"1M": "--shrink", "-1M": "--shrink", "-1G": "shorter", "+": "not a number", "+-1": "two signs", "--1": "unknown flag",
		"+9999999999G": "too large", fmt.Sprintf("+%d", int64(math.MaxInt64)): "too large", "8E": "too large", "7.99E": "limit", "x": "not a number",
	} {
		refuses(t, why, "resize", path, arg)
	}
	refuses(t, "arg(s)", "resize", path)
	refuses(t, "arg(s)", "resize", path, "1", "2")
	if i := infoOf(t, path); i.VirtualSize != 10<<20 {
		t.Errorf("%+v", i)
	}
	overlay := filepath.Join(filepath.Dir(path), "overlay")
	mustImage(t, "create", "-b", "disk.qcow2", "-F", "qcow2", overlay)
	mustImage(t, "resize", overlay, "+1M")
	mustQEMU(t, "check", "-q", overlay)
	if out := mustImage(t, "resize", "--help"); !strings.Contains(out, "--shrink") {
		t.Error(out)
	}
}
