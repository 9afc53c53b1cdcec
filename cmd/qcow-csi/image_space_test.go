package main

import (
	"strings"
	"testing"
)

// TestImageDiscard gives back what zeroes take.
func TestImageDiscard(t *testing.T) {
	t.Chdir(t.TempDir())
	mustQEMU(t, "create", "-q", "-f", "qcow2", "base", "8M")
	qemuIO(t, "base", "write -P 1 6M 1M")
	for name, c := range map[string]struct {
		options []string
		want    int64 // clusters
	}{
		"plain":       {nil, 16 + 16 + 2},
		"small":       {[]string{"-o", "cluster_size=4k"}, 256 + 256 + 38},
		"subclusters": {[]string{"-o", "extended_l2=on"}, 16 + 16 + 2},
		"overlay":     {[]string{"-b", "base", "-F", "qcow2"}, 16 + 16 + 2},
		"version 2":   {[]string{"-o", "compat=0.10"}, 16 + 16 + 2},
	} {
		t.Run(name, func(t *testing.T) {
			mustQEMU(t, append(append([]string{"create", "-q", "-f", "qcow2"}, c.options...), "disk", "8M")...)
			// Zeroes over data of the backing file, the end of a cluster, zeroes among data, and zeroes at the end.
			qemuIO(t, "disk", "write -P 0 6M 1M", "write -P 2 1M 1M", "write -P 0 1130k 157k", "write -P 0 7M 1M")
			mustQEMU(t, "convert", "-f", "qcow2", "-O", "raw", "disk", "raw")
			var d discarded
			decode(t, mustImage(t, "discard", "--output=json", "disk"), &d)
			if d.Clusters != c.want || d.After >= d.Before-2<<20 || d.Before == 0 {
				t.Errorf("%+v, want %d clusters", d, c.want)
			}
			alike(t, "raw", "raw", "qcow2", "disk")
			decode(t, mustImage(t, "discard", "--output=json", "disk"), &d)
			if d.Clusters != 0 {
				t.Errorf("again: %+v", d)
			}
		})
	}
	// Clusters that are kept for zeroes, and compressed ones.
	mustQEMU(t, "create", "-q", "-f", "qcow2", "disk", "8M")
	qemuIO(t, "disk", "write -P 1 0 1M", "write -z 0 512k", "write -c -P 0 2M 64k", "write -c -P 1 3M 64k")
	mustQEMU(t, "convert", "-f", "qcow2", "-O", "raw", "disk", "raw")
	var d discarded
	decode(t, mustImage(t, "discard", "--output=json", "disk"), &d)
	if d.Clusters != 9 {
		t.Errorf("%+v", d)
	}
	alike(t, "raw", "raw", "qcow2", "disk")
}

// TestImageCompact makes a file short again.
func TestImageCompact(t *testing.T) {
	path := create(t)
	qemuIO(t, path, "write -P 1 0 8M", "write -P 2 8M 1M", "discard 0 8M")
	mustQEMU(t, "convert", "-f", "qcow2", "-O", "raw", path, path+".raw")
	before := len(read(t, path))
	var c compacted
	decode(t, mustImage(t, "compact", "--output=json", path), &c)
	if after := int64(len(read(t, path))); c.Before < 9<<20 || c.After != after || after > 2<<20 || c.Moved < 1<<20 || int64(before) < after {
		t.Errorf("%+v, and the file has %d bytes, it had %d", c, after, before)
	}
	alike(t, "raw", path+".raw", "qcow2", path)
	if out := mustImage(t, "compact", path); !strings.HasPrefix(out, "Compacted "+path+": 0 B moved, the file is ") {
		t.Error(out)
	}
}
