package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"

	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/qemucrash/judge"
	"github.com/qcow-csi/qcow-csi/test/qemucrash/recording"
)

// operation is something that QEMU can do to images.
type operation struct {
	name    string
	prepare func(ctx context.Context, st *stage) error // nil: the image of the shape
	images  []judge.Image                              // nil: the image of the shape, Atomic
	beside  []string                                   // files that the images refer to
	// command is of qemu-img. Operations without one are requests of a guest, as many as asks, with these chances in 100.
	command func(s *shape) []string
	asks    chances
}

// stage is the directory in which one operation is recorded.
type stage struct {
	dir   string
	shape *shape
	shim  *recording.Shim
	seed  uint64
}

// command is one that is the same for every shape.
func command(args ...string) func(*shape) []string {
	return func(*shape) []string { return args }
}

var operations = []*operation{
	{name: "snapshot-create", command: command("snapshot", "-c", "s3", image)},
	// What only the first snapshot had becomes free; what the last one shared with the disk becomes the disk's own again.
	{name: "snapshot-delete-first", command: command("snapshot", "-d", "s1", image)},
	{name: "snapshot-delete-last", command: command("snapshot", "-d", "s2", image)},
	{name: "snapshot-apply", command: command("snapshot", "-a", "s1", image)},
	{
		name: "shrink", images: []judge.Image{{Name: image, Rule: judge.Piecewise}}, // what is cut off may be gone early
		command: func(s *shape) []string {
			return []string{"resize", "-q", "--shrink", image, strconv.FormatInt(s.shrunk, 10)}
		},
	},
	{
		name:    "grow",
		command: func(s *shape) []string { return []string{"resize", "-q", image, strconv.FormatInt(s.grown, 10)} },
	},
	{name: "amend-refcount-bits", command: command("amend", "-q", "-o", "refcount_bits=32", image)},
	{
		name: "commit", prepare: prepareCommit, command: command("commit", "-q", overlay),
		images: []judge.Image{{Name: overlay}, {Name: image, Rule: judge.Piecewise}},
	},
	{
		name: "rebase", prepare: prepareRebase, command: command("rebase", "-q", "-F", "qcow2", "-b", newBase, image),
		beside: []string{oldBase, newBase},
	},
	{name: "bitmap-add", command: command("bitmap", "--add", image, "b1")},
	{name: "write", asks: chances{zero: 15}},
	{name: "write-and-discard", prepare: prepareFlat, asks: chances{discard: 35}},
	{name: "write-to-compressed", prepare: prepareCompressed},
}

const (
	overlay = "overlay.qcow2"
	oldBase = "old-base.qcow2"
	newBase = "new-base.qcow2"
)

func prepareCommit(ctx context.Context, st *stage) error {
	s := st.shape
	if err := s.create(ctx, st.dir); err != nil {
		return err
	}
	if err := s.empty(ctx, st.dir, overlay, "-F", "qcow2", "-b", image); err != nil {
		return err
	}
	return write(ctx, st.dir, overlay, across(s, firstRequest))
}

func prepareRebase(ctx context.Context, st *stage) error {
	s := st.shape
	for i, name := range []string{oldBase, newBase} {
		if err := s.empty(ctx, st.dir, name); err != nil {
			return err
		}
		if err := write(ctx, st.dir, name, across(s, byte(firstRequest+i*bases))); err != nil {
			return err
		}
	}
	return s.createOver(ctx, st.dir, "-F", "qcow2", "-b", oldBase)
}

const bases = 8 // fills in a file that across describes

// across returns fills that lie partly where the shape has data, and partly where it has none.
func across(s *shape, value byte) []fill {
	return every(s.size/bases, bases, s.size/bases/2, 160*kib, value)
}

func prepareFlat(ctx context.Context, st *stage) error { return st.shape.flat(ctx, st.dir, image) }

// prepareCompressed makes an image of compressed clusters that take most of a cluster each, so that overwriting a few
// of them leaves a cluster of the file free.
func prepareCompressed(ctx context.Context, st *stage) (err error) {
	const plain = "plain.raw"
	s := st.shape
	f, err := os.Create(filepath.Join(st.dir, plain))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := f.Truncate(s.size); err != nil {
		return err
	}
	noise := rand.NewChaCha8([32]byte{byte(st.seed)})
	for _, layer := range s.layers {
		for _, l := range layer {
			b := make([]byte, l.n)
			for c := int64(0); c < l.n; c += s.cluster {
				if _, err := noise.Read(b[c:min(c+s.cluster*3/4, l.n)]); err != nil {
					return err
				}
			}
			if _, err := f.WriteAt(b, l.off); err != nil {
				return err
			}
		}
	}
	_, err = output(ctx, st.dir, "qemu-img", "convert", "-f", "raw", "-c", "-O", "qcow2",
		"-o", fmt.Sprint("cluster_size=", s.cluster), plain, image)
	return err
}

// record does the operation and returns what there is to judge.
func (o *operation) record(ctx context.Context, st *stage) (*judge.Trial, error) {
	prepare := o.prepare
	if prepare == nil {
		prepare = func(ctx context.Context, st *stage) error { return st.shape.create(ctx, st.dir) }
	}
	if err := prepare(ctx, st); err != nil {
		return nil, err
	}
	t := &judge.Trial{Operation: o.name, Shape: st.shape.name, Beside: map[string][]byte{}, Images: []judge.Image{{Name: image}}}
	if o.images != nil {
		t.Images = append([]judge.Image(nil), o.images...)
	}
	var initial [][]byte
	var paths []string
	for i := range t.Images {
		path := filepath.Join(st.dir, t.Images[i].Name)
		content, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		t.Images[i].Initial = content
		initial, paths = append(initial, content), append(paths, path)
	}
	for _, name := range o.beside {
		content, err := os.ReadFile(filepath.Join(st.dir, name))
		if err != nil {
			return nil, err
		}
		t.Beside[name] = content
	}
	if err := o.do(ctx, st, t, paths); err != nil {
		return nil, err
	}
	final, err := recording.Replay(initial, t.Ops)
	if err != nil {
		return nil, err
	}
	for i, path := range paths {
		content, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		if !bytes.Equal(content, final[i]) {
			return nil, fmt.Errorf("the recording of %s is incomplete:\n%s", path, storage.Trace(t.Ops))
		}
		t.Images[i].Final = content
	}
	return t, nil
}

// do runs the operation under the recorder.
func (o *operation) do(ctx context.Context, st *stage, t *judge.Trial, paths []string) (err error) {
	var cmd *exec.Cmd
	if o.command != nil {
		cmd = exec.CommandContext(ctx, "qemu-img", o.command(st.shape)...)
	} else {
		cmd = exec.CommandContext(ctx, "qemu-io", "-f", "qcow2", "-t", "writeback", "-d", "unmap", image)
	}
	cmd.Dir = st.dir
	log, err := st.shim.Watch(cmd, filepath.Join(st.dir, "log"), paths...)
	if err != nil {
		return err
	}
	if o.command != nil {
		_, err = finish(cmd)
	} else {
		t.Requests, err = ask(cmd, log, requests(st, o.asks))
	}
	if closeErr := log.Close(); err == nil {
		err = closeErr
	}
	t.Ops = log.Ops
	return err
}
