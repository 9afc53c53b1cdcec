package driver

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/qcow-csi/qcow-csi/driver/attach"
)

func TestIdentity(t *testing.T) {
	p := startDriver(t)
	info, err := p.GetPluginInfo(t.Context(), &csi.GetPluginInfoRequest{})
	if err != nil || info.GetName() != DefaultName || info.GetVendorVersion() != "test" {
		t.Errorf("%v, %v", info, err)
	}
	got, err := p.GetPluginCapabilities(t.Context(), &csi.GetPluginCapabilitiesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var controller, topology, online bool
	for _, c := range got.GetCapabilities() {
		service := c.GetService().GetType()
		controller = controller || service == csi.PluginCapability_Service_CONTROLLER_SERVICE
		topology = topology || service == csi.PluginCapability_Service_VOLUME_ACCESSIBILITY_CONSTRAINTS
		online = online || c.GetVolumeExpansion().GetType() == csi.PluginCapability_VolumeExpansion_ONLINE
	}
	if !controller || !topology || !online {
		t.Errorf("capabilities: %v", got)
	}
}

func TestProbeLooksAtWhatVolumesNeed(t *testing.T) {
	p := startDriver(t)
	probe := func() error {
		r, err := p.Probe(t.Context(), &csi.ProbeRequest{})
		if err == nil && !r.GetReady().GetValue() {
			t.Error("not ready")
		}
		return err
	}
	wantCode(t, probe(), codes.OK)
	p.attacher.Fail = func(operation, _ string) error {
		if operation == "probe" {
			return fmt.Errorf("%w: no module", attach.ErrUnavailable)
		}
		return nil
	}
	wantCode(t, probe(), codes.FailedPrecondition)
	p.attacher.Fail = nil
	path := filepath.Join(p.dir, "pool.json")
	if err := os.Rename(path, path+"~"); err != nil {
		t.Fatal(err)
	}
	wantCode(t, probe(), codes.FailedPrecondition)
	if err := os.Rename(path+"~", path); err != nil {
		t.Fatal(err)
	}
	wantCode(t, probe(), codes.OK)
}
