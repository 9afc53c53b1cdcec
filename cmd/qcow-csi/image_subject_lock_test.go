package main

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// expectBusy expects that commands fail since a file is in use.
func expectBusy(t *testing.T, lines ...[]string) {
	t.Helper()
	for _, args := range lines {
		if _, err := image(t, args...); !errors.Is(err, storage.ErrBusy) || exitCode(err) != 1 {
			t.Errorf("image %q: %v", args, err)
		}
	}
}

// TestImageBackingFileInUse has somebody else use the backing file: beside a reader all can be done that does not change it, beside a writer
// nothing that needs it.
func TestImageBackingFileInUse(t *testing.T) {
	base := create(t)
	overlay := filepath.Join(filepath.Dir(base), "overlay")
	mustImage(t, "create", "-b", base, "-F", "qcow2", overlay)
	qemuIO(t, overlay, "write -P 3 3M 64k")
	before := read(t, base)
	reader, err := storage.Open(base, storage.ReadOnly)
	if err != nil {
		t.Fatal(err)
	}
	mustImage(t, "sha", overlay)
	if _, err := imageWith(t.Context(), t, "x", "write", overlay, "5M"); err != nil {
		t.Error(err)
	}
	mustImage(t, "snapshot", "-q", "-c", "kept", overlay)
	mustImage(t, "snapshot", "-q", "-d", "kept", overlay)
	expectBusy(t, []string{"commit", overlay}, []string{"resize", base, "1G"})
	if err := reader.Close(); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(read(t, base), before) {
		t.Error("a backing file in use was changed")
	}

	writer, err := storage.Open(base, storage.ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	expectBusy(t, []string{"sha", overlay}, []string{"map", overlay}, []string{"write", overlay, "0"}, []string{"commit", overlay},
		[]string{"stream", overlay}, []string{"rebase", "-b", "", overlay}, []string{"convert", "-O", "raw", overlay, overlay + ".raw"})
	mustImage(t, "info", overlay) // which looks at nothing else
	mustImage(t, "check", overlay)
	if err := writer.Close(); err != nil {
		t.Fatal(err)
	}
	mustImage(t, "commit", overlay)
	alike(t, "qcow2", overlay, "qcow2", base)
}

// TestImageForceShareOfChain reads an image whose backing file somebody writes to. QEMU's --force-share holds for the whole chain.
func TestImageForceShareOfChain(t *testing.T) {
	base := create(t)
	overlay := filepath.Join(filepath.Dir(base), "overlay")
	mustImage(t, "create", "-b", base, "-F", "qcow2", overlay)
	hold(t, base, storage.ReadWrite)
	mustQEMU(t, "convert", "-U", "-f", "qcow2", "-O", "raw", overlay, overlay+".theirs")
	for _, args := range [][]string{{"sha"}, {"map"}, {"measure"}, {"read"}, {"convert", "-O", "raw"}} {
		args = append(args, "-U", overlay)
		switch args[0] {
		case "read":
			args = append(args, "0", "1")
		case "convert":
			args = append(args, overlay+".raw")
		}
		if _, err := image(t, args...); err != nil {
			t.Errorf("image %q: %v", args, err)
		}
	}
}

// TestImageInUseByAnotherName names a file in use by links, and lets go of it once of two times.
func TestImageInUseByAnotherName(t *testing.T) {
	path := create(t)
	dir := filepath.Dir(path)
	soft, hard, chain := filepath.Join(dir, "soft"), filepath.Join(dir, "hard"), filepath.Join(dir, "chain")
	for _, err := range []error{os.Symlink("disk.qcow2", soft), os.Link(path, hard), os.Symlink("soft", chain)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	first, err := storage.Open(path, storage.ReadOnly)
	if err != nil {
		t.Fatal(err)
	}
	second, err := storage.Open(hard, storage.ReadOnly)
	if err != nil {
		t.Fatal(err)
	}
	for i, held := range []*storage.OSFile{first, second} {
		for _, name := range []string{path, soft, hard, chain} {
			mustImage(t, "sha", name)
			expectBusy(t, []string{"resize", name, "1G"}, []string{"repair", name}, []string{"create", "--force", name, "1M"})
		}
		if err := held.Close(); err != nil {
			t.Fatal(i, err)
		}
	}
	mustImage(t, "resize", chain, "1G")
	if i := infoOf(t, path); i.VirtualSize != 1<<30 {
		t.Errorf("%+v", i)
	}
}

// TestImageDeletedWhileInUse takes the name of an image away. Whoever has it open goes on, and closes it as ever; another file may have the name
// meanwhile.
func TestImageDeletedWhileInUse(t *testing.T) {
	path := create(t)
	f, err := storage.Open(path, storage.ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	img, err := qcow.Open(f, qcow.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	mustImage(t, "create", path, "1M")
	if _, err := img.WriteAt([]byte("still there"), 5<<20); err != nil {
		t.Error(err)
	}
	if err := errors.Join(img.Flush(), img.Close()); err != nil {
		t.Error(err)
	}
	if i := infoOf(t, path); i.VirtualSize != 1<<20 {
		t.Errorf("%+v", i)
	}
	mustImage(t, "check", path)
}
