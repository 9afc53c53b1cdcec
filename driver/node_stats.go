package driver

import (
	"context"
	"errors"
	"fmt"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/qcow-csi/qcow-csi/driver/mount"
)

// NodeGetVolumeStats does not wait for other calls and lets none wait: it is called all the time.
func (s *node) NodeGetVolumeStats(
	ctx context.Context, r *csi.NodeGetVolumeStatsRequest,
) (*csi.NodeGetVolumeStatsResponse, error) {
	if err := checkHandle(r.GetVolumeId()); err != nil {
		return nil, err
	}
	if r.GetVolumePath() == "" {
		return nil, argumentf("volume_path is missing")
	}
	v := s.ready(r.GetVolumeId())
	if v == nil {
		return nil, fmt.Errorf("%w: %s", errNotThere, r.GetVolumePath())
	}
	if err := s.at(ctx, v, r.GetVolumePath()); err != nil {
		return nil, err
	}
	u, err := s.mounter.Usage(ctx, r.GetVolumePath())
	if errors.Is(err, mount.ErrNotMounted) {
		return nil, fmt.Errorf("%w: %w", errNotThere, err)
	}
	if err != nil {
		return nil, err
	}
	if isBlock(v.capability) {
		size := &csi.VolumeUsage{Unit: csi.VolumeUsage_BYTES, Total: u.TotalBytes}
		return &csi.NodeGetVolumeStatsResponse{Usage: []*csi.VolumeUsage{size}}, nil
	}
	usage := []*csi.VolumeUsage{
		{Unit: csi.VolumeUsage_BYTES, Total: u.TotalBytes, Used: u.UsedBytes, Available: u.AvailableBytes},
	}
	if u.TotalInodes > 0 { // btrfs has no fixed number
		usage = append(usage, &csi.VolumeUsage{
			Unit: csi.VolumeUsage_INODES, Total: u.TotalInodes, Used: u.UsedInodes, Available: u.FreeInodes,
		})
	}
	return &csi.NodeGetVolumeStatsResponse{Usage: usage}, nil
}
