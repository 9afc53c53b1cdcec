package driver

import (
	"context"
	"fmt"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/qcow-csi/qcow-csi/driver/pool"
)

// NodeExpandVolume brings the size of the image, which ControllerExpandVolume has changed, to the device and to the
// filesystem.
func (s *node) NodeExpandVolume(
	ctx context.Context, r *csi.NodeExpandVolumeRequest,
) (*csi.NodeExpandVolumeResponse, error) {
	if err := checkHandle(r.GetVolumeId()); err != nil {
		return nil, err
	}
	if r.GetVolumePath() == "" {
		return nil, argumentf("volume_path is missing")
	}
	if c := r.GetVolumeCapability(); c != nil {
		if err := checkCapability(c); err != nil {
			return nil, err
		}
	}
	if want := sizeRange(r.GetCapacityRange()); want.Required < 0 || want.Limit < 0 {
		return nil, argumentf("negative size")
	}
	done, err := s.busy.start(r.GetVolumeId(), "NodeExpandVolume")
	if err != nil {
		return nil, err
	}
	defer done()
	v := s.ready(r.GetVolumeId())
	if v == nil {
		return nil, s.notStaged(ctx, r.GetVolumeId())
	}
	if err := s.at(ctx, v, r.GetVolumePath()); err != nil {
		return nil, err
	}
	if c := r.GetVolumeCapability(); c != nil && isBlock(c) != isBlock(v.capability) {
		return nil, argumentf("the volume is staged as the other of raw block device and filesystem")
	}
	size, err := s.expand(ctx, v, sizeRange(r.GetCapacityRange()))
	if err != nil {
		return nil, err
	}
	return &csi.NodeExpandVolumeResponse{CapacityBytes: size}, nil
}

func (s *node) expand(ctx context.Context, v *staged, want pool.SizeRange) (int64, error) {
	size := v.volume.Image().Size()
	if want.Required > size {
		return 0, fmt.Errorf("%w: the image has %d bytes; ControllerExpandVolume comes first", pool.ErrOutOfRange, size)
	}
	if err := s.attacher.Resize(ctx, v.device.VolumeID, size); err != nil {
		return 0, err
	}
	if isBlock(v.capability) {
		return size, nil
	}
	// The staging path, for a publication may be read-only.
	return size, s.mounter.Grow(ctx, v.device.Path, v.path)
}
