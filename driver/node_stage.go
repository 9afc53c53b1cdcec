package driver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/proto"
	"k8s.io/klog/v2"

	"github.com/qcow-csi/qcow-csi/driver/attach"
	"github.com/qcow-csi/qcow-csi/driver/mount"
	"github.com/qcow-csi/qcow-csi/nbdexport"
)

func (s *node) NodeStageVolume(
	ctx context.Context, r *csi.NodeStageVolumeRequest,
) (*csi.NodeStageVolumeResponse, error) {
	if err := cmp.Or(
		checkHandle(r.GetVolumeId()),
		checkPath("staging_target_path", r.GetStagingTargetPath()),
		checkCapability(r.GetVolumeCapability()),
	); err != nil {
		return nil, err
	}
	done, err := s.busy.start(r.GetVolumeId(), "NodeStageVolume")
	if err != nil {
		return nil, err
	}
	defer done()
	if v := s.ready(r.GetVolumeId()); v != nil {
		err = s.restage(ctx, v, r)
	} else {
		err = s.stage(ctx, r)
	}
	if err != nil {
		return nil, err
	}
	return &csi.NodeStageVolumeResponse{}, nil
}

// restage answers a repeated call. The volume is mounted again if somebody has unmounted it meanwhile.
func (s *node) restage(ctx context.Context, v *staged, r *csi.NodeStageVolumeRequest) error {
	if v.path != filepath.Clean(r.GetStagingTargetPath()) {
		return fmt.Errorf("%w: the volume is staged at %s", errPrecondition, v.path)
	}
	if !proto.Equal(v.capability, r.GetVolumeCapability()) {
		return fmt.Errorf("%w: the volume is staged for another use", errIncompatible)
	}
	if isBlock(v.capability) {
		return nil
	}
	return s.mounter.Mount(ctx, v.device.Path, v.path, filesystemOf(v.capability, v.volume.Volume().FilesystemType))
}

// stage opens the image, makes it a device, and mounts that. What fails part way leaves nothing behind.
func (s *node) stage(ctx context.Context, r *csi.NodeStageVolumeRequest) (err error) {
	handle, c := r.GetVolumeId(), r.GetVolumeCapability()
	id, err := parseHandle(handle, s.pool.ID())
	if err != nil {
		return err
	}
	if v := s.find(handle); v != nil {
		if err := s.unstage(ctx, handle, v, v.path); err != nil {
			return err
		}
	}
	v := &staged{path: filepath.Clean(r.GetStagingTargetPath()), capability: c, published: map[string]publication{}}
	if err := s.checkFree(v.path, handle); err != nil {
		return err
	}
	if v.volume, err = s.pool.Acquire(ctx, id, false); err != nil {
		return err
	}
	if err := s.clearAway(ctx, handle, v.path); err != nil {
		return errors.Join(err, v.volume.Release())
	}
	v.device, err = s.attacher.Attach(ctx, attach.Request{
		VolumeID: handle, Backend: nbdexport.NewImageBackend(v.volume.Image(), nbdexport.ImageOptions{}), ReadOnly: isBlock(c) && readOnlyMode(c),
	})
	if err != nil {
		return errors.Join(err, v.volume.Release())
	}
	s.mu.Lock()
	s.staged[handle] = v
	s.mu.Unlock()
	if err := s.prepare(ctx, v); err != nil {
		ctx, cancel := unwinding(ctx)
		defer cancel()
		return errors.Join(err, s.unstage(ctx, handle, v, v.path))
	}
	s.mu.Lock()
	v.complete = true
	s.mu.Unlock()
	return nil
}

// prepare makes an attached volume ready for publication: formats it if it never had a filesystem, and mounts it. Of a
// raw block volume it only notes that its user may have written anything.
func (s *node) prepare(ctx context.Context, v *staged) error {
	g := guard{v.volume}
	if isBlock(v.capability) {
		return mount.EnsureRawBlock(ctx, g)
	}
	fs := filesystemOf(v.capability, v.volume.Volume().FilesystemType)
	if err := mount.EnsureFilesystem(ctx, s.mounter, v.device.Path, fs, g); err != nil {
		return err
	}
	return s.mounter.Mount(ctx, v.device.Path, v.path, fs)
}

// clearAway removes what an earlier process has left of the volume: its server is gone, so nothing can be lost any
// more.
func (s *node) clearAway(ctx context.Context, handle, path string) error {
	devices, err := s.attacher.List(ctx)
	if err != nil {
		return err
	}
	if err := s.bury(ctx, path); err != nil {
		return err
	}
	for _, d := range devices {
		if d.VolumeID == handle && !d.Served {
			klog.FromContext(ctx).Info("detaching what an earlier process left", "device", d.Path)
			if err := s.attacher.Detach(ctx, handle); err != nil {
				return err
			}
		}
	}
	return nil
}

// bury unmounts what an earlier process has left on path.
func (s *node) bury(ctx context.Context, path string) error {
	mounts, err := s.mounter.Mounts(ctx, path)
	if err != nil || len(mounts) == 0 {
		return err
	}
	klog.FromContext(ctx).Info("unmounting what an earlier process left", "path", path, "device", mounts[0].Device)
	return s.mounter.Unmount(ctx, path)
}

// NodeUnstageVolume goes by what the kernel has, and asks for no volume: it works after the process was killed, and
// after the volume was deleted.
func (s *node) NodeUnstageVolume(
	ctx context.Context, r *csi.NodeUnstageVolumeRequest,
) (*csi.NodeUnstageVolumeResponse, error) {
	handle, path := r.GetVolumeId(), filepath.Clean(r.GetStagingTargetPath())
	if err := cmp.Or(checkHandle(handle), checkPath("staging_target_path", r.GetStagingTargetPath())); err != nil {
		return nil, err
	}
	done, err := s.busy.start(handle, "NodeUnstageVolume")
	if err != nil {
		return nil, err
	}
	defer done()
	if _, err := parseHandle(handle, s.pool.ID()); err != nil { // never a volume of ours
		return &csi.NodeUnstageVolumeResponse{}, nil
	}
	v := s.find(handle)
	switch {
	case v != nil && v.path != path: // not staged there
		return &csi.NodeUnstageVolumeResponse{}, nil
	case v != nil && len(v.published) > 0:
		return nil, fmt.Errorf("%w: the volume is still published", errPrecondition)
	}
	if err := s.checkFree(path, handle); err != nil {
		return nil, err
	}
	if err := s.unstage(ctx, handle, v, path); err != nil {
		return nil, err
	}
	return &csi.NodeUnstageVolumeResponse{}, nil
}

// unstage undoes stage; v is nil when an earlier process staged the volume.
func (s *node) unstage(ctx context.Context, handle string, v *staged, path string) error {
	if err := s.mounter.Unmount(ctx, path); err != nil {
		return err
	}
	if err := s.attacher.Detach(ctx, handle); err != nil {
		return err
	}
	if v == nil {
		return nil
	}
	s.mu.Lock()
	delete(s.staged, handle)
	s.mu.Unlock()
	return v.volume.Release()
}
