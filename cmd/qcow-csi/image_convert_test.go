package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// TestImageConvert converts in every direction, and lets QEMU compare the content.
func TestImageConvert(t *testing.T) {
	t.Chdir(t.TempDir())
	rawDisk(t, "raw", 9<<20+512*3+1) // no whole clusters, no whole sectors
	secret := write(t, "secret", "the passphrase\n")
	mustQEMU(t, "convert", "-f", "raw", "-O", "qcow2", "raw", "qcow2")
	mustQEMU(t, "create", "-q", "-f", "qcow2", "-b", "qcow2", "-F", "qcow2", "overlay", "12M")
	qemuIO(t, "overlay", "write -P 3 1M 100k", "write -z 2M 1M", "write -P 4 11M 1M")
	mustImage(t, "convert", "-q", "-O", "qcow2", "-o", "encrypt.format=luks,encrypt.iter-time=10", "--target-passphrase-file", secret, "qcow2", "luks")
	for name, c := range map[string]struct {
		source string
		flags  []string
		format string
	}{
		"raw":             {"raw", []string{"-f", "raw"}, "qcow2"},
		"raw to raw":      {"raw", []string{"-f", "raw"}, "raw"},
		"to raw":          {"qcow2", nil, "raw"},
		"chain to raw":    {"overlay", nil, "raw"},
		"chain":           {"overlay", nil, "qcow2"},
		"compressed":      {"raw", []string{"-f", "raw", "-c"}, "qcow2"},
		"zstd":            {"overlay", []string{"-c", "-o", "compression_type=zstd,cluster_size=4k"}, "qcow2"},
		"version 2":       {"qcow2", []string{"-o", "compat=0.10"}, "qcow2"},
		"subclusters":     {"qcow2", []string{"-o", "extended_l2=on", "--cluster-size", "128K"}, "qcow2"},
		"data file":       {"qcow2", []string{"-o", "data_file=data"}, "qcow2"},
		"raw data file":   {"qcow2", []string{"-o", "data_file=data,data_file_raw=on"}, "qcow2"},
		"preallocated":    {"qcow2", []string{"-o", "preallocation=full"}, "qcow2"},
		"falloc raw":      {"qcow2", []string{"-o", "preallocation=falloc"}, "raw"},
		"full raw":        {"qcow2", []string{"-o", "preallocation=full"}, "raw"},
		"not sparse":      {"qcow2", []string{"-S", "0"}, "qcow2"},
		"not sparse, raw": {"qcow2", []string{"-S", "0"}, "raw"},
		"coarse":          {"raw", []string{"-f", "raw", "-S", "64k"}, "raw"},
		"decrypted":       {"luks", []string{"--passphrase-file", secret}, "qcow2"},
		"difference":      {"overlay", []string{"-B", "qcow2", "-F", "qcow2"}, "qcow2"},
		"packed":          {"overlay", []string{"-c", "-B", "qcow2", "-F", "qcow2"}, "qcow2"},
		"other clusters":  {"overlay", []string{"-B", "qcow2", "-F", "qcow2", "-o", "cluster_size=1M"}, "qcow2"},
		"unrelated":       {"raw", []string{"-f", "raw", "-B", "overlay", "-F", "qcow2"}, "qcow2"},
		"on raw":          {"overlay", []string{"-B", "raw", "-F", "raw"}, "qcow2"},
	} {
		t.Run(name, func(t *testing.T) {
			mustImage(t, append([]string{"convert", "-q", "-O", c.format, c.source, "target", "--force"}, c.flags...)...)
			source, format := c.source, "qcow2"
			switch source {
			case "raw":
				format = "raw"
			case "luks":
				source = "qcow2"
			}
			alike(t, format, source, c.format, "target")
			if err := errors.Join(os.Remove("target"), os.RemoveAll("data")); err != nil {
				t.Fatal(err)
			}
		})
	}
	alikeEncrypted(t, "qcow2", "luks", "secret")
	if len(names(t, ".")) != 5 {
		t.Errorf("%q", names(t, "."))
	}
}

// alikeEncrypted expects that QEMU finds the content of an image in an encrypted one.
func alikeEncrypted(t *testing.T, plain, encrypted, secret string) {
	t.Helper()
	bare := write(t, filepath.Join(t.TempDir(), "bare"), strings.TrimSuffix(string(read(t, secret)), "\n"))
	mustQEMU(t, "compare", "--object", "secret,id=s,file="+bare, "--image-opts", "driver=qcow2,file.filename="+plain,
		"driver=qcow2,encrypt.key-secret=s,file.filename="+encrypted)
}

// TestImageConvertTakesLittle looks at what a target stores.
func TestImageConvertTakesLittle(t *testing.T) {
	t.Chdir(t.TempDir())
	mustQEMU(t, "create", "-q", "-f", "qcow2", "base", "8M")
	qemuIO(t, "base", "write -P 1 0 4M")
	mustQEMU(t, "convert", "-f", "qcow2", "-O", "qcow2", "base", "changed")
	qemuIO(t, "changed", "write -P 2 64k 64k", "write -P 0 1M 64k", "write -P 0 5M 64k")
	data := func(args ...string) (n int64) {
		t.Helper()
		mustImage(t, append([]string{"convert", "-q", "-O", "qcow2", "--force", "changed", "target"}, args...)...)
		var entries []mapEntry
		decode(t, mustImage(t, "map", "--output=json", "target"), &entries)
		for _, e := range entries {
			if e.Depth == 0 && e.Data {
				n += e.Length
			}
		}
		return n
	}
	if n := data(); n != 4<<20-64<<10 { // zeroes are not stored
		t.Errorf("%d bytes of data", n)
	}
	if n := data("-B", "base", "-F", "qcow2"); n != 64<<10 { // nor is what the backing file has
		t.Errorf("%d bytes of data over the backing file", n)
	}
	if n := data("-S", "0"); n != 8<<20 {
		t.Errorf("%d bytes of data where zeroes are not looked for", n)
	}
	mustImage(t, "convert", "-q", "-O", "raw", "changed", "raw")
	f, err := storage.Open("raw", storage.ReadOnly)
	if err != nil {
		t.Fatal(err)
	}
	n, err := f.AllocatedBytes()
	if err := errors.Join(err, f.Close()); err != nil || n > 4<<20 {
		t.Errorf("a raw file takes %d bytes, %v", n, err)
	}
	plain := infoOf(t, "target").ActualSize
	if data("-c"); infoOf(t, "target").ActualSize > plain/8 {
		t.Errorf("compressed it takes %d bytes", infoOf(t, "target").ActualSize)
	}
}

// TestImageConvertExisting writes into a target that is there.
func TestImageConvertExisting(t *testing.T) {
	t.Chdir(t.TempDir())
	rawDisk(t, "raw", 3<<20)
	for _, format := range []string{"qcow2", "raw"} {
		for _, flags := range [][]string{nil, {"-c"}, {"--target-is-zero"}} {
			if format == "raw" && len(flags) > 0 && flags[0] == "-c" {
				continue
			}
			mustQEMU(t, "create", "-q", "-f", format, "target", "4M")
			if format == "qcow2" && (len(flags) == 0 || flags[0] == "-c") {
				qemuIO(t, "target", "write -P 9 0 4M")
			}
			mustImage(t, append([]string{"convert", "-n", "-f", "raw", "-O", format, "raw", "target"}, flags...)...)
			alike(t, "raw", "raw", format, "target")
			if out := mustQEMU(t, "info", "-f", format, "target"); !strings.Contains(out, "(4194304 bytes)") {
				t.Error(out)
			}
		}
	}
	mustQEMU(t, "create", "-q", "-f", "qcow2", "small", "1M")
	refuses(t, "fit", "convert", "-n", "-f", "raw", "-O", "qcow2", "raw", "small")
	refuses(t, "no such file", "convert", "-n", "-f", "raw", "-O", "qcow2", "raw", "none")
}

// TestImageConvertBitmaps takes bitmaps along.
func TestImageConvertBitmaps(t *testing.T) {
	t.Chdir(t.TempDir())
	mustQEMU(t, "create", "-q", "-f", "qcow2", "disk", "8M")
	mustQEMU(t, "bitmap", "--add", "-g", "32k", "disk", "recording")
	qemuIO(t, "disk", "write -P 1 1M 96k", "write -P 1 8191k 1k")
	mustQEMU(t, "bitmap", "--add", "--disable", "disk", "resting", "--merge", "recording")
	mustQEMU(t, "bitmap", "--add", "disk", "broken")
	mustImage(t, "convert", "--bitmaps", "-O", "qcow2", "-c", "disk", "target")
	var want, got []listedBitmap
	decode(t, mustImage(t, "bitmap", "--output=json", "disk"), &want)
	decode(t, mustImage(t, "bitmap", "--output=json", "target"), &got)
	if !slices.Equal(want, got) || want[0].Dirty != 128<<10 || want[1].Dirty != 3*64<<10 {
		t.Errorf("%+v became %+v", want, got)
	}
	mustQEMU(t, "check", "-q", "target")
	refuses(t, "bitmaps", "convert", "--bitmaps", "-O", "raw", "disk", "x")
	refuses(t, "bitmaps", "convert", "--bitmaps", "-l", "x", "-O", "qcow2", "disk", "x")
	refuses(t, "bitmaps", "convert", "--bitmaps", "-f", "raw", "-O", "qcow2", "disk", "x")
}

// TestImageConvertSnapshot converts what a snapshot keeps.
func TestImageConvertSnapshot(t *testing.T) {
	t.Chdir(t.TempDir())
	mustQEMU(t, "create", "-q", "-f", "qcow2", "disk", "3M")
	qemuIO(t, "disk", "write -P 1 0 1M")
	mustQEMU(t, "convert", "-f", "qcow2", "-O", "raw", "disk", "before")
	mustQEMU(t, "snapshot", "-c", "before", "disk")
	qemuIO(t, "disk", "write -P 2 0 2M")
	mustImage(t, "convert", "-l", "before", "-O", "qcow2", "disk", "target")
	alike(t, "raw", "before", "qcow2", "target")
	leavesNothing(t, ".", func() {
		refuses(t, "not found", "convert", "-l", "none", "-O", "qcow2", "disk", "x")
		refuses(t, "neither snapshots", "convert", "-f", "raw", "-l", "before", "-O", "qcow2", "before", "x")
	})
}

func TestImageConvertRefuses(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	path := create(t)
	existing := write(t, "existing", "precious")
	leavesNothing(t, dir, func() {
		for why, args := range map[string][]string{
			"-O says so":       {path, "x"},
			"file exists":      {"-O", "raw", path, existing},
			"file already":     {"-O", "qcow2", path, existing},
			"in use":           {"-O", "qcow2", "--force", path, path},
			"magic":            {"-O", "qcow2", existing, "x"},
			"none: no such":    {"-O", "qcow2", "none", "x"},
			"none/x":           {"-O", "qcow2", path, "none/x"},
			"no compression":   {"-O", "raw", "-c", path, "x"},
			"or backing file":  {"-O", "raw", "-B", path, "-F", "qcow2", path, "x"},
			"without -n":       {"-O", "raw", "--target-is-zero", path, "x"},
			"nothing to":       {"-O", "qcow2", "-n", "-o", "compat=1.1", path, existing},
			"-F says so":       {"-O", "qcow2", "-B", path, path, "x"},
			"gone: no such":    {"-O", "qcow2", "-B", "gone", "-F", "qcow2", path, "x"},
			"no metadata":      {"-O", "raw", "-o", "preallocation=metadata", path, "x"},
			"is none of":       {"-O", "raw", "-o", "compat=1.1", path, "x"},
			"raw file has nei": {"-O", "qcow2", "-f", "raw", "--passphrase-file", existing, existing, "x"},
			"cluster size":     {"-O", "qcow2", "-o", "cluster_size=3k", path, "x"},
			"compressed clust": {"-O", "qcow2", "-c", "-o", "data_file=data", path, "x"},
			"taken":            {"-O", "qcow2", "-o", "data_file=existing", path, "taken"},
			"must be":          {"-O", "vmdk", path, "x"},
			"arg(s)":           {"-O", "raw", path},
		} {
			if why == "file exists" {
				why = "file already exists"
			}
			refuses(t, why, append([]string{"convert"}, args...)...)
		}
	})
	if b := read(t, existing); string(b) != "precious" {
		t.Errorf("an existing file was overwritten: %q", b)
	}
	// A source that is damaged says so, and not the target.
	b := read(t, path)
	b[l2At(b)+8+3] = 1
	write(t, path, string(b))
	leavesNothing(t, dir, func() { refuses(t, path+": ", "convert", "-O", "qcow2", path, "x") })
}

// TestImageConvertInterrupted ends conversions in their midst.
func TestImageConvertInterrupted(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	f, err := os.Create("raw")
	if err != nil {
		t.Fatal(err)
	}
	for i := range int64(16) { // something to do for each piece that is copied
		if _, err := f.WriteAt([]byte("data"), i<<22); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"-O", "qcow2"}, {"-O", "qcow2", "-c"}, {"-O", "raw"}, {"-O", "qcow2", "-o", "data_file=data"}} {
		cmd := &cobra.Command{}
		c := addConversionFlags(cmd)
		if err := cmd.ParseFlags(append(args, "-f", "raw")); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		leavesNothing(t, dir, func() {
			if err := c.run(ctx, "raw", "target", func(done, total int64) { cancel() }); !errors.Is(err, context.Canceled) {
				t.Errorf("convert %q: %v", args, err)
			}
		})
	}
}
