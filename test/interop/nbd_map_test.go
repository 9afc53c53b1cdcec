package interop_test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/qcow-csi/qcow-csi/nbdexport"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// everyKind makes an image on a backing file with everything that a map can show: data, zeroes with and without clusters, nothing, and two
// bitmaps.
func everyKind(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	base, path := filepath.Join(dir, "base.qcow2"), filepath.Join(dir, "disk.qcow2")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", base, "16M")
	qemuIO(t, base, "write -P 1 0 1M", "write -P 2 8M 2M", "write -z -u 12M 1M")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "base.qcow2", path)
	run(t, "qemu-img", "bitmap", "--add", path, "early")
	qemuIO(t, path, "write -P 3 512k 1M", "write -z 3M 256k", "write -z -u 4M 1M", "write -P 4 8M 64k", "write -P 5 15M 1M")
	run(t, "qemu-img", "bitmap", "--add", "-g", "4k", path, "late")
	qemuIO(t, path, "write -P 6 1000000 5000", "write -P 7 9M 4k")
	return path
}

// described is an element of nbdinfo --map --json.
type described struct {
	Offset, Length int64
	Type           uint64
}

// describe returns what nbdinfo says of an export by one metadata context, neighbours joined.
func describe(t *testing.T, uri, context string) []described {
	t.Helper()
	var all, joined []described
	out := run(t, "nbdinfo", "--map="+context, "--json", uri)
	if err := json.Unmarshal([]byte(out), &all); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, d := range all {
		if last := len(joined) - 1; last >= 0 && joined[last].Type == d.Type && joined[last].Offset+joined[last].Length == d.Offset {
			joined[last].Length += d.Length
		} else {
			joined = append(joined, d)
		}
	}
	return joined
}

// TestNBDMapsAsQEMU asks for every metadata context here and of qemu-nbd, of the same image.
func TestNBDMapsAsQEMU(t *testing.T) {
	require.Tool(t, "nbdinfo", "qemu-nbd", "qemu-io")
	path := everyKind(t)
	contexts := []string{"base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:early", "qemu:dirty-bitmap:late"}
	theirs := make(map[string][]described)
	t.Run("QEMU", func(t *testing.T) {
		socket := filepath.Join(t.TempDir(), "nbd.sock")
		running(t, "qemu-nbd", "-r", "-t", "-f", "qcow2", "-x", "disk", "-A", "-B", "early", "-B", "late", "-k", socket, path)
		eventually(t, "qemu-nbd", func() bool { _, err := os.Stat(socket); return err == nil })
		for _, c := range contexts {
			theirs[c] = describe(t, "nbd+unix:///disk?socket="+socket, c)
		}
	})
	s := export(t, "unix", path, nbdexport.ImageOptions{AllocationDepth: true, Bitmaps: []string{"early", "late"}})
	for _, c := range contexts {
		if ours := describe(t, s.uri(), c); !slices.Equal(ours, theirs[c]) || len(ours) < 2 {
			t.Errorf("%s:\nhere %v\nQEMU %v", c, ours, theirs[c])
		}
	}
	// The bitmaps go on while they are served.
	run(t, "qemu-io", "-f", "raw", "-c", "write -P 8 14M 64k", s.uri())
	if ours := describe(t, s.uri(), "qemu:dirty-bitmap:late"); !slices.Contains(ours, described{14 << 20, 64 << 10, 1}) {
		t.Errorf("after a write at 14 MiB: %v", ours)
	}
	out := run(t, "nbdinfo", s.uri())
	for _, c := range contexts {
		if !strings.Contains(out, c) {
			t.Errorf("nbdinfo does not tell of %s:\n%s", c, out)
		}
	}
}

// TestNBDMapIsTheFiles compares what qemu-img map says of the export with what it says of the file.
func TestNBDMapIsTheFiles(t *testing.T) {
	require.Tool(t, "qemu-img", "qemu-io")
	path := everyKind(t)
	part := func(name string, of func() string) (extents []string) {
		t.Helper()
		var all []extent
		if err := json.Unmarshal([]byte(of()), &all); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		var joined []extent
		for _, e := range all { // only what both know
			e = extent{Start: e.Start, Length: e.Length, Zero: e.Zero, Data: e.Data}
			if last := len(joined) - 1; last >= 0 && joined[last].Zero == e.Zero && joined[last].Data == e.Data {
				joined[last].Length += e.Length
			} else {
				joined = append(joined, e)
			}
		}
		for _, e := range joined {
			extents = append(extents, fmt.Sprintf("%d+%d zero=%t data=%t", e.Start, e.Length, e.Zero, e.Data))
		}
		return extents
	}
	file := part("file", func() string { return run(t, "qemu-img", "map", "-f", "qcow2", "--output=json", path) })
	for _, network := range []string{"unix", "tcp"} {
		t.Run(network, func(t *testing.T) {
			s := export(t, network, path, nbdexport.ImageOptions{})
			here := part("export", func() string { return run(t, "qemu-img", "map", "-f", "raw", "--output=json", s.uri()) })
			if !slices.Equal(here, file) {
				t.Errorf("export:\n%s\nfile:\n%s", strings.Join(here, "\n"), strings.Join(file, "\n"))
			}
		})
	}
}

// TestNBDInfoOfImage asks nbdinfo for everything else that it can tell.
func TestNBDInfoOfImage(t *testing.T) {
	require.Tool(t, "nbdinfo")
	s := export(t, "unix", everyKind(t), nbdexport.ImageOptions{AllocationDepth: true})
	for _, args := range [][]string{
		{"--size"},
		{"--is", "tls"},
		{"--can", "flush"},
		{"--can", "fua"},
		{"--can", "trim"},
		{"--can", "zero"},
		{"--can", "fast-zero"},
		{"--can", "df"},
		{"--can", "cache"},
		{"--can", "multi-conn"},
		{"--can", "structured-reply"},
		{"--is", "read-only"},
		{"--is", "rotational"},
	} {
		out, ok := try(t, "nbdinfo", append(args, s.uri())...)
		want := args[len(args)-1] != "tls" && args[len(args)-1] != "read-only" && args[len(args)-1] != "rotational"
		if ok != want {
			t.Errorf("nbdinfo %s: %t\n%s", strings.Join(args, " "), ok, out)
		}
	}
	if out := run(t, "nbdinfo", "--map", "--totals", s.uri()); !strings.Contains(out, "hole,zero") || !strings.Contains(out, "data") {
		t.Errorf("totals: %s", out)
	}
}
