package interop_test

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/codec"
	"github.com/qcow-csi/qcow-csi/qcow/luks"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// ours has the engine do what is asked. It keeps the image open until it is done.
type ours struct {
	s   *subject
	img *qcow.Image
}

func (e *ours) create() (err error) {
	s, c := e.s, e.s.c
	o := qcow.CreateOptions{
		Size: int64(len(s.disk)), ClusterSize: c.number(byCluster), RefcountBits: c.number(byRefcount), Version: c.number(byVersion),
		LazyRefcounts: c.is(byLazy, "on"), ExtendedL2: c.is(byExtended, "on"), DataFileRaw: c.is(byData, "raw"),
	}
	if s.compressionType() == "zstd" {
		o.Compression = codec.Zstd
	}
	if o.Preallocation, err = qcow.ParsePreallocation(c.value(byPreallocation)); err != nil {
		return err
	}
	if s.backing != nil {
		o.BackingFile, o.BackingFormat = s.backing.name, s.backing.format
	}
	if s.encrypted() {
		o.Encryption = &qcow.EncryptionOptions{Passphrase: passphrase(), CreateOptions: luks.CreateOptions{KeyOptions: luks.KeyOptions{Iterations: luks.MinIterations}}}
	}
	f, err := s.b.create(s.name)
	if err != nil {
		return err
	}
	if !c.is(byData, "none") {
		o.DataFileName = s.dataFile()
		if o.DataFile, err = s.b.create(s.dataFile()); err != nil {
			return errors.Join(err, f.Close())
		}
	}
	s.say("# the engine makes %s, of %d bytes", s.name, o.Size)
	err = qcow.Create(f, o)
	if o.DataFile != nil {
		err = errors.Join(err, o.DataFile.Close())
	}
	return errors.Join(err, f.Close())
}

// openImage opens the image of the subject.
func (s *subject) openImage(o qcow.Options) (*qcow.Image, error) {
	mode := storage.ReadWrite
	if o.ReadOnly {
		mode = storage.ReadOnly
	}
	f, err := s.b.open(s.name, mode)
	if err != nil {
		return nil, err
	}
	o.Gate = s.b.gate(s.name)
	if s.encrypted() {
		o.Passphrase = passphrase()
	}
	img, err := qcow.Open(f, o)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return img, nil
}

// with does something with the image open for writing.
func (e *ours) with(do func(ctx context.Context, img *qcow.Image) error, format string, args ...any) (err error) {
	what := fmt.Sprintf(format, args...)
	e.s.say("# the engine: %s", what)
	if e.img == nil {
		if e.img, err = e.s.openImage(qcow.Options{ReserveBytes: 1 << 20}); err != nil {
			return err
		}
	}
	if err := do(context.Background(), e.img); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

func (e *ours) send(list []request) error {
	for _, r := range list {
		if err := e.with(func(_ context.Context, img *qcow.Image) error { return sendTo(img, r) }, "%v", r); err != nil {
			return err
		}
	}
	return nil
}

func sendTo(img *qcow.Image, r request) error {
	p := make([]byte, r.n)
	r.ink.fill(p)
	switch r.deed {
	case plainWrite:
		_, err := img.WriteAt(p, r.off)
		return err
	case compressedWrite:
		return img.WriteCompressed(p, r.off)
	case zeroKept, zeroUnmapped:
		return img.WriteZeroes(r.off, r.n, r.deed == zeroUnmapped)
	case discard:
		return img.Discard(r.off, r.n)
	}
	return fmt.Errorf("no such request: %d", r.deed)
}

func (e *ours) snapshot(name string) error {
	return e.with(func(ctx context.Context, img *qcow.Image) error {
		_, err := img.CreateSnapshot(ctx, name, time.Unix(1700000000, 0))
		return err
	}, "snapshot %s", name)
}

func (e *ours) apply(name string) error {
	return e.with(func(ctx context.Context, img *qcow.Image) error { return img.ApplySnapshot(ctx, name) }, "apply %s", name)
}

func (e *ours) remove(name string) error {
	return e.with(func(ctx context.Context, img *qcow.Image) error { return img.DeleteSnapshot(ctx, name) }, "delete %s", name)
}

func (e *ours) addBitmap(d *dirty) error {
	return e.with(func(ctx context.Context, img *qcow.Image) error {
		return img.AddBitmap(ctx, d.name, qcow.BitmapOptions{Granularity: d.granularity, Disabled: d.disabled})
	}, "add bitmap %s, granularity %d, disabled %t", d.name, d.granularity, d.disabled)
}

func (e *ours) resize(size int64) error {
	return e.with(func(ctx context.Context, img *qcow.Image) error { return img.Resize(ctx, size) }, "resize %d", size)
}

func (e *ours) amend(a amendment) error {
	if err := e.done(); err != nil {
		return err
	}
	e.s.say("# the engine: amend %+v", a)
	f, err := e.s.b.open(e.s.name, storage.ReadWrite)
	if err != nil {
		return err
	}
	o := qcow.AmendOptions{Version: a.version, RefcountBits: a.refcountBits}
	if a.toggleLazy {
		lazy := !e.s.lazy
		o.LazyRefcounts = &lazy
	}
	if e.s.encrypted() {
		o.Passphrase = passphrase()
	}
	return errors.Join(qcow.Amend(context.Background(), f, o), f.Close())
}

func (e *ours) rebase(to *base) error {
	o := qcow.RebaseOptions{Gate: e.s.b.gate(e.s.name)}
	if to != nil {
		o.BackingFile, o.BackingFormat = to.name, to.format
	}
	return e.with(func(ctx context.Context, img *qcow.Image) error { return img.Rebase(ctx, o) }, "rebase to %q", o.BackingFile)
}

func (e *ours) compact() error {
	return e.with(func(ctx context.Context, img *qcow.Image) error {
		_, err := img.Compact(ctx, nil)
		return err
	}, "compact")
}

func (e *ours) stream() error {
	return e.with(func(ctx context.Context, img *qcow.Image) error { return img.Stream(ctx, qcow.StreamOptions{}) }, "stream")
}

func (e *ours) done() error {
	if e.img == nil {
		return nil
	}
	img := e.img
	e.img = nil
	e.s.say("# the engine closes the image")
	return img.Close()
}
