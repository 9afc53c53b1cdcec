package main

import (
	"os"
	"testing"
)

// TestImageAmend changes what can be changed, and lets QEMU look at it.
func TestImageAmend(t *testing.T) {
	t.Chdir(t.TempDir())
	rawDisk(t, "raw", 3<<20)
	mustQEMU(t, "convert", "-f", "raw", "-O", "qcow2", "raw", "disk")
	qemuIO(t, "disk", "write -z 1M 1M")
	mustQEMU(t, "convert", "-f", "qcow2", "-O", "raw", "disk", "raw")
	for _, c := range []struct {
		options string
		is      func(i *qcow2Info) bool
	}{
		{"refcount_bits=1", func(i *qcow2Info) bool { return i.RefcountBits == 1 }},
		{"lazy_refcounts=on", func(i *qcow2Info) bool { return *i.LazyRefcounts && i.RefcountBits == 1 }},
		{"lazy_refcounts=off,refcount_bits=64", func(i *qcow2Info) bool { return !*i.LazyRefcounts && i.RefcountBits == 64 }},
		{"compat=0.10,refcount_bits=16", func(i *qcow2Info) bool { return i.Compat == "0.10" }},
		{"compat=v3", func(i *qcow2Info) bool { return i.Compat == "1.1" }},
	} {
		var i imageInfo
		decode(t, mustImage(t, "amend", "--output=json", "-o", c.options, "disk"), &i)
		if !c.is(&i.Specific.Data) {
			t.Errorf("%s: %+v", c.options, i.Specific.Data)
		}
		alike(t, "raw", "raw", "qcow2", "disk")
	}
	mustImage(t, "create", "-o", "data_file=data,data_file_raw=on", "external", "1M")
	if err := os.Rename("data", "moved"); err != nil {
		t.Fatal(err)
	}
	mustImage(t, "amend", "-o", "data_file=moved,data_file_raw=off", "external")
	if i := infoOf(t, "external").Specific.Data; i.DataFile != "moved" || *i.DataFileRaw {
		t.Errorf("%+v", i)
	}
	mustQEMU(t, "check", "-q", "external")
}

// TestImageAmendPassphrases adds and removes passphrases.
func TestImageAmendPassphrases(t *testing.T) {
	t.Chdir(t.TempDir())
	first, second := write(t, "first", "one"), write(t, "second", "two")
	mustImage(t, "create", "-o", "encrypt.format=luks,encrypt.iter-time=10", "--passphrase-file", first, "disk", "1M")
	mustImage(t, "amend", "-o", "encrypt.iter-time=10", "--passphrase-file", first, "--add-passphrase-file", second, "disk")
	mustImage(t, "sha", "--passphrase-file", first, "disk")
	mustImage(t, "sha", "--passphrase-file", second, "disk")
	mustImage(t, "amend", "--remove-key-slot", "0", "disk")
	refuses(t, "passphrase", "sha", "--passphrase-file", first, "disk")
	mustImage(t, "sha", "--passphrase-file", second, "disk")
	refuses(t, "only active one", "amend", "--remove-passphrase-file", second, "disk")
	refuses(t, "passphrase", "amend", "--passphrase-file", first, "--add-passphrase-file", first, "disk")
	mustImage(t, "amend", "-o", "encrypt.iter-time=10", "--passphrase-file", second, "--add-passphrase-file", first, "--remove-passphrase-file", second, "disk")
	mustImage(t, "sha", "--passphrase-file", first, "disk")
	refuses(t, "passphrase", "sha", "--passphrase-file", second, "disk")
}

func TestImageAmendRefuses(t *testing.T) {
	path := create(t)
	before := string(read(t, path))
	for why, args := range map[string][]string{
		"nothing to change":        nil,
		"image resize":             {"-o", "size=1G"},
		"image rebase":             {"-o", "backing_file=x"},
		"--add-passphrase-file":    {"-o", "encrypt.new-secret=x"},
		"cluster_size is none of":  {"-o", "cluster_size=4k"},
		"refcount width 3":         {"-o", "refcount_bits=3"},
		"version 2 has refcounts":  {"-o", "compat=0.10,refcount_bits=64"},
		"without one":              {"-o", "data_file=x"},
		"no key slots":             {"--remove-key-slot", "0"},
		"none: no such":            {"--add-passphrase-file", path + ".none"},
		"neither on nor off":       {"-o", "lazy_refcounts=1"},
		"by saying so":             {"-o", "data_file_raw=on"},
		`"x" is not of the form N`: {"-o", "x"},
	} {
		refuses(t, why, append([]string{"amend", path}, args...)...)
	}
	if before != string(read(t, path)) {
		t.Error("the image has changed")
	}
}
