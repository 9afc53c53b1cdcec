package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

// volume is a volume as its users have it.
type volume struct {
	demo       *demo
	name       string
	capability *csi.VolumeCapability
	handle     string
	staging    string
	target     string
	staged     bool
	published  bool
}

func (d *demo) newVolume(name string, c *csi.VolumeCapability) *volume {
	v := &volume{
		demo: d, name: name, capability: c,
		staging: filepath.Join(d.dir, name, "staging"), target: filepath.Join(d.dir, name, "pod"),
	}
	d.volumes = append(d.volumes, v)
	return v
}

// image returns the path of the volume's image.
func (v *volume) image() string {
	return filepath.Join(v.demo.storage(), "volumes", path.Base(v.handle), "head.qcow2")
}

func (v *volume) create(ctx context.Context, size int64) error {
	r, err := v.demo.CreateVolume(ctx, &csi.CreateVolumeRequest{
		Name:                      "pvc-demo-" + v.name,
		CapacityRange:             &csi.CapacityRange{RequiredBytes: size},
		VolumeCapabilities:        []*csi.VolumeCapability{v.capability},
		AccessibilityRequirements: &csi.TopologyRequirement{Requisite: []*csi.Topology{v.demo.topology}},
	})
	if err != nil {
		return err
	}
	v.handle = r.GetVolume().GetVolumeId()
	if got := r.GetVolume().GetCapacityBytes(); got != size {
		return fmt.Errorf("it has %d bytes", got)
	}
	return nil
}

func (v *volume) stage(ctx context.Context) error {
	if err := os.MkdirAll(v.staging, 0o755); err != nil {
		return err
	}
	v.staged = true
	_, err := v.demo.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{
		VolumeId: v.handle, StagingTargetPath: v.staging, VolumeCapability: v.capability,
	})
	return err
}

func (v *volume) publish(ctx context.Context, readOnly bool) error {
	if err := os.MkdirAll(filepath.Dir(v.target), 0o755); err != nil {
		return err
	}
	v.published = true
	_, err := v.demo.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{
		VolumeId: v.handle, StagingTargetPath: v.staging, TargetPath: v.target,
		VolumeCapability: v.capability, Readonly: readOnly,
	})
	return err
}

func (v *volume) grow(ctx context.Context, size int64) error {
	want := &csi.CapacityRange{RequiredBytes: size}
	r, err := v.demo.ControllerExpandVolume(ctx, &csi.ControllerExpandVolumeRequest{
		VolumeId: v.handle, CapacityRange: want, VolumeCapability: v.capability,
	})
	if err != nil {
		return err
	}
	if r.GetCapacityBytes() != size || !r.GetNodeExpansionRequired() {
		return fmt.Errorf("ControllerExpandVolume answers %v", r)
	}
	_, err = v.demo.NodeExpandVolume(ctx, &csi.NodeExpandVolumeRequest{
		VolumeId: v.handle, VolumePath: v.target, StagingTargetPath: v.staging,
		CapacityRange: want, VolumeCapability: v.capability,
	})
	return err
}

// stats returns the statistics of the volume in words.
func (v *volume) stats(ctx context.Context) (string, error) {
	r, err := v.demo.NodeGetVolumeStats(ctx, &csi.NodeGetVolumeStatsRequest{VolumeId: v.handle, VolumePath: v.target})
	if err != nil {
		return "", err
	}
	for _, u := range r.GetUsage() {
		if u.GetUnit() == csi.VolumeUsage_BYTES && u.GetTotal() > 0 {
			return fmt.Sprintf("%d MiB used of %d MiB", u.GetUsed()/mebibyte, u.GetTotal()/mebibyte), nil
		}
	}
	return "", fmt.Errorf("there are none in %v", r)
}

func (v *volume) unpublish(ctx context.Context) error {
	_, err := v.demo.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: v.handle, TargetPath: v.target})
	if err == nil {
		v.published = false
	}
	return err
}

func (v *volume) unstage(ctx context.Context) error {
	_, err := v.demo.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: v.handle, StagingTargetPath: v.staging})
	if err == nil {
		v.staged = false
	}
	return err
}

func (v *volume) delete(ctx context.Context) error {
	_, err := v.demo.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: v.handle})
	return err
}

// takeDown ends what uses the volume.
func (v *volume) takeDown(ctx context.Context) error {
	var errs []error
	if v.published {
		errs = append(errs, v.unpublish(ctx))
	}
	if v.staged {
		errs = append(errs, v.unstage(ctx))
	}
	return errors.Join(errs...)
}
