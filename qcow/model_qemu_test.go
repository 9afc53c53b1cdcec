package qcow_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// askQEMU holds the files at rest, without leaks, against QEMU, in a folder of their own.
func (m *model) askQEMU(dir string) error {
	for name, f := range m.files {
		if err := os.WriteFile(filepath.Join(dir, name), f.(*storage.Memory).Bytes(), 0o600); err != nil {
			return err
		}
	}
	q := judge{ctx: m.ctx, dir: dir}
	image := m.imageOptions(m.chain)
	if _, err := q.ask("check", image); err != nil {
		return err
	}
	if err := q.reads(image, "", m.want, len(m.want)); err != nil {
		return err
	}
	for i, k := range m.kept {
		// QEMU reads the disk in a snapshot as if it were as large as the active one, which it can't where it is smaller.
		if len(k.content) < len(m.want) || i > 1 {
			continue
		}
		if err := q.reads(image, k.name, k.content, len(m.want)); err != nil {
			return err
		}
	}
	if data := m.files[modelData]; data != nil && m.raw && !m.kind.luks && len(m.want) > 0 {
		out, err := q.ask("compare", image, "driver=raw,file.driver=file,file.filename="+modelData)
		if err != nil {
			return fmt.Errorf("the data file as a raw image: %w: %s", err, out)
		}
	}
	return m.askForBitmaps(&q)
}

// imageOptions tells QEMU every file of a chain, the image's own one first, and which key opens it.
func (m *model) imageOptions(chain []string) string {
	var options []string
	add := func(depth int, name, format string, secret bool) {
		node := strings.Repeat("backing.", depth)
		options = append(options, node+"driver="+format, node+"file.driver=file", node+"file.filename="+name)
		if secret {
			options = append(options, node+"encrypt.key-secret=key")
		}
	}
	add(0, modelImage, "qcow2", m.kind.luks)
	for i, name := range chain {
		f := m.inPool(name)
		add(i+1, name, f.format, f.luks)
	}
	return strings.Join(options, ",")
}

// askForBitmaps expects that QEMU sees the bitmaps of the image.
func (m *model) askForBitmaps(q *judge) error {
	if len(m.bitmaps) == 0 {
		return nil
	}
	out, err := q.ask("info", m.imageOptions(nil), "--output=json")
	if err != nil {
		return err
	}
	var info struct {
		Format struct {
			Data struct{ Bitmaps []qemuBitmap }
		} `json:"format-specific"`
	}
	if err := json.Unmarshal(out, &info); err != nil {
		return err
	}
	seen := info.Format.Data.Bitmaps
	if len(seen) != len(m.bitmaps) {
		return fmt.Errorf("it sees bitmaps %+v, there are %d", seen, len(m.bitmaps))
	}
	for i, b := range m.bitmaps {
		s := seen[i]
		if s.Name != b.name || s.Granularity != b.must.granularity || slices.Contains(s.Flags, "auto") != b.enabled || slices.Contains(s.Flags, "in-use") != b.unusable {
			return fmt.Errorf("it sees bitmap %+v, which is %+v", s, b)
		}
	}
	return nil
}

// judge runs qemu-img.
type judge struct {
	ctx context.Context
	dir string
}

// ask runs a command on an image. What is last among args comes after the image where the command takes two files.
func (q *judge) ask(command, image string, args ...string) ([]byte, error) {
	at := len(args)
	if command == "compare" || command == "convert" {
		at--
	}
	args = slices.Concat([]string{command, "--object", "secret,id=key,data=" + passphrase, "--image-opts"}, slices.Insert(args, at, image))
	cmd := exec.CommandContext(q.ctx, "qemu-img", args...)
	cmd.Dir = q.dir
	out, err := cmd.Output()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		err = fmt.Errorf("qemu-img %q: %w: %s%s", args, err, out, exit.Stderr)
	}
	return out, err
}

// reads expects that QEMU reads the image, or a snapshot of it, as the first n bytes of want.
func (q *judge) reads(image, snapshot string, want []byte, n int) error {
	args := []string{"-O", "raw", "raw"}
	if snapshot != "" {
		args = append([]string{"-l", "snapshot.name=" + snapshot}, args...)
	}
	if _, err := q.ask("convert", image, args...); err != nil {
		return err
	}
	got, err := os.ReadFile(filepath.Join(q.dir, "raw"))
	if err != nil {
		return err
	}
	want = want[:min(len(want), n)]
	if i := firstDifference(got, want); i >= 0 {
		return fmt.Errorf("snapshot %q: it reads byte %d of %d otherwise", snapshot, i, len(got))
	}
	return nil
}
