package judge

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"

	"github.com/qcow-csi/qcow-csi/qcow/check"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// bench is a directory in which states are put together and looked at, one at a time.
type bench struct {
	dir   string
	trial *Trial
}

func newBench(parent string, t *Trial) (*bench, error) {
	dir, err := os.MkdirTemp(parent, "bench")
	if err != nil {
		return nil, err
	}
	b := &bench{dir: dir, trial: t}
	return b, writeFiles(dir, t.Beside)
}

func writeFiles(dir string, files map[string][]byte) error {
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// put makes the images hold the contents.
func (b *bench) put(contents [][]byte) error {
	files := map[string][]byte{}
	for i, content := range contents {
		files[b.trial.Images[i].Name] = content
	}
	return writeFiles(b.dir, files)
}

func (b *bench) path(image int) string { return filepath.Join(b.dir, b.trial.Images[image].Name) }

// read puts the contents and reads all images.
func (b *bench) read(ctx context.Context, contents [][]byte) ([]*view, error) {
	if err := b.put(contents); err != nil {
		return nil, err
	}
	return b.views(ctx)
}

// views reads all images. It fails with an *unreadableError if that is the fault of one.
func (b *bench) views(ctx context.Context) ([]*view, error) {
	var views []*view
	for i := range b.trial.Images {
		v, err := readView(ctx, b.path(i))
		if err != nil {
			return nil, err
		}
		views = append(views, v)
	}
	return views, nil
}

// observation is what there is to see in a state.
type observation struct {
	qemu, own verdict
	dirty     bool
	details   string              // of what the checkers say
	kinds     map[check.Kind]bool // of own's findings
	views     []*view             // of each image
	unread    string              // why an image can't be read; then there are no views
	later     string              // what writes to the disks did that they must not do
}

// observe looks at the images of a state.
func (b *bench) observe(ctx context.Context, contents [][]byte) (*observation, error) {
	if err := b.put(contents); err != nil {
		return nil, err
	}
	o := &observation{kinds: map[check.Kind]bool{}}
	for i, content := range contents {
		if err := o.repairDirty(ctx, b.path(i), content); err != nil {
			return nil, err
		}
	}
	for i := range contents {
		if err := o.checkQEMU(ctx, b.path(i)); err != nil {
			return nil, err
		}
		if err := o.checkOwn(ctx, b.path(i)); err != nil {
			return nil, err
		}
	}
	var err error
	o.views, err = b.views(ctx)
	if bad := (*unreadableError)(nil); errors.As(err, &bad) {
		o.unread = bad.what
		return o, nil
	}
	for i := 0; err == nil && o.later == "" && i < len(o.views); i++ {
		o.later, err = writeOn(ctx, b.path(i), o.views[i])
	}
	return o, err
}

// repairDirty opens an image that is marked dirty for writing. That QEMU can't do so is no error here: what comes
// next will say so.
func (o *observation) repairDirty(ctx context.Context, path string, content []byte) error {
	report, _ := check.Check(ctx, storage.NewMemoryFrom(content), check.Options{})
	if report == nil || !report.Dirty {
		return ctx.Err()
	}
	o.dirty = true
	_, err := tool(ctx, "qemu-io", "-f", "qcow2", "-t", "unsafe", "-c", "flush", path)
	if bad := (*unreadableError)(nil); errors.As(err, &bad) {
		return nil
	}
	return err
}

// checkQEMU asks qemu-img check about an image.
func (o *observation) checkQEMU(ctx context.Context, path string) error {
	out, err := exec.CommandContext(ctx, "qemu-img", "check", "-f", "qcow2", path).CombinedOutput()
	said := clean
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && ctx.Err() == nil {
		switch exit.ExitCode() {
		case 2:
			said = corrupt
		case 3:
			said = leaks
		default:
			said = unusable
		}
	} else if err != nil {
		return fmt.Errorf("qemu-img check: %w", err)
	}
	o.qemu = max(o.qemu, said)
	if said >= corrupt {
		o.details += fmt.Sprintf("qemu-img check:\n%s\n", bytes.TrimSpace(out))
	}
	return nil
}

// checkOwn asks package check about an image.
func (o *observation) checkOwn(ctx context.Context, path string) error {
	content, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	report, bad := check.Check(ctx, storage.NewMemoryFrom(content), check.Options{})
	if bad != nil {
		o.own = unusable
		o.details += bad.Error() + "\n"
		return ctx.Err()
	}
	switch {
	case report.Corruptions > 0:
		o.own = max(o.own, corrupt)
		o.details += fmt.Sprintf("package check:\n%v\n", report)
	case report.Leaks > 0:
		o.own = max(o.own, leaks)
	}
	for _, f := range report.Findings {
		o.kinds[f.Kind] = true
	}
	return nil
}

const (
	laterValue  = 0xfe     // no shape and no operation writes it
	laterOffset = 3 << 9   // in a block: not at the beginning of a cluster, unless those are sectors
	laterLength = 20 << 10 // bytes: some small clusters, or a part of a large one
	mostLater   = 48       // writes
)

// writeOn writes to places all over the disk of an image in which v was found, and returns what changed that must not
// change.
func writeOn(ctx context.Context, path string, v *view) (string, error) {
	want := v.disk
	args := []string{"-f", "qcow2", "-t", "unsafe"}
	for _, off := range places(v.disk) {
		want = want.fill(off, laterLength, laterValue)
		args = append(args, "-c", fmt.Sprintf("write -P %d %d %d", laterValue, off, laterLength))
	}
	got := (*view)(nil)
	_, err := tool(ctx, "qemu-io", append(args, path)...)
	if err == nil {
		got, err = readView(ctx, path)
	}
	if bad := (*unreadableError)(nil); errors.As(err, &bad) {
		return "after writing to the disk: " + bad.what, nil
	}
	if err != nil {
		return "", err
	}
	if !maps.EqualFunc(got.snapshots, v.snapshots, (*disk).equal) {
		return "writing to the disk changes a snapshot", nil
	}
	if !got.disk.equal(want) {
		return "writing to the disk changes it elsewhere, or is lost", nil
	}
	return "", nil
}

// places chooses where to write: where there is data, and in between where there is none.
func places(d *disk) []int64 {
	full := numbers(d)
	known := map[int64]bool{}
	for i := range min(len(full), mostLater) {
		n := full[i*len(full)/min(len(full), mostLater)]
		known[n] = true
		known[n+1] = true // free, or full: either will do
	}
	var offs []int64
	for _, n := range slices.Sorted(maps.Keys(known)) {
		if off := n*block + laterOffset; off+laterLength <= d.size {
			offs = append(offs, off)
		}
	}
	return offs
}
