package driver

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/qcow-csi/qcow-csi/driver/mount/mountfake"
)

// TestAfterAKill: the driver is gone, and what it had attached and mounted is still there.
func TestAfterAKill(t *testing.T) {
	for _, use := range []string{"ext4", "block"} {
		c := capability(use, writer)
		prepare := func(t *testing.T) (*process, string) {
			m := newMachine(t)
			p := m.start(t)
			handle := p.create(t, "v", c)
			if err := errors.Join(p.stage(t, handle, c), p.publish(t, handle, "pod", c, false)); err != nil {
				t.Fatal(err)
			}
			p.kill()
			p = m.start(t)
			if d := p.devices(t); len(d) != 1 || d[0].Served {
				t.Fatalf("devices: %v", d)
			}
			return p, handle
		}
		t.Run(use+": everything can be taken down", func(t *testing.T) {
			p, handle := prepare(t)
			wantCode(t, p.publish(t, handle, "pod-2", c, false), codes.FailedPrecondition)
			wantCode(t, p.unstage(t, handle), codes.FailedPrecondition) // published still, says the kernel
			for range 2 {
				wantCode(t, p.unpublish(t, handle, "pod"), codes.OK)
			}
			for range 2 {
				wantCode(t, p.unstage(t, handle), codes.OK)
			}
			p.wantNothing(t)
			_, err := p.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: handle})
			wantCode(t, err, codes.OK)
		})
		t.Run(use+": staging starts afresh", func(t *testing.T) {
			p, handle := prepare(t)
			wantCode(t, p.stage(t, handle, c), codes.FailedPrecondition) // a pod still holds what is left
			wantCode(t, p.unpublish(t, handle, "pod"), codes.OK)
			wantCode(t, p.stage(t, handle, c), codes.OK)
			if d := p.devices(t); len(d) != 1 || !d[0].Served {
				t.Errorf("devices: %v", d)
			}
			wantCode(t, p.publish(t, handle, "pod", c, false), codes.OK)
			wantCode(t, p.unpublish(t, handle, "pod"), codes.OK)
			wantCode(t, p.unstage(t, handle), codes.OK)
			p.wantNothing(t)
		})
		t.Run(use+": a dead mount at a target is replaced", func(t *testing.T) {
			p, handle := prepare(t)
			if err := p.node.Mounter.Unmount(t.Context(), p.path("staging")); err != nil {
				t.Fatal(err)
			}
			// The device goes away under the mount, as one without a server does after a while.
			if err := p.node.Forget(t.Context(), DefaultName, handle); err != nil {
				t.Fatal(err)
			}
			wantCode(t, p.stage(t, handle, c), codes.OK)
			wantCode(t, p.publish(t, handle, "pod", c, false), codes.OK)
			corpse := mountfake.Call{Op: "Unmount", Target: p.path("pod")}
			if calls := p.node.Mounter.Calls("Unmount"); !slices.Contains(calls, corpse) {
				t.Errorf("calls: %v", calls)
			}
			wantCode(t, p.unpublish(t, handle, "pod"), codes.OK)
			wantCode(t, p.unstage(t, handle), codes.OK)
			p.wantNothing(t)
		})
	}
}

func TestShutdownWritesOutWhatIsStaged(t *testing.T) {
	p := startDriver(t)
	var ran []string
	p.driver.node.run = func(_ context.Context, argv ...string) error {
		ran = append(ran, fmt.Sprint(argv))
		return errors.New("told of, and not in the way of the next")
	}
	mounted, block := capability("ext4", writer), capability("block", writer)
	one, two := p.create(t, "one", mounted), p.create(t, "two", block)
	if err := p.stage(t, one, mounted); err != nil {
		t.Fatal(err)
	}
	_, err := p.NodeStageVolume(t.Context(), &csi.NodeStageVolumeRequest{
		VolumeId: two, StagingTargetPath: p.path("block"), VolumeCapability: block,
	})
	if err != nil {
		t.Fatal(err)
	}
	device := p.driver.node.staged[two].device.Path
	p.driver.Shutdown(t.Context())
	slices.Sort(ran)
	if want := []string{"[sync -f " + p.path("staging") + "]", "[sync " + device + "]"}; !slices.Equal(ran, want) {
		t.Errorf("ran %v, want %v", ran, want)
	}
}
