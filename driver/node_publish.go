package driver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

func (s *node) NodePublishVolume(
	ctx context.Context, r *csi.NodePublishVolumeRequest,
) (*csi.NodePublishVolumeResponse, error) {
	target := filepath.Clean(r.GetTargetPath())
	if err := cmp.Or(
		checkHandle(r.GetVolumeId()),
		checkPath("target_path", r.GetTargetPath()),
		checkCapability(r.GetVolumeCapability()),
	); err != nil {
		return nil, err
	}
	if r.GetStagingTargetPath() == "" {
		return nil, fmt.Errorf("%w: staging_target_path is missing", errPrecondition)
	}
	done, err := s.busy.start(r.GetVolumeId(), "NodePublishVolume")
	if err != nil {
		return nil, err
	}
	defer done()
	v := s.ready(r.GetVolumeId())
	if v == nil {
		return nil, s.notStaged(ctx, r.GetVolumeId())
	}
	if v.path != filepath.Clean(r.GetStagingTargetPath()) {
		return nil, fmt.Errorf("%w: the volume is staged at %s", errPrecondition, v.path)
	}
	if v.path == target {
		return nil, argumentf("target_path is the staging path")
	}
	if err := s.checkFree(target, r.GetVolumeId()); err != nil {
		return nil, err
	}
	c := r.GetVolumeCapability()
	if err := v.publishable(target, c); err != nil {
		return nil, err
	}
	want := publication{capability: c, readOnly: r.GetReadonly() || readOnlyMode(c)}
	if err := s.publish(ctx, v, target, want); err != nil {
		return nil, err
	}
	return &csi.NodePublishVolumeResponse{}, nil
}

// publishable returns nil when the volume may be published to target for the use c, as far as it is staged and
// published now.
func (v *staged) publishable(target string, c *csi.VolumeCapability) error {
	preferred := v.volume.Volume().FilesystemType
	has, wants := filesystemOf(v.capability, preferred).Type, filesystemOf(c, preferred).Type
	switch {
	case isBlock(v.capability) != isBlock(c):
		return fmt.Errorf("%w: the volume is staged as the other of raw block device and filesystem", errPrecondition)
	case !isBlock(c) && has != wants:
		return fmt.Errorf("%w: the volume is staged with filesystem %s, not %s", errPrecondition, has, wants)
	}
	for other := range v.published {
		if other != target && !manyTargets(c) {
			return fmt.Errorf("%w: access mode %s allows one target, and the volume is published at %s",
				errPrecondition, c.GetAccessMode().GetMode(), other)
		}
	}
	return nil
}

func (s *node) publish(ctx context.Context, v *staged, target string, want publication) error {
	has, repeated := v.published[target]
	if repeated && !has.equal(want) {
		return fmt.Errorf("%w: the volume is published there for another use", errIncompatible)
	}
	if !repeated { // what is mounted there is a corpse: an earlier process published it, and its server is gone
		if err := s.bury(ctx, target); err != nil {
			return err
		}
	}
	source := v.path
	if isBlock(v.capability) {
		source = v.device.Path
	}
	if err := s.mounter.Bind(ctx, source, target, want.readOnly); err != nil {
		if !repeated {
			ctx, cancel := unwinding(ctx)
			defer cancel()
			err = errors.Join(err, s.mounter.Unmount(ctx, target))
		}
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	v.published[target] = want
	return nil
}

// NodeUnpublishVolume asks for no volume, as NodeUnstageVolume does not.
func (s *node) NodeUnpublishVolume(
	ctx context.Context, r *csi.NodeUnpublishVolumeRequest,
) (*csi.NodeUnpublishVolumeResponse, error) {
	target := filepath.Clean(r.GetTargetPath())
	if err := cmp.Or(checkHandle(r.GetVolumeId()), checkPath("target_path", r.GetTargetPath())); err != nil {
		return nil, err
	}
	done, err := s.busy.start(r.GetVolumeId(), "NodeUnpublishVolume")
	if err != nil {
		return nil, err
	}
	defer done()
	v := s.find(r.GetVolumeId())
	if v != nil && v.path == target {
		return nil, argumentf("target_path is the staging path")
	}
	if err := s.checkFree(target, r.GetVolumeId()); err != nil {
		return nil, err
	}
	if err := s.mounter.Unmount(ctx, target); err != nil {
		return nil, err
	}
	if v != nil {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(v.published, target)
	}
	return &csi.NodeUnpublishVolumeResponse{}, nil
}
