package attach

import (
	"fmt"
	"unicode"
	"unicode/utf8"
)

const (
	// MinBlock is the logical block size of a device whose backend takes requests of any length, in bytes.
	MinBlock = 512
	// MaxBlock is the largest logical block size, in bytes: a page, which is where most kernels end.
	MaxBlock = 4096

	maxVolumeID      = 128  // bytes
	defaultPreferred = 4096 // bytes
)

// Geometry is what a device looks like to the kernel.
type Geometry struct {
	Size        int64 // bytes, a multiple of BlockSize, more than 0
	BlockSize   int   // logical and physical block size in bytes, a power of two from MinBlock to MaxBlock
	Granularity int   // bytes, a power of two: what aligned requests of this length and more do is done well
	ReadOnly    bool
}

// Geometry says what the device of r looks like. It fails with ErrInvalid where r breaks the rules of Request, or where
// the backend has a size or a block size that no device can have.
func (r Request) Geometry() (Geometry, error) {
	if err := checkVolumeID(r.VolumeID); err != nil {
		return Geometry{}, err
	}
	if r.Backend == nil {
		return Geometry{}, fmt.Errorf("%w: no backend", ErrInvalid)
	}
	info := r.Backend.Info()
	g := Geometry{
		Size:        info.Size,
		BlockSize:   max(MinBlock, int(info.MinimumBlock)),
		Granularity: int(info.PreferredBlock),
		ReadOnly:    r.ReadOnly || info.ReadOnly,
	}
	if g.Granularity == 0 {
		g.Granularity = defaultPreferred
	}
	if g.BlockSize > MaxBlock || g.BlockSize&(g.BlockSize-1) != 0 {
		return Geometry{}, fmt.Errorf("%w: the backend wants blocks of %d bytes; a device has a power of two up to %d",
			ErrInvalid, info.MinimumBlock, MaxBlock)
	}
	g.Granularity = max(g.Granularity, g.BlockSize)
	return g, g.CheckSize(g.Size)
}

// CheckSize returns ErrInvalid unless a device with these blocks can be size bytes long.
func (g Geometry) CheckSize(size int64) error {
	if size <= 0 || size%int64(g.BlockSize) != 0 {
		return fmt.Errorf("%w: a device cannot be %d bytes long: it has blocks of %d bytes, and at least one",
			ErrInvalid, size, g.BlockSize)
	}
	return nil
}

// CheckGrowth returns ErrInvalid unless a device with this geometry can become size bytes long.
func (g Geometry) CheckGrowth(size int64) error {
	if size < g.Size {
		return fmt.Errorf("%w: the device is %d bytes long and cannot shrink to %d", ErrInvalid, g.Size, size)
	}
	return g.CheckSize(size)
}

func checkVolumeID(id string) error {
	if id == "" || len(id) > maxVolumeID || !utf8.ValidString(id) {
		return fmt.Errorf("%w: volume id %.200q: want 1 to %d bytes of UTF-8", ErrInvalid, id, maxVolumeID)
	}
	for _, r := range id {
		if unicode.IsControl(r) {
			return fmt.Errorf("%w: volume id %q: control character", ErrInvalid, id)
		}
	}
	return nil
}
