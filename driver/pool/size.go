package pool

import (
	"context"
	"errors"
	"fmt"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

const (
	// Granule is what the size of every volume is a multiple of, and the smallest size, in bytes.
	Granule = 1 << 20
	// DefaultSize is the size of a volume whose SizeRange asks for none, in bytes.
	DefaultSize = 1 << 30
)

// SizeRange says which sizes, in bytes, will do.
type SizeRange struct {
	Required int64 // at least; 0: any
	Limit    int64 // at most; 0: any
}

func (r SizeRange) validate() error {
	if r.Required < 0 || r.Limit < 0 {
		return fmt.Errorf("%w: negative size", ErrInvalid)
	}
	if r.Limit > 0 && r.Required > r.Limit {
		return fmt.Errorf("%w: required %d bytes, but at most %d", ErrOutOfRange, r.Required, r.Limit)
	}
	return nil
}

func (r SizeRange) contains(size int64) bool {
	return size >= r.Required && (r.Limit == 0 || size <= r.Limit)
}

// choose returns the size of an image of geometry g: what is required, or else the default, as a multiple of Granule.
func (r SizeRange) choose(g format.Geometry) (int64, error) {
	size := r.Required
	if size == 0 {
		size = DefaultSize
		if r.Limit > 0 {
			size = min(size, r.Limit/Granule*Granule)
		}
	}
	size = max(size, Granule)
	if size > maxSize(g) {
		return 0, fmt.Errorf("%w: %d bytes, with clusters of %d bytes a volume has at most %d",
			ErrOutOfRange, size, g.ClusterSize(), maxSize(g))
	}
	size = (size + Granule - 1) / Granule * Granule
	if r.Limit > 0 && size > r.Limit {
		return 0, fmt.Errorf("%w: no multiple of %d from %d to %d", ErrOutOfRange, Granule, r.Required, r.Limit)
	}
	return size, nil
}

// maxSize returns the largest size of a volume.
func maxSize(g format.Geometry) int64 { return int64(g.MaxVirtualSize()) / Granule * Granule }

// Expand grows a volume until r contains its size, and returns its size. Volumes never shrink: one that is larger than
// r.Required has that fulfilled, one larger than r.Limit is ErrOutOfRange. An open image grows under its users.
func (p *Pool) Expand(ctx context.Context, id string, r SizeRange) (_ int64, err error) {
	if err := r.validate(); err != nil {
		return 0, err
	}
	v, err := p.enter(ctx, id)
	if err != nil {
		return 0, err
	}
	defer p.leave(v)
	if v.live != nil && v.live.image.ReadOnly() {
		return 0, fmt.Errorf("%w: volume %s is open read-only", ErrBusy, id)
	}
	if err := p.usable(v); err != nil {
		return 0, err
	}
	if v.size >= r.Required {
		if !r.contains(v.size) {
			return 0, fmt.Errorf("%w: volume %s has %d bytes already, and volumes never shrink", ErrOutOfRange, id, v.size)
		}
		return v.size, nil
	}
	size, err := r.choose(v.geometry)
	if err != nil {
		return 0, err
	}
	if err := p.promise(&v.promised, footprint(size, v.geometry)-v.promised); err != nil {
		return 0, fmt.Errorf("grow volume %s to %d bytes: %w", id, size, err)
	}
	size, err = p.grow(ctx, v, size)
	p.mu.Lock()
	defer p.mu.Unlock()
	v.setSize(size, v.geometry)
	if err != nil {
		return 0, fmt.Errorf("grow volume %s: %w", id, err)
	}
	return size, nil
}

// grow makes the image of a volume size bytes long, and returns how long it is.
func (p *Pool) grow(ctx context.Context, v *volume, size int64) (_ int64, err error) {
	if v.live != nil {
		err := v.live.image.Resize(ctx, size)
		return v.live.image.Size(), err
	}
	image, err := p.openImage(ctx, v, false)
	if err != nil {
		return v.size, err
	}
	defer func() { err = errors.Join(err, image.Close()) }()
	err = image.Resize(ctx, size)
	return image.Size(), err
}
