package sanity

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/qcow-csi/qcow-csi/test/require"
)

// TestProgramEnds ends the program while a pod uses a volume, in good order and by SIGKILL. A new one takes down what
// is left, and then serves the volume again with everything that was written: in good order all of it, after a kill
// what was synced.
func TestProgramEnds(t *testing.T) {
	require.Root(t)
	require.Tool(t, "mkfs.ext4", "blkid", "qemu-img")
	executable := build(t)
	for _, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		t.Run(signal.String(), func(t *testing.T) {
			storage, home := t.TempDir(), t.TempDir()
			v := &volume{staging: filepath.Join(home, "staging"), target: filepath.Join(home, "pod")}
			p := start(t, executable, storage)
			v.connect(t, p)
			v.create(t)
			v.use(t)
			synced, cached := bytes.Repeat([]byte("synced "), 300000), bytes.Repeat([]byte("cached "), 300000)
			write(t, filepath.Join(v.target, "synced"), synced, true)
			write(t, filepath.Join(v.target, "cached"), cached, false)
			p.end(signal)

			p = start(t, executable, storage)
			v.connect(t, p)
			v.release(t)
			v.use(t)
			read(t, filepath.Join(v.target, "synced"), synced)
			if signal == syscall.SIGTERM {
				read(t, filepath.Join(v.target, "cached"), cached)
			}
			v.release(t)
			image := filepath.Join(storage, "volumes", path.Base(v.handle), "head.qcow2")
			// What a kill leaks is no damage: 3 is the status for leaks alone.
			if out, err := exec.CommandContext(t.Context(), "qemu-img", "check", image).CombinedOutput(); err != nil {
				var exit *exec.ExitError
				if !errors.As(err, &exit) || exit.ExitCode() != 3 || signal == syscall.SIGTERM {
					t.Errorf("%v: %s", err, out)
				}
			}
			if _, err := v.controller.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: v.handle}); err != nil {
				t.Error(err)
			}
		})
	}
}

// volume is a volume and the paths where it is used.
type volume struct {
	controller      csi.ControllerClient
	node            csi.NodeClient
	handle          string
	staging, target string
}

func (v *volume) connect(t *testing.T, p *program) {
	t.Helper()
	conn, err := grpc.NewClient(p.endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	v.controller, v.node = csi.NewControllerClient(conn), csi.NewNodeClient(conn)
}

func mounted() *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{}},
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
	}
}

func (v *volume) create(t *testing.T) {
	t.Helper()
	r, err := v.controller.CreateVolume(t.Context(), &csi.CreateVolumeRequest{
		Name:               "v",
		CapacityRange:      &csi.CapacityRange{RequiredBytes: 64 << 20},
		VolumeCapabilities: []*csi.VolumeCapability{mounted()},
	})
	if err != nil {
		t.Fatal(err)
	}
	v.handle = r.GetVolume().GetVolumeId()
}

// use stages and publishes the volume.
func (v *volume) use(t *testing.T) {
	t.Helper()
	_, err := v.node.NodeStageVolume(t.Context(), &csi.NodeStageVolumeRequest{
		VolumeId: v.handle, StagingTargetPath: v.staging, VolumeCapability: mounted(),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { v.abandon() })
	_, err = v.node.NodePublishVolume(t.Context(), &csi.NodePublishVolumeRequest{
		VolumeId: v.handle, StagingTargetPath: v.staging, TargetPath: v.target, VolumeCapability: mounted(),
	})
	if err != nil {
		t.Fatal(err)
	}
}

// release unpublishes and unstages the volume.
func (v *volume) release(t *testing.T) {
	t.Helper()
	if _, err := v.node.NodeUnpublishVolume(t.Context(), &csi.NodeUnpublishVolumeRequest{
		VolumeId: v.handle, TargetPath: v.target,
	}); err != nil {
		t.Fatal(err)
	}
	if _, err := v.node.NodeUnstageVolume(t.Context(), &csi.NodeUnstageVolumeRequest{
		VolumeId: v.handle, StagingTargetPath: v.staging,
	}); err != nil {
		t.Fatal(err)
	}
}

// abandon takes down what a failed test has left; released already is fine.
func (v *volume) abandon() {
	ctx := context.Background()
	_, _ = v.node.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: v.handle, TargetPath: v.target})
	_, _ = v.node.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: v.handle, StagingTargetPath: v.staging})
}

func write(t *testing.T, path string, content []byte, sync bool) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.Write(content)
	if err == nil && sync {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, path string, want []byte) {
	t.Helper()
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s does not hold what was written to it", path)
	}
}
