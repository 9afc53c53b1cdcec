package main

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// TestImageSnapshotListColumns: a name that fills its column, or more, does not run into the next one.
func TestImageSnapshotListColumns(t *testing.T) {
	path := create(t)
	for _, n := range []int{1, 15, 16, 17, 51, 52, 53, 200} {
		mustImage(t, "snapshot", "-q", "-c", strings.Repeat("n", n), path)
	}
	ours, theirs := mustImage(t, "snapshot", path), mustQEMU(t, "snapshot", "-l", path)
	if !sameFields(ours, theirs) {
		t.Errorf("%s\nQEMU has\n%s", ours, theirs)
	}
	for i, line := range strings.Split(strings.TrimSpace(ours), "\n")[2:] {
		if f := strings.Fields(line); len(f) < 6 || f[0] != fmt.Sprint(i+1) || strings.Trim(f[1], "n") != "" {
			t.Errorf("%q", line)
		}
	}
}

// TestImageCreateRoundsUp: a disk has whole sectors.
func TestImageCreateRoundsUp(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	for size, want := range map[string]int64{"1024": 1024, "1234": 1536, "1": 512, "0": 0} {
		mustImage(t, "create", "--force", path, size)
		theirs := path + ".qemu"
		mustQEMU(t, "create", "-q", "-f", "qcow2", theirs, size)
		var i imageInfo
		decode(t, mustQEMU(t, "info", "--output=json", theirs), &i)
		if got := infoOf(t, path).VirtualSize; got != want || i.VirtualSize != want {
			t.Errorf("%s: %d bytes, by QEMU %d, want %d", size, got, i.VirtualSize, want)
		}
	}
}

// TestImageRepairCounts: a cluster with one reference too many is one leak, and the flag that its table lacks then one corruption.
func TestImageRepairCounts(t *testing.T) {
	path := create(t)
	b := read(t, path)
	b[refcountAt(b, 0)+1] = 2                  // of the header
	b[binary.BigEndian.Uint64(b[40:])] &^= 128 // COPIED of the first L1 entry
	write(t, path, string(b))
	theirs := write(t, path+".qemu", string(b))
	var got, want imageCheck
	decode(t, mustImage(t, "check", "-r", "all", "--output=json", path), &got)
	decode(t, mustQEMU(t, "check", "-r", "all", "-f", "qcow2", "--output=json", theirs), &want)
	if got.LeaksFixed != 1 || got.CorruptionsFixed != 1 || want.LeaksFixed != 1 || want.CorruptionsFixed != 1 {
		t.Errorf("%d leaks and %d corruptions were corrected, by QEMU %d and %d", got.LeaksFixed, got.CorruptionsFixed, want.LeaksFixed, want.CorruptionsFixed)
	}
	mustQEMU(t, "check", "-q", path)
}

// TestImageMapOfTruncatedFile: an image that has lost its end is refused, or described as far as it goes, and not changed.
func TestImageMapOfTruncatedFile(t *testing.T) {
	path := create(t)
	b := read(t, path)
	for _, lost := range []int{1, cluster / 2, cluster, 2 * cluster, 4 * cluster} {
		write(t, path, string(b[:len(b)-lost]))
		for _, args := range [][]string{{"map"}, {"map", "--output=json"}, {"info"}, {"sha"}, {"measure"}, {"check"}, {"discard"}, {"compact"}} {
			out, err := image(t, append(args, path)...)
			if lost >= cluster && args[0] != "info" && (err == nil || strings.Contains(err.Error(), "panic")) {
				t.Errorf("%d bytes lost: image %q: %s", lost, args, out)
			}
			if lost < cluster && args[0] == "map" && err != nil {
				t.Errorf("%d bytes lost: image %q: %v", lost, args, err)
			}
		}
		if lost >= cluster && string(read(t, path)) != string(b[:len(b)-lost]) {
			t.Fatalf("%d bytes lost: the file has changed", lost)
		}
	}
}

// TestImageBitmapOfUnknownKind: a flag that nobody knows keeps info from describing the bitmaps, and the image from being written to.
func TestImageBitmapOfUnknownKind(t *testing.T) {
	path := create(t)
	mustImage(t, "bitmap", "-q", path, "one", "--add", "-g", "32K")
	mustImage(t, "bitmap", "-q", path, "two", "--add", "--disable")
	good := read(t, path)
	h, err := format.DecodeHeader(good)
	if err != nil {
		t.Fatal(err)
	}
	ext, err := h.Bitmaps()
	if err != nil {
		t.Fatal(err)
	}
	bad := []byte(string(good))
	bad[int(ext.DirectoryOffset)+15] |= 8 // flags of the first bitmap
	write(t, path, string(bad))
	refuses(t, "flags", "info", path)
	refuses(t, "flags", "bitmap", path)
	refuses(t, "flags", "write", path, "0")
	if _, status := qemuImg(t, "info", path); status == 0 {
		t.Error("QEMU accepts it")
	}
	if string(read(t, path)) != string(bad) {
		t.Error("the image has changed")
	}
	write(t, path, string(good))
	sameInfo(t, path)
}

// TestImageMeasureBitmaps measures large disks with bitmaps, for clusters of several sizes, and for targets that can't have any.
func TestImageMeasureBitmaps(t *testing.T) {
	t.Chdir(t.TempDir())
	mustImage(t, "create", "-o", "cluster_size=2M", "disk", "256G")
	mustImage(t, "bitmap", "-q", "disk", "b1", "--add", "-g", "2M")
	mustImage(t, "bitmap", "-q", "disk", "b2", "--add", "-g", "512")
	mustImage(t, "create", "-o", "cluster_size=2M", "bare", "256G")
	for _, args := range [][]string{
		{"-O", "qcow2", "disk"},
		{"-O", "qcow2", "-o", "cluster_size=2M", "disk"},
		{"-O", "qcow2", "-o", "cluster_size=2M,refcount_bits=64", "disk"},
		{"-O", "qcow2", "-o", "compat=0.10", "disk"},
		{"-O", "raw", "disk"},
		{"-O", "qcow2", "bare"},
	} {
		var got, want map[string]any
		decode(t, mustImage(t, append([]string{"measure", "--output=json", "-f", "qcow2"}, args...)...), &got)
		decode(t, mustQEMU(t, append([]string{"measure", "--output=json", "-f", "qcow2"}, args...)...), &want)
		if !reflect.DeepEqual(got, want) {
			t.Errorf("measure %q: %v, want %v", args, got, want)
		}
	}
}

// TestImageMeasureIsEnough: a conversion takes no more than was measured, whatever the source is.
func TestImageMeasureIsEnough(t *testing.T) {
	t.Chdir(t.TempDir())
	rawDisk(t, "raw", 3<<20)
	secret := write(t, "secret", "the passphrase")
	mustImage(t, "convert", "-f", "raw", "-O", "qcow2", "raw", "disk")
	mustImage(t, "snapshot", "-q", "-c", "kept", "disk")
	qemuIO(t, "disk", "write -P 7 0 1M", "discard 1M 1M")
	mustImage(t, "create", "empty", "3M")
	mustImage(t, "create", "-o", "preallocation=full", "preallocated", "3M")
	mustImage(t, "create", "full", "3M")
	qemuIO(t, "full", "write -P 1 0 3M")
	mustImage(t, "create", "-b", "disk", "-F", "qcow2", "overlay", "5M")
	qemuIO(t, "overlay", "write -P 9 4M 100k")
	for _, source := range [][]string{{"disk"}, {"-l", "kept", "disk"}, {"empty"}, {"preallocated"}, {"full"}, {"overlay"}, {"-f", "raw", "raw"}} {
		for _, options := range []string{"", "cluster_size=512", "cluster_size=2M,refcount_bits=64", "extended_l2=on", "preallocation=full", "encrypt.format=luks"} {
			if options == "encrypt.format=luks" && source[0] != "disk" {
				continue // it takes long, and is a matter of the target
			}
			args := append([]string{"-O", "qcow2"}, source...)
			if options != "" {
				args = append(args, "-o", options)
			}
			var measured imageMeasure
			decode(t, mustImage(t, append([]string{"measure", "--output=json"}, args...)...), &measured)
			if options == "encrypt.format=luks" {
				args = append(args, "-o", "encrypt.iter-time=10", "--target-passphrase-file", secret)
			}
			mustImage(t, append(append([]string{"convert", "-q", "--force"}, args...), "target")...)
			if n := int64(len(read(t, "target"))); n > measured.Required || measured.Required > measured.FullyAllocated {
				t.Errorf("%q: %d bytes of %+v", args, n, measured)
			}
		}
	}
	if err := os.Remove("disk"); err != nil {
		t.Fatal(err)
	}
	refuses(t, "disk", "measure", "overlay") // nobody knows what its backing file had
	for size, figures := range map[string]string{"0": "196608 196608", "2G": "589824 2148073472", "64G": "7471104 68726947840", "256G": "42532864", "1T": "168034304", "2P": ""} {
		var got, want imageMeasure
		decode(t, mustImage(t, "measure", "--output=json", "--size", size), &got)
		decode(t, mustQEMU(t, "measure", "--output=json", "-O", "qcow2", "--size", size), &want)
		if got != want {
			t.Errorf("%s: %+v, QEMU says %+v (%s)", size, got, want, figures)
		}
	}
	refuses(t, "limit", "measure", "--size", "7E")
}
