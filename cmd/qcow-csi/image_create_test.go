package main

import (
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// infoOf returns what info says of an image.
func infoOf(t *testing.T, path string) imageInfo {
	t.Helper()
	var i imageInfo
	decode(t, mustImage(t, "info", "--output=json", path), &i)
	return i
}

// TestImageCreateAsQEMU makes images of every kind with the flags of qemu-img, and lets QEMU compare them with its own.
func TestImageCreateAsQEMU(t *testing.T) {
	base := filepath.Join(t.TempDir(), "base")
	mustQEMU(t, "create", "-q", "-f", "qcow2", base, "3M")
	for name, c := range map[string]struct {
		size  string
		flags []string
	}{
		"plain":       {"1G", nil},
		"empty":       {"0", nil},
		"options":     {"100M", []string{"-o", "cluster_size=4k,refcount_bits=1"}},
		"version 2":   {"5M", []string{"-o", "compat=0.10"}},
		"version 3":   {"5M", []string{"-o", "compat=1.1,lazy_refcounts=on"}},
		"subclusters": {"5M", []string{"-o", "extended_l2=on", "-o", "compression_type=zstd"}},
		"data file":   {"5M", []string{"-o", "data_file=data"}},
		"raw data":    {"5M", []string{"-o", "data_file=data,data_file_raw=on"}},
		"metadata":    {"5M", []string{"-o", "preallocation=metadata"}},
		"falloc":      {"5M", []string{"-o", "preallocation=falloc"}},
		"full":        {"5M", []string{"-o", "preallocation=full"}},
		"overlay":     {"", []string{"-b", base, "-F", "qcow2"}},
		"larger":      {"10M", []string{"-b", base, "-F", "qcow2"}},
		"by options":  {"", []string{"-o", "backing_file=" + base + ",backing_fmt=qcow2"}},
		"unsafe":      {"5M", []string{"-u", "-b", "a,,b", "-F", "raw"}},
	} {
		t.Run(name, func(t *testing.T) {
			flags := append(slices.Clone(c.flags), "disk")
			if c.size != "" {
				flags = append(flags, c.size)
			}
			var infos [2]map[string]any
			for i := range infos {
				t.Chdir(t.TempDir()) // where QEMU makes a data file
				if i == 0 {
					mustQEMU(t, append([]string{"create", "-q", "-f", "qcow2"}, flags...)...)
				} else {
					mustImage(t, append([]string{"create", "-q"}, flags...)...)
				}
				if name != "unsafe" {
					mustQEMU(t, "check", "-q", "disk")
				}
				decode(t, mustQEMU(t, "info", "--output=json", "disk"), &infos[i])
			}
			size, ok := infos[1]["actual-size"].(float64)
			if full := strings.Contains(strings.Join(c.flags, " "), "=f"); !ok || (size >= 5<<20) != full {
				t.Errorf("the file takes %v bytes", infos[1]["actual-size"])
			}
			for i := range infos {
				delete(infos[i], "actual-size")
				delete(infos[i], "children")
			}
			if !reflect.DeepEqual(infos[0], infos[1]) {
				t.Errorf("QEMU says of its image    %v\nand of the one made here %v", infos[0], infos[1])
			}
		})
	}
}

// TestImageCreateEncrypted makes an image that QEMU can open with the passphrase.
func TestImageCreateEncrypted(t *testing.T) {
	dir := t.TempDir()
	path, secret := filepath.Join(dir, "disk"), write(t, filepath.Join(dir, "secret"), "the passphrase\n")
	bare := write(t, filepath.Join(dir, "bare"), "the passphrase")
	mustImage(t, "create", "-o", "encrypt.format=luks,encrypt.iter-time=10,encrypt.cipher-alg=aes-128", "--passphrase-file", secret, path, "1M")
	if e := infoOf(t, path).Specific.Data.Encrypt; e == nil || e.Cipher != "aes-128" || e.Hash != "sha256" {
		t.Errorf("%+v", e)
	}
	mustQEMU(t, "check", "-q", "--object", "secret,id=s,file="+bare, "--image-opts", "driver=qcow2,encrypt.key-secret=s,file.filename="+path)
	leavesNothing(t, dir, func() {
		fresh := filepath.Join(dir, "fresh")
		refuses(t, "passphrase", "create", "-o", "encrypt.format=luks", fresh, "1M")
		refuses(t, "none", "create", "-o", "encrypt.format=luks", "--passphrase-file", filepath.Join(dir, "none"), fresh, "1M")
		refuses(t, "empty", "create", "-o", "encrypt.format=luks", "--passphrase-file", write(t, secret, "\n"), fresh, "1M")
		refuses(t, "more than", "create", "-o", "encrypt.format=luks", "--passphrase-file", write(t, secret, strings.Repeat("x", maxPassphrase+1)), fresh, "1M")
		refuses(t, "\"aes\" is not luks", "create", "-o", "encrypt.format=aes", "--passphrase-file", bare, fresh, "1M")
		refuses(t, "--help", "create", "-o", "encrypt.format=luks,encrypt.key-secret=s", fresh, "1M")
		refuses(t, "without encrypt.format", "create", "-o", "encrypt.iter-time=10", fresh, "1M")
	})
}

func TestImageCreateSays(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	if out, want := mustImage(t, "create", path, "1000"), "Created "+path+": 1 KiB (1024 bytes), clusters of 64 KiB, refcounts of 16 bits\n"; out != want {
		t.Errorf("%q, want %q", out, want)
	}
	if out := mustImage(t, "create", "-q", "--force", path, "1M"); out != "" {
		t.Errorf("quiet it says %q", out)
	}
	var made imageInfo
	decode(t, mustImage(t, "create", "--output=json", "--cluster-size", "4K", "--refcount-bits", "1", "--force", path, "1M"), &made)
	if found := infoOf(t, path); !reflect.DeepEqual(made, found) || made.ClusterSize != 4096 || made.Specific.Data.RefcountBits != 1 {
		t.Errorf("create says %+v\ninfo says   %+v", made, found)
	}
}

func TestImageCreateRefuses(t *testing.T) {
	dir := t.TempDir()
	existing, fresh := write(t, filepath.Join(dir, "existing"), "precious"), filepath.Join(dir, "fresh")
	for why, args := range map[string][]string{
		"exist":                {existing, "1G"},
		"shorthand":            {fresh, "-1"},
		"not a number":         {fresh, "1X"},
		"too large":            {fresh, "16E"},
		"exceeds the limit":    {fresh, "1E", "-o", "cluster_size=512"},
		"cluster size 3072":    {fresh, "1G", "--cluster-size", "3K"},
		"cluster size 4194304": {fresh, "1G", "--cluster-size", "4M"},
		"it can't be 0":        {fresh, "1G", "-o", "cluster_size=0"},
		"refcount width 3":     {fresh, "1G", "--refcount-bits", "3"},
		"above 0":              {fresh, "1G", "-o", "refcount_bits=0"},
		"no such file":         {filepath.Join(dir, "none", "fresh"), "1G"},
		"which size":           {fresh},
		"NAME=VALUE":           {fresh, "1G", "-o", "compat"},
		"is none of":           {fresh, "1G", "-o", "colour=blue"},
		"the size is an":       {fresh, "-o", "size=1G"},
		"neither on nor off":   {fresh, "1G", "-o", "extended_l2=maybe"},
		"neither 1.1 nor 0.10": {fresh, "1G", "-o", "compat=2"},
		"neither zlib nor":     {fresh, "1G", "-o", "compression_type=lzma"},
		"preallocation \"som":  {fresh, "1G", "-o", "preallocation=some"},
		"which format":         {fresh, "1G", "-b", existing},
		"without a backing":    {fresh, "1G", "-F", "raw"},
		"\"qcow2\" or \"raw\"": {fresh, "1G", "-b", existing, "-F", "vmdk"},
		"magic":                {fresh, "-b", existing, "-F", "qcow2"},
		"none: no such":        {fresh, "1G", "-b", "none", "-F", "qcow2"},
		"version 2":            {fresh, "1G", "-o", "compat=0.10,extended_l2=on"},
		"data file":            {fresh, "1G", "-o", "data_file_raw=on"},
		"taken":                {fresh, "1G", "-o", "data_file=taken"},
	} {
		write(t, filepath.Join(dir, "taken"), "")
		leavesNothing(t, dir, func() { refuses(t, why, append([]string{"create"}, args...)...) })
	}
	if b := read(t, existing); string(b) != "precious" {
		t.Errorf("an existing file was overwritten: %q", b)
	}
}

// TestImageCreateForce replaces files, but for those in use.
func TestImageCreateForce(t *testing.T) {
	dir := t.TempDir()
	path, link := write(t, filepath.Join(dir, "disk"), "old"), filepath.Join(dir, "link")
	if err := os.Symlink("disk", link); err != nil {
		t.Fatal(err)
	}
	mustImage(t, "create", "--force", link, "1M")
	if i := infoOf(t, path); i.VirtualSize != 1<<20 {
		t.Errorf("%+v", i)
	}
	if to, err := os.Readlink(link); to != "disk" {
		t.Errorf("the link leads to %q, %v", to, err)
	}
	hold(t, path, storage.ReadOnly)
	leavesNothing(t, dir, func() {
		refuses(t, "in use", "create", "--force", path, "2M")
		refuses(t, "is a directory", "create", "--force", dir, "2M")
	})
	if i := infoOf(t, path); i.VirtualSize != 1<<20 {
		t.Errorf("an image in use was replaced: %+v", i)
	}
}
