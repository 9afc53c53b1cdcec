package pool

import (
	"context"
	"errors"
	"fmt"

	"k8s.io/klog/v2"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// Handle is the use of a volume by one holder. It keeps the image open until Release.
type Handle struct {
	pool  *Pool
	v     *volume
	image *qcow.Image
}

// Acquire opens the image of a volume. ErrBusy when it is open already, here or in another process.
func (p *Pool) Acquire(ctx context.Context, id string, readOnly bool) (*Handle, error) {
	v, err := p.enter(ctx, id)
	if err != nil {
		return nil, err
	}
	defer p.leave(v)
	if v.live != nil {
		return nil, fmt.Errorf("%w: volume %s is attached already", ErrBusy, id)
	}
	image, err := p.openImage(ctx, v, readOnly)
	if err != nil {
		return nil, err
	}
	h := &Handle{pool: p, v: v, image: image}
	p.mu.Lock()
	defer p.mu.Unlock()
	v.live = h
	v.setSize(image.Size(), v.geometry)
	return h, nil
}

// openImage opens the head image of a volume whose turn the caller has. What the journal of a process that was killed says is in it again.
func (p *Pool) openImage(ctx context.Context, v *volume, readOnly bool) (*qcow.Image, error) {
	if err := p.usable(v); err != nil {
		return nil, err
	}
	mode := storage.ReadWrite
	if readOnly {
		mode = storage.ReadOnly
	}
	f, err := p.dir.open(v.head(), mode)
	if err != nil {
		return nil, fmt.Errorf("volume %s: %w", v.id, err)
	}
	options := qcow.Options{ReadOnly: readOnly}
	if !readOnly && p.journals != nil {
		journal, err := p.journals.Open(f)
		if err != nil {
			return nil, fmt.Errorf("volume %s: %w", v.id, errors.Join(err, f.Close()))
		}
		options.Journal = journal
	}
	image, err := qcow.Open(f, options)
	if err != nil {
		err = errors.Join(err, f.Close())
		if options.Journal != nil {
			err = errors.Join(err, options.Journal.Close())
		}
		return nil, fmt.Errorf("volume %s: %w", v.id, err)
	}
	switch r := image.Restored(); {
	case r.Lost > 0:
		klog.FromContext(ctx).Error(nil, "writes that a killed process had acknowledged, but not flushed, are lost: another program has written to the image since",
			"volume", v.id, "clusters", r.Lost)
	case r.Clusters > 0:
		klog.FromContext(ctx).Info("restored writes that a killed process had acknowledged", "volume", v.id, "clusters", r.Clusters)
	}
	return image, nil
}

// closeImage flushes and closes the image of a volume whose turn the caller has, if it is open.
func (p *Pool) closeImage(v *volume) error {
	if v.live == nil {
		return nil
	}
	err := v.live.image.Close()
	p.mu.Lock()
	defer p.mu.Unlock()
	v.live = nil
	if err != nil {
		return fmt.Errorf("close volume %s: %w", v.id, err)
	}
	return nil
}

// Image returns the open image.
func (h *Handle) Image() *qcow.Image { return h.image }

// Volume describes the volume as it is now.
func (h *Handle) Volume() Volume {
	h.pool.mu.Lock()
	defer h.pool.mu.Unlock()
	return h.v.view()
}

// SetFormat records, durably, what was done to make the volume usable.
func (h *Handle) SetFormat(ctx context.Context, f Format) error {
	if err := f.validate(); err != nil {
		return fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	v, err := h.pool.enter(ctx, h.v.id)
	if err != nil {
		return err
	}
	defer h.pool.leave(v)
	if v.live != h {
		return fmt.Errorf("%w: handle of volume %s was released", ErrInvalid, v.id)
	}
	rec := v.rec
	rec.Format = f
	b, err := encode(rec)
	if err != nil {
		return err
	}
	if err := h.pool.dir.replace(v.file(), b); err != nil {
		return fmt.Errorf("record of volume %s: %w", v.id, err)
	}
	h.pool.mu.Lock()
	defer h.pool.mu.Unlock()
	v.rec = rec
	return nil
}

// Release flushes and closes the image; releasing again does nothing. After an error the image is closed too, and what
// the guest wrote since its last flush may be lost.
func (h *Handle) Release() error {
	h.v.turn <- struct{}{}
	defer func() { <-h.v.turn }()
	if h.v.live != h {
		return nil
	}
	return h.pool.closeImage(h.v)
}
