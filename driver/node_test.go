package driver

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/qcow-csi/qcow-csi/driver/attach"
	"github.com/qcow-csi/qcow-csi/driver/mount/mountfake"
)

func TestNodeInfo(t *testing.T) {
	p := startDriver(t)
	info, err := p.NodeGetInfo(t.Context(), &csi.NodeGetInfoRequest{})
	place := info.GetAccessibleTopology().GetSegments()[DefaultName+"/pool"]
	if err != nil || info.GetNodeId() != "node-1" || info.GetMaxVolumesPerNode() != 7 || place != p.pool.ID() {
		t.Errorf("%v, %v", info, err)
	}
}

// TestLifeOfAVolume takes a volume through everything, each call three times, as a caller that lost the answers does.
func TestLifeOfAVolume(t *testing.T) {
	for _, use := range []string{"", "ext4", "xfs", "btrfs", "block"} {
		t.Run("use "+use, func(t *testing.T) {
			p := startDriver(t)
			c := capability(use, multiWriter)
			var handle string
			thrice := func(call func() error) {
				t.Helper()
				for range 3 {
					if err := call(); err != nil {
						t.Fatal(err)
					}
				}
			}
			var size int64
			thrice(func() error {
				r, err := p.CreateVolume(t.Context(), createRequest("v", 16*mebibyte, c))
				handle, size = r.GetVolume().GetVolumeId(), r.GetVolume().GetCapacityBytes()
				return err
			})
			for range 2 { // the second time with what is on it
				thrice(func() error { return p.stage(t, handle, c) })
				if d := p.devices(t); len(d) != 1 || d[0].VolumeID != handle || d[0].Size != size || !d[0].Served {
					t.Fatalf("devices: %v", d)
				}
				thrice(func() error { return p.publish(t, handle, "pod-1", c, false) })
				thrice(func() error { return p.publish(t, handle, "pod-2", c, true) })
				p.wantStats(t, handle, "pod-1", use, size)

				size += 4 * mebibyte
				thrice(func() error {
					_, err := p.ControllerExpandVolume(t.Context(), &csi.ControllerExpandVolumeRequest{
						VolumeId: handle, CapacityRange: &csi.CapacityRange{RequiredBytes: size},
					})
					return err
				})
				thrice(func() error {
					r, err := p.NodeExpandVolume(t.Context(), &csi.NodeExpandVolumeRequest{
						VolumeId: handle, VolumePath: p.path("pod-2"), StagingTargetPath: p.path("staging"),
						VolumeCapability: c, CapacityRange: &csi.CapacityRange{RequiredBytes: size},
					})
					if r.GetCapacityBytes() != size {
						t.Errorf("expanded to %d, want %d", r.GetCapacityBytes(), size)
					}
					return err
				})
				p.wantStats(t, handle, "pod-2", use, size)

				wantCode(t, p.unstage(t, handle), codes.FailedPrecondition)
				thrice(func() error { return p.unpublish(t, handle, "pod-1") })
				wantCode(t, p.unstage(t, handle), codes.FailedPrecondition)
				thrice(func() error { return p.unpublish(t, handle, "pod-2") })
				thrice(func() error { return p.unstage(t, handle) })
				p.wantNothing(t)
			}
			if formats := len(p.node.Mounter.Calls("Format")); formats != map[bool]int{true: 0, false: 1}[use == "block"] {
				t.Errorf("formatted %d times", formats)
			}
			thrice(func() error {
				_, err := p.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: handle})
				return err
			})
			if left, err := os.ReadDir(p.home); err != nil || len(left) > 0 {
				t.Errorf("left: %v, %v", left, err)
			}
		})
	}
}

func (p *process) wantStats(t *testing.T, handle, target, use string, size int64) {
	t.Helper()
	r, err := p.NodeGetVolumeStats(t.Context(), &csi.NodeGetVolumeStatsRequest{
		VolumeId: handle, VolumePath: p.path(target),
	})
	if err != nil {
		t.Error(err)
		return
	}
	units := 2
	if use == "block" || use == "btrfs" {
		units = 1
	}
	u := r.GetUsage()
	if len(u) != units || u[0].GetUnit() != csi.VolumeUsage_BYTES || u[0].GetTotal() != size {
		t.Errorf("stats: %v, want %d bytes and %d units", r, size, units)
	}
}

func TestNodeRequestsThatMakeNoSense(t *testing.T) {
	p := startDriver(t)
	c := capability("", writer)
	handle := p.create(t, "v", c)
	staging, target := p.path("staging"), p.path("target")
	stage := func(r *csi.NodeStageVolumeRequest) error { _, err := p.NodeStageVolume(t.Context(), r); return err }
	publish := func(r *csi.NodePublishVolumeRequest) error { _, err := p.NodePublishVolume(t.Context(), r); return err }
	unstage := func(r *csi.NodeUnstageVolumeRequest) error { _, err := p.NodeUnstageVolume(t.Context(), r); return err }
	unpublish := func(r *csi.NodeUnpublishVolumeRequest) error {
		_, err := p.NodeUnpublishVolume(t.Context(), r)
		return err
	}
	expand := func(r *csi.NodeExpandVolumeRequest) error { _, err := p.NodeExpandVolume(t.Context(), r); return err }
	stats := func(r *csi.NodeGetVolumeStatsRequest) error {
		_, err := p.NodeGetVolumeStats(t.Context(), r)
		return err
	}
	for name, c := range map[string]struct {
		err  error
		code codes.Code
	}{
		"stage: no volume": {stage(&csi.NodeStageVolumeRequest{
			StagingTargetPath: staging, VolumeCapability: c,
		}), codes.InvalidArgument},
		"stage: no path": {stage(&csi.NodeStageVolumeRequest{
			VolumeId: handle, VolumeCapability: c,
		}), codes.InvalidArgument},
		"stage: relative path": {stage(&csi.NodeStageVolumeRequest{
			VolumeId: handle, StagingTargetPath: "a/b", VolumeCapability: c,
		}), codes.InvalidArgument},
		"stage: root": {stage(&csi.NodeStageVolumeRequest{
			VolumeId: handle, StagingTargetPath: "/a/..", VolumeCapability: c,
		}), codes.InvalidArgument},
		"stage: no capability": {stage(&csi.NodeStageVolumeRequest{
			VolumeId: handle, StagingTargetPath: staging,
		}), codes.InvalidArgument},
		"stage: many nodes": {stage(&csi.NodeStageVolumeRequest{
			VolumeId: handle, StagingTargetPath: staging, VolumeCapability: capability("", everywhere),
		}), codes.InvalidArgument},
		"stage: unknown filesystem": {stage(&csi.NodeStageVolumeRequest{
			VolumeId: handle, StagingTargetPath: staging, VolumeCapability: capability("ntfs", writer),
		}), codes.InvalidArgument},
		"publish: no volume": {publish(&csi.NodePublishVolumeRequest{
			StagingTargetPath: staging, TargetPath: target, VolumeCapability: c,
		}), codes.InvalidArgument},
		"publish: no target": {publish(&csi.NodePublishVolumeRequest{
			VolumeId: handle, StagingTargetPath: staging, VolumeCapability: c,
		}), codes.InvalidArgument},
		"publish: no capability": {publish(&csi.NodePublishVolumeRequest{
			VolumeId: handle, StagingTargetPath: staging, TargetPath: target,
		}), codes.InvalidArgument},
		"publish: no staging path": {publish(&csi.NodePublishVolumeRequest{
			VolumeId: handle, TargetPath: target, VolumeCapability: c,
		}), codes.FailedPrecondition},
		"publish: not staged": {publish(&csi.NodePublishVolumeRequest{
			VolumeId: handle, StagingTargetPath: staging, TargetPath: target, VolumeCapability: c,
		}), codes.FailedPrecondition},
		"unstage: no volume": {unstage(&csi.NodeUnstageVolumeRequest{
			StagingTargetPath: staging,
		}), codes.InvalidArgument},
		"unstage: no path": {unstage(&csi.NodeUnstageVolumeRequest{VolumeId: handle}), codes.InvalidArgument},
		"unstage: not staged": {unstage(&csi.NodeUnstageVolumeRequest{
			VolumeId: handle, StagingTargetPath: staging,
		}), codes.OK},
		"unpublish: no volume": {unpublish(&csi.NodeUnpublishVolumeRequest{
			TargetPath: target,
		}), codes.InvalidArgument},
		"unpublish: no target": {unpublish(&csi.NodeUnpublishVolumeRequest{VolumeId: handle}), codes.InvalidArgument},
		"unpublish: root": {unpublish(&csi.NodeUnpublishVolumeRequest{
			VolumeId: handle, TargetPath: "/",
		}), codes.InvalidArgument},
		"unpublish: not published": {unpublish(&csi.NodeUnpublishVolumeRequest{
			VolumeId: handle, TargetPath: target,
		}), codes.OK},
		"expand: no volume": {expand(&csi.NodeExpandVolumeRequest{VolumePath: target}), codes.InvalidArgument},
		"expand: no path":   {expand(&csi.NodeExpandVolumeRequest{VolumeId: handle}), codes.InvalidArgument},
		"expand: negative": {expand(&csi.NodeExpandVolumeRequest{
			VolumeId: handle, VolumePath: target, CapacityRange: &csi.CapacityRange{RequiredBytes: -1},
		}), codes.InvalidArgument},
		"expand: unsupported use": {expand(&csi.NodeExpandVolumeRequest{
			VolumeId: handle, VolumePath: target, VolumeCapability: capability("", everywhere),
		}), codes.InvalidArgument},
		"expand: not staged": {expand(&csi.NodeExpandVolumeRequest{
			VolumeId: handle, VolumePath: target,
		}), codes.FailedPrecondition},
		"statistics: no volume": {stats(&csi.NodeGetVolumeStatsRequest{VolumePath: target}), codes.InvalidArgument},
		"statistics: no path":   {stats(&csi.NodeGetVolumeStatsRequest{VolumeId: handle}), codes.InvalidArgument},
		"statistics: not there": {stats(&csi.NodeGetVolumeStatsRequest{
			VolumeId: handle, VolumePath: target,
		}), codes.NotFound},
		"statistics: relative path": {stats(&csi.NodeGetVolumeStatsRequest{
			VolumeId: handle, VolumePath: "some/path",
		}), codes.NotFound},
		"stage: relative to nothing": {stage(&csi.NodeStageVolumeRequest{
			VolumeId: "x", StagingTargetPath: "", VolumeCapability: c,
		}), codes.InvalidArgument},
	} {
		t.Log(name, c.err)
		wantCode(t, c.err, c.code)
	}
	p.wantNothing(t)
}

func TestStagedOtherwise(t *testing.T) {
	p := startDriver(t)
	ext4 := capability("ext4", writer)
	handle := p.create(t, "v", ext4)
	if err := p.stage(t, handle, ext4); err != nil {
		t.Fatal(err)
	}
	wantCode(t, p.stage(t, handle, capability("xfs", writer)), codes.AlreadyExists)
	wantCode(t, p.stage(t, handle, capability("block", writer)), codes.AlreadyExists)
	wantCode(t, p.stage(t, handle, capability("ext4", reader)), codes.AlreadyExists)
	_, err := p.NodeStageVolume(t.Context(), &csi.NodeStageVolumeRequest{
		VolumeId: handle, StagingTargetPath: p.path("elsewhere"), VolumeCapability: ext4,
	})
	wantCode(t, err, codes.FailedPrecondition)
	_, err = p.NodeUnstageVolume(t.Context(), &csi.NodeUnstageVolumeRequest{
		VolumeId: handle, StagingTargetPath: p.path("elsewhere"),
	})
	wantCode(t, err, codes.OK)
	wantCode(t, p.publish(t, handle, "pod", capability("block", writer), false), codes.FailedPrecondition)
	wantCode(t, p.publish(t, handle, "pod", capability("xfs", writer), false), codes.FailedPrecondition)
	_, err = p.NodePublishVolume(t.Context(), &csi.NodePublishVolumeRequest{
		VolumeId: handle, StagingTargetPath: p.path("elsewhere"), TargetPath: p.path("pod"), VolumeCapability: ext4,
	})
	wantCode(t, err, codes.FailedPrecondition)

	// The same staging path, written another way.
	_, err = p.NodeStageVolume(t.Context(), &csi.NodeStageVolumeRequest{
		VolumeId: handle, StagingTargetPath: p.path("x") + "/../staging/", VolumeCapability: ext4,
	})
	wantCode(t, err, codes.OK)

	// Somebody unmounts it; the next call makes it good.
	if err := p.node.Mounter.Unmount(t.Context(), p.path("staging")); err != nil {
		t.Fatal(err)
	}
	wantCode(t, p.stage(t, handle, ext4), codes.OK)
	if mounts, err := p.node.Mounter.Mounts(t.Context(), p.path("staging")); err != nil || len(mounts) != 1 {
		t.Errorf("%v, %v", mounts, err)
	}
}

// TestPathsOfOthers: whatever the caller mixes up, no volume is taken down for another one.
func TestPathsOfOthers(t *testing.T) {
	p := startDriver(t)
	c := capability("", multiWriter)
	one, other := p.create(t, "one", c), p.create(t, "other", c)
	if err := errors.Join(p.stage(t, one, c), p.publish(t, one, "pod", c, false)); err != nil {
		t.Fatal(err)
	}
	before := p.node.Mounter.Targets()
	stage := func(name string) error {
		_, err := p.NodeStageVolume(t.Context(), &csi.NodeStageVolumeRequest{
			VolumeId: other, StagingTargetPath: p.path(name), VolumeCapability: c,
		})
		return err
	}
	wantCode(t, stage("staging"), codes.FailedPrecondition)
	wantCode(t, stage("pod"), codes.FailedPrecondition)
	wantCode(t, p.unpublish(t, other, "pod"), codes.FailedPrecondition)
	wantCode(t, p.unstage(t, other), codes.FailedPrecondition)
	wantCode(t, p.unpublish(t, one, "staging"), codes.InvalidArgument)
	wantCode(t, p.publish(t, one, "staging", c, false), codes.InvalidArgument)
	if after := p.node.Mounter.Targets(); !slices.Equal(before, after) {
		t.Errorf("mounted was %v, is %v", before, after)
	}
	wantCode(t, stage("other"), codes.OK)
	_, err := p.NodePublishVolume(t.Context(), &csi.NodePublishVolumeRequest{
		VolumeId: other, StagingTargetPath: p.path("other"), TargetPath: p.path("pod"), VolumeCapability: c,
	})
	wantCode(t, err, codes.FailedPrecondition)
	wantCode(t, p.publish(t, one, "pod", c, false), codes.OK)
}

func TestSecondPublication(t *testing.T) {
	for _, c := range []struct {
		mode csi.VolumeCapability_AccessMode_Mode
		code codes.Code // of another target
	}{
		{writer, codes.FailedPrecondition},
		{singleWriter, codes.FailedPrecondition},
		{reader, codes.FailedPrecondition},
		{multiWriter, codes.OK},
	} {
		t.Run(c.mode.String(), func(t *testing.T) {
			p := startDriver(t)
			want := capability("ext4", c.mode)
			handle := p.create(t, "v", want)
			if err := p.stage(t, handle, want); err != nil {
				t.Fatal(err)
			}
			wantCode(t, p.publish(t, handle, "pod-1", want, false), codes.OK)
			wantCode(t, p.publish(t, handle, "pod-1", want, false), codes.OK)
			readOnly := codes.AlreadyExists
			if c.mode == reader { // which it is anyway
				readOnly = codes.OK
			}
			wantCode(t, p.publish(t, handle, "pod-1", want, true), readOnly)
			wantCode(t, p.publish(t, handle, "pod-2", want, false), c.code)
			wantCode(t, p.publish(t, handle, "pod-3", want, true), c.code)
			mounts, err := p.node.Mounter.Mounts(t.Context(), p.path("pod-1"))
			if err != nil || len(mounts) != 1 || mounts[0].ReadOnly != (c.mode == reader) {
				t.Errorf("%v, %v", mounts, err)
			}
			wantCode(t, p.unpublish(t, handle, "pod-1"), codes.OK)
			wantCode(t, p.unpublish(t, handle, "pod-2"), codes.OK)
			wantCode(t, p.unpublish(t, handle, "pod-3"), codes.OK)
			wantCode(t, p.publish(t, handle, "pod-4", want, false), codes.OK)
		})
	}
}

func TestReadOnlyBlockDevice(t *testing.T) {
	p := startDriver(t)
	c := capability("block", reader)
	handle := p.create(t, "v", c)
	if err := p.stage(t, handle, c); err != nil {
		t.Fatal(err)
	}
	if !p.node.ReadOnly(handle) {
		t.Error("the device takes writes")
	}
}

// TestStageFails lets every step of staging fail in turn. Nothing stays behind, and the next attempt succeeds.
func TestStageFails(t *testing.T) {
	errBroken := errors.New("broken")
	operation := func(name string) func(p *process) (repair func()) {
		return func(p *process) func() {
			p.attacher.Fail = func(op, _ string) error {
				if op == name {
					return errBroken
				}
				return nil
			}
			return func() { p.attacher.Fail = nil }
		}
	}
	mounting := func(name string) func(p *process) (repair func()) {
		return func(p *process) func() {
			p.node.Mounter.SetHook(func(c mountfake.Call) error {
				if c.Op == name {
					return errBroken
				}
				return nil
			})
			return func() { p.node.Mounter.SetHook(nil) }
		}
	}
	for name, breakIt := range map[string]func(p *process) (repair func()){
		"list": operation("list"), "attach": operation("attach"), "mounts": mounting("Mounts"),
		"probe": mounting("Probe"), "format": mounting("Format"), "mount": mounting("Mount"),
		"record": func(p *process) func() {
			volumes := filepath.Join(p.dir, "volumes")
			entries, err := os.ReadDir(volumes)
			if err != nil || len(entries) != 1 {
				panic(fmt.Sprint(entries, err))
			}
			blocker := filepath.Join(volumes, entries[0].Name(), "volume.json.new") // in the way of a new record
			if err := os.MkdirAll(filepath.Join(blocker, "x"), 0o700); err != nil {
				panic(err)
			}
			return func() {
				if err := os.RemoveAll(blocker); err != nil {
					panic(err)
				}
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := startDriver(t)
			c := capability("", writer)
			handle := p.create(t, "v", c)
			repair := breakIt(p)
			for range 2 {
				wantCode(t, p.stage(t, handle, c), codes.Internal)
			}
			repair()
			p.wantNothing(t)
			wantCode(t, p.stage(t, handle, c), codes.OK)
			wantCode(t, p.unstage(t, handle), codes.OK)
			p.wantNothing(t)
		})
	}
}

// TestUndoingFailsToo: staging fails, and so does detaching what was attached. The image stays open under the device
// that still uses it, no other call takes the volume for staged, and the next one that can ends it.
func TestUndoingFailsToo(t *testing.T) {
	for _, next := range []string{"stage", "stage otherwise", "unstage"} {
		t.Run(next, func(t *testing.T) {
			p := startDriver(t)
			c := capability("ext4", writer)
			handle := p.create(t, "v", c)
			p.node.Mounter.SetHook(func(c mountfake.Call) error {
				if c.Op == "Mount" {
					return errors.New("broken")
				}
				return nil
			})
			p.attacher.Fail = func(op, _ string) error {
				if op == "detach" {
					return attach.ErrBusy
				}
				return nil
			}
			for range 2 {
				if err := p.stage(t, handle, c); err == nil {
					t.Fatal("staged")
				}
			}
			if _, err := p.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: handle}); err == nil {
				t.Error("deleted under its device")
			}
			wantCode(t, p.publish(t, handle, "pod", c, false), codes.FailedPrecondition)
			p.node.Mounter.SetHook(nil)
			p.attacher.Fail = nil
			switch next {
			case "stage":
				wantCode(t, p.stage(t, handle, c), codes.OK)
			case "stage otherwise":
				wantCode(t, p.stage(t, handle, capability("block", writer)), codes.OK)
			}
			wantCode(t, p.unstage(t, handle), codes.OK)
			p.wantNothing(t)
		})
	}
}

func TestPublishFails(t *testing.T) {
	for _, op := range []string{"Bind", "Mounts"} {
		p := startDriver(t)
		c := capability("", writer)
		handle := p.create(t, "v", c)
		if err := p.stage(t, handle, c); err != nil {
			t.Fatal(err)
		}
		p.node.Mounter.SetHook(func(c mountfake.Call) error {
			if c.Op == op {
				return errors.New("broken")
			}
			return nil
		})
		wantCode(t, p.publish(t, handle, "pod", c, false), codes.Internal)
		p.node.Mounter.SetHook(nil)
		if targets := p.node.Mounter.Targets(); !slices.Equal(targets, []string{p.path("staging")}) {
			t.Errorf("mounted: %v", targets)
		}
		wantCode(t, p.publish(t, handle, "pod", c, false), codes.OK)
		wantCode(t, p.unpublish(t, handle, "pod"), codes.OK)
		wantCode(t, p.unstage(t, handle), codes.OK)
		p.wantNothing(t)
	}
}

// TestPathsOfKubelet: kubelet asks about a raw block volume by a path to which it has bound the device itself.
func TestPathsOfKubelet(t *testing.T) {
	p := startDriver(t)
	c := capability("block", writer)
	handle, other := p.create(t, "v", c), p.create(t, "other", c)
	if err := errors.Join(p.stage(t, handle, c), p.publish(t, handle, "pod", c, false)); err != nil {
		t.Fatal(err)
	}
	_, err := p.NodeStageVolume(t.Context(), &csi.NodeStageVolumeRequest{
		VolumeId: other, StagingTargetPath: p.path("other"), VolumeCapability: c,
	})
	if err != nil {
		t.Fatal(err)
	}
	for name, v := range map[string]string{"bound": handle, "bound-other": other} {
		if err := p.node.Mounter.Bind(t.Context(), p.driver.node.staged[v].device.Path, p.path(name), false); err != nil {
			t.Fatal(err)
		}
	}
	p.wantStats(t, handle, "bound", "block", 16*mebibyte)
	_, err = p.NodeExpandVolume(t.Context(), &csi.NodeExpandVolumeRequest{VolumeId: handle, VolumePath: p.path("bound")})
	wantCode(t, err, codes.OK)
	for _, name := range []string{"bound-other", "absent", "staging"} {
		_, err = p.NodeGetVolumeStats(t.Context(), &csi.NodeGetVolumeStatsRequest{VolumeId: handle, VolumePath: p.path(name)})
		wantCode(t, err, codes.NotFound)
	}
}

func TestNodeExpandVolume(t *testing.T) {
	p := startDriver(t)
	c := capability("", writer)
	handle := p.create(t, "v", c)
	if err := p.stage(t, handle, c); err != nil {
		t.Fatal(err)
	}
	expand := func(path string, required int64, c *csi.VolumeCapability) error {
		_, err := p.NodeExpandVolume(t.Context(), &csi.NodeExpandVolumeRequest{
			VolumeId: handle, VolumePath: path, VolumeCapability: c,
			CapacityRange: &csi.CapacityRange{RequiredBytes: required},
		})
		return err
	}
	wantCode(t, expand(p.path("staging"), 16*mebibyte, nil), codes.OK)
	wantCode(t, expand(p.path("staging"), 1, nil), codes.OK)
	wantCode(t, expand(p.path("staging"), 0, nil), codes.OK)
	wantCode(t, expand(p.path("elsewhere"), 0, nil), codes.NotFound)
	wantCode(t, expand(p.path("staging"), 0, capability("block", writer)), codes.InvalidArgument)
	// The image decides, and it is the controller's.
	wantCode(t, expand(p.path("staging"), 17*mebibyte, nil), codes.OutOfRange)
}
