package driver

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/qcow-csi/qcow-csi/driver/mount"
	"github.com/qcow-csi/qcow-csi/driver/pool"
)

func topologyOf(segments ...string) *csi.Topology {
	m := map[string]string{}
	for i := 0; i < len(segments); i += 2 {
		m[segments[i]] = segments[i+1]
	}
	return &csi.Topology{Segments: m}
}

func TestCreateVolumeRequests(t *testing.T) {
	p := startDriver(t)
	key := DefaultName + "/pool"
	for name, c := range map[string]struct {
		change func(r *csi.CreateVolumeRequest)
		code   codes.Code
		size   int64
	}{
		"plain":   {func(*csi.CreateVolumeRequest) {}, codes.OK, 16 * mebibyte},
		"no name": {func(r *csi.CreateVolumeRequest) { r.Name = "" }, codes.InvalidArgument, 0},
		"hostile name": {func(r *csi.CreateVolumeRequest) {
			r.Name = "../../etc/passwd"
		}, codes.OK, 16 * mebibyte},
		"tabs are text":         {func(r *csi.CreateVolumeRequest) { r.Name = "a\tb" }, codes.OK, 16 * mebibyte},
		"control characters":    {func(r *csi.CreateVolumeRequest) { r.Name = "a\x00b" }, codes.InvalidArgument, 0},
		"C1 control characters": {func(r *csi.CreateVolumeRequest) { r.Name = "a\u0085b" }, codes.InvalidArgument, 0},
		"longest name": {func(r *csi.CreateVolumeRequest) {
			r.Name = strings.Repeat("n", 128)
		}, codes.OK, 16 * mebibyte},
		"longer name": {func(r *csi.CreateVolumeRequest) {
			r.Name = strings.Repeat("n", 129)
		}, codes.InvalidArgument, 0},
		"no capabilities": {func(r *csi.CreateVolumeRequest) {
			r.VolumeCapabilities = nil
		}, codes.InvalidArgument, 0},
		"empty capability": {func(r *csi.CreateVolumeRequest) {
			r.VolumeCapabilities[0] = &csi.VolumeCapability{}
		}, codes.InvalidArgument, 0},
		"no access mode": {func(r *csi.CreateVolumeRequest) {
			r.VolumeCapabilities[0].AccessMode = nil
		}, codes.InvalidArgument, 0},
		"no access type": {func(r *csi.CreateVolumeRequest) {
			r.VolumeCapabilities[0].AccessType = nil
		}, codes.InvalidArgument, 0},
		"many nodes": {func(r *csi.CreateVolumeRequest) {
			r.VolumeCapabilities[0] = capability("", everywhere)
		}, codes.InvalidArgument, 0},
		"one of two unsupported": {func(r *csi.CreateVolumeRequest) {
			r.VolumeCapabilities = append(r.VolumeCapabilities, capability("ntfs", writer))
		}, codes.InvalidArgument, 0},
		"wild mount flag": {func(r *csi.CreateVolumeRequest) {
			r.VolumeCapabilities[0].GetMount().MountFlags = []string{"loop"}
		}, codes.InvalidArgument, 0},
		"mount group": {func(r *csi.CreateVolumeRequest) {
			r.VolumeCapabilities[0].GetMount().VolumeMountGroup = "5"
		}, codes.InvalidArgument, 0},
		"block": {func(r *csi.CreateVolumeRequest) {
			r.VolumeCapabilities[0] = capability("block", singleWriter)
		}, codes.OK, 16 * mebibyte},
		"btrfs needs more": {func(r *csi.CreateVolumeRequest) {
			r.VolumeCapabilities[0] = capability("btrfs", writer)
		}, codes.OK, mount.MinimumSize("btrfs")},
		"xfs needs more": {func(r *csi.CreateVolumeRequest) {
			r.VolumeCapabilities[0] = capability("xfs", writer)
		}, codes.OK, mount.MinimumSize("xfs")},
		"rounded up": {func(r *csi.CreateVolumeRequest) {
			r.CapacityRange.RequiredBytes++
		}, codes.OK, 17 * mebibyte},
		"no size": {func(r *csi.CreateVolumeRequest) { r.CapacityRange = nil }, codes.OK, pool.DefaultSize},
		"only a limit": {func(r *csi.CreateVolumeRequest) {
			r.CapacityRange = &csi.CapacityRange{LimitBytes: 20*mebibyte + 1}
		}, codes.OK, 20 * mebibyte},
		"limit below the least": {func(r *csi.CreateVolumeRequest) {
			r.CapacityRange = &csi.CapacityRange{LimitBytes: mebibyte}
		}, codes.OutOfRange, 0},
		"no size between": {func(r *csi.CreateVolumeRequest) {
			r.CapacityRange.RequiredBytes++
			r.CapacityRange.LimitBytes = r.CapacityRange.RequiredBytes
		}, codes.OutOfRange, 0},
		"limit below required": {func(r *csi.CreateVolumeRequest) {
			r.CapacityRange.LimitBytes = mebibyte
		}, codes.OutOfRange, 0},
		"negative": {func(r *csi.CreateVolumeRequest) {
			r.CapacityRange.RequiredBytes = -1
		}, codes.InvalidArgument, 0},
		"larger than the disk": {func(r *csi.CreateVolumeRequest) {
			r.CapacityRange.RequiredBytes = 1 << 50
		}, codes.ResourceExhausted, 0},
		"larger than any": {func(r *csi.CreateVolumeRequest) {
			r.CapacityRange.RequiredBytes = 1 << 62
		}, codes.OutOfRange, 0},
		"cluster size": {func(r *csi.CreateVolumeRequest) {
			r.Parameters = map[string]string{"clusterSize": "128Ki"}
		}, codes.OK, 16 * mebibyte},
		"odd cluster size": {func(r *csi.CreateVolumeRequest) {
			r.Parameters = map[string]string{"clusterSize": "100000"}
		}, codes.InvalidArgument, 0},
		"cluster size in words": {func(r *csi.CreateVolumeRequest) {
			r.Parameters = map[string]string{"clusterSize": "large"}
		}, codes.InvalidArgument, 0},
		"misspelt parameter": {func(r *csi.CreateVolumeRequest) {
			r.Parameters = map[string]string{"clustersize": "65536"}
		}, codes.InvalidArgument, 0},
		"sidecar's parameters": {func(r *csi.CreateVolumeRequest) {
			r.Parameters = map[string]string{
				"csi.storage.k8s.io/pvc/name": "x", "csi.storage.k8s.io/pvc/namespace": "y", "csi.storage.k8s.io/pv/name": "z",
			}
		}, codes.OK, 16 * mebibyte},
		"filesystem by parameter": {func(r *csi.CreateVolumeRequest) {
			r.Parameters = map[string]string{"csi.storage.k8s.io/fstype": "xfs"}
		}, codes.OK, mount.MinimumSize("xfs")},
		"unknown filesystem by parameter": {func(r *csi.CreateVolumeRequest) {
			r.Parameters = map[string]string{"csi.storage.k8s.io/fstype": "ntfs"}
		}, codes.InvalidArgument, 0},
		"from a snapshot": {func(r *csi.CreateVolumeRequest) {
			source := &csi.VolumeContentSource_SnapshotSource{SnapshotId: "s"}
			r.VolumeContentSource = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{Snapshot: source}}
		}, codes.InvalidArgument, 0},
		"mutable parameters": {func(r *csi.CreateVolumeRequest) {
			r.MutableParameters = map[string]string{"iops": "5"}
		}, codes.InvalidArgument, 0},
		"here": {func(r *csi.CreateVolumeRequest) {
			r.AccessibilityRequirements = &csi.TopologyRequirement{
				Requisite: []*csi.Topology{topologyOf(key, "elsewhere"), topologyOf(key, p.pool.ID())},
			}
		}, codes.OK, 16 * mebibyte},
		"here, preferably": {func(r *csi.CreateVolumeRequest) {
			r.AccessibilityRequirements = &csi.TopologyRequirement{Preferred: []*csi.Topology{topologyOf(key, p.pool.ID())}}
		}, codes.OK, 16 * mebibyte},
		"elsewhere": {func(r *csi.CreateVolumeRequest) {
			r.AccessibilityRequirements = &csi.TopologyRequirement{Requisite: []*csi.Topology{topologyOf(key, "elsewhere")}}
		}, codes.ResourceExhausted, 0},
		"in a zone": {func(r *csi.CreateVolumeRequest) {
			r.AccessibilityRequirements = &csi.TopologyRequirement{
				Requisite: []*csi.Topology{topologyOf(key, p.pool.ID(), "zone", "1")},
			}
		}, codes.ResourceExhausted, 0},
	} {
		t.Run(name, func(t *testing.T) {
			r := createRequest(name, 16*mebibyte, capability("", writer))
			c.change(r)
			got, err := p.CreateVolume(t.Context(), r)
			wantCode(t, err, c.code)
			if err != nil {
				return
			}
			v := got.GetVolume()
			if v.GetCapacityBytes() != c.size {
				t.Errorf("%d bytes, want %d", v.GetCapacityBytes(), c.size)
			}
			if id, err := parseHandle(v.GetVolumeId(), p.pool.ID()); err != nil || len(v.GetVolumeId()) > 128 {
				t.Errorf("handle %q: %q, %v", v.GetVolumeId(), id, err)
			}
			if len(v.GetAccessibleTopology()) != 1 || v.GetAccessibleTopology()[0].GetSegments()[key] != p.pool.ID() {
				t.Errorf("topology %v", v.GetAccessibleTopology())
			}
			again, err := p.CreateVolume(t.Context(), r)
			if err != nil || !proto.Equal(again, got) {
				t.Errorf("again: %v, %v", again, err)
			}
			if _, err := p.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: v.GetVolumeId()}); err != nil {
				t.Error(err)
			}
		})
	}
	if left, err := p.ListVolumes(t.Context(), &csi.ListVolumesRequest{}); err != nil || len(left.GetEntries()) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

func TestCreateVolumeThatExists(t *testing.T) {
	p := startDriver(t)
	p.create(t, "v", capability("", writer))
	for name, r := range map[string]*csi.CreateVolumeRequest{
		"another size": createRequest("v", 32*mebibyte, capability("", writer)),
		"too large for it": func() *csi.CreateVolumeRequest {
			r := createRequest("v", 1, capability("", writer))
			r.CapacityRange.LimitBytes = 15 * mebibyte
			return r
		}(),
		"other clusters": func() *csi.CreateVolumeRequest {
			r := createRequest("v", 16*mebibyte, capability("", writer))
			r.Parameters = map[string]string{"clusterSize": "4096"}
			return r
		}(),
	} {
		_, err := p.CreateVolume(t.Context(), r)
		t.Log(name, err)
		wantCode(t, err, codes.AlreadyExists)
	}
}

func TestDeleteVolume(t *testing.T) {
	p := startDriver(t)
	_, err := p.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{})
	wantCode(t, err, codes.InvalidArgument)
	c := capability("", writer)
	handle := p.create(t, "v", c)
	if err := p.stage(t, handle, c); err != nil {
		t.Fatal(err)
	}
	_, err = p.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: handle})
	wantCode(t, err, codes.FailedPrecondition)
	if err := p.unstage(t, handle); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		_, err = p.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: handle})
		wantCode(t, err, codes.OK)
	}
}

func TestValidateVolumeCapabilities(t *testing.T) {
	p := startDriver(t)
	ext4, xfs := capability("ext4", writer), capability("xfs", writer)
	handle := p.create(t, "v", ext4)
	if err := p.stage(t, handle, ext4); err != nil {
		t.Fatal(err)
	}
	if err := p.unstage(t, handle); err != nil {
		t.Fatal(err)
	}
	_, err := p.ValidateVolumeCapabilities(t.Context(), &csi.ValidateVolumeCapabilitiesRequest{
		VolumeCapabilities: []*csi.VolumeCapability{ext4},
	})
	wantCode(t, err, codes.InvalidArgument)
	_, err = p.ValidateVolumeCapabilities(t.Context(), &csi.ValidateVolumeCapabilitiesRequest{VolumeId: handle})
	wantCode(t, err, codes.InvalidArgument)
	for name, c := range map[string]struct {
		capabilities []*csi.VolumeCapability
		parameters   map[string]string
		confirmed    bool
	}{
		"what it is":       {[]*csi.VolumeCapability{ext4}, nil, true},
		"the default":      {[]*csi.VolumeCapability{capability("", multiWriter)}, nil, true},
		"its parameters":   {[]*csi.VolumeCapability{ext4}, map[string]string{"clusterSize": "64Ki"}, true},
		"block":            {[]*csi.VolumeCapability{capability("block", writer)}, nil, true},
		"holds ext4":       {[]*csi.VolumeCapability{ext4, xfs}, nil, false},
		"many nodes":       {[]*csi.VolumeCapability{capability("", everywhere)}, nil, false},
		"other parameters": {[]*csi.VolumeCapability{ext4}, map[string]string{"clusterSize": "4Ki"}, false},
		"unknown ones":     {[]*csi.VolumeCapability{ext4}, map[string]string{"x": "y"}, false},
	} {
		r, err := p.ValidateVolumeCapabilities(t.Context(), &csi.ValidateVolumeCapabilitiesRequest{
			VolumeId: handle, VolumeCapabilities: c.capabilities, Parameters: c.parameters,
			VolumeContext: map[string]string{"a": "b"},
		})
		if err != nil {
			t.Fatal(err)
		}
		if (r.GetConfirmed() != nil) != c.confirmed || (r.GetMessage() == "") != c.confirmed {
			t.Errorf("%s: %v", name, r)
		}
		got := r.GetConfirmed()
		if c.confirmed && (len(got.GetVolumeCapabilities()) != len(c.capabilities) || got.GetVolumeContext()["a"] != "b") {
			t.Errorf("%s: %v", name, r)
		}
	}
}

func TestListVolumes(t *testing.T) {
	p := startDriver(t)
	var want []string
	for _, name := range []string{"b", "a", "c", "e", "d"} {
		want = append(want, p.create(t, name, capability("", writer)))
	}
	slices.Sort(want)
	for _, size := range []int32{0, 1, 2, 5, 100} {
		var got []string
		token := ""
		for {
			r, err := p.ListVolumes(t.Context(), &csi.ListVolumesRequest{MaxEntries: size, StartingToken: token})
			if err != nil {
				t.Fatal(err)
			}
			if size > 0 && len(r.GetEntries()) > int(size) {
				t.Errorf("%d entries, want at most %d", len(r.GetEntries()), size)
			}
			for _, e := range r.GetEntries() {
				got = append(got, e.GetVolume().GetVolumeId())
			}
			if token = r.GetNextToken(); token == "" {
				break
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("pages of %d: %v, want %v", size, got, want)
		}
	}
	for _, token := range []string{"invalid", "after/", "after/../x", "5"} {
		_, err := p.ListVolumes(t.Context(), &csi.ListVolumesRequest{StartingToken: token})
		wantCode(t, err, codes.Aborted)
	}
	_, err := p.ListVolumes(t.Context(), &csi.ListVolumesRequest{MaxEntries: -1})
	wantCode(t, err, codes.InvalidArgument)
}

func TestDamagedVolumeDoesNotHideTheOthers(t *testing.T) {
	m := newMachine(t)
	p := m.start(t)
	sick, well := p.create(t, "sick", capability("", writer)), p.create(t, "well", capability("", writer))
	p.kill()
	if err := os.Truncate(filepath.Join(m.dir, "volumes", strings.Split(sick, "/")[1], "volume.json"), 3); err != nil {
		t.Fatal(err)
	}
	p = m.start(t)
	r, err := p.ListVolumes(t.Context(), &csi.ListVolumesRequest{})
	if err != nil || len(r.GetEntries()) != 2 {
		t.Errorf("%v, %v", r, err)
	}
	_, err = p.ControllerGetVolume(t.Context(), &csi.ControllerGetVolumeRequest{VolumeId: sick})
	wantCode(t, err, codes.DataLoss)
	wantCode(t, p.stage(t, sick, capability("", writer)), codes.DataLoss)
	wantCode(t, p.stage(t, well, capability("", writer)), codes.OK)
	wantCode(t, p.unstage(t, well), codes.OK)
	p.wantNothingBut(t, sick)
}

func (p *process) wantNothingBut(t *testing.T, damaged string) {
	t.Helper()
	if _, err := p.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: damaged}); err != nil {
		t.Error(err)
	}
	p.wantNothing(t)
}

func TestGetVolume(t *testing.T) {
	p := startDriver(t)
	handle := p.create(t, "v", capability("", writer))
	r, err := p.ControllerGetVolume(t.Context(), &csi.ControllerGetVolumeRequest{VolumeId: handle})
	v := r.GetVolume()
	if err != nil || v.GetVolumeId() != handle || v.GetCapacityBytes() != 16*mebibyte || r.GetStatus() == nil {
		t.Errorf("%v, %v", r, err)
	}
	_, err = p.ControllerGetVolume(t.Context(), &csi.ControllerGetVolumeRequest{})
	wantCode(t, err, codes.InvalidArgument)
}

func TestGetCapacity(t *testing.T) {
	p := startDriver(t)
	get := func(r *csi.GetCapacityRequest) *csi.GetCapacityResponse {
		t.Helper()
		got, err := p.GetCapacity(t.Context(), r)
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	before := get(&csi.GetCapacityRequest{})
	available := before.GetAvailableCapacity()
	if available <= 0 || before.GetMaximumVolumeSize().GetValue() != available ||
		before.GetMinimumVolumeSize().GetValue() != pool.Granule {
		t.Errorf("%v", before)
	}
	if _, err := p.CreateVolume(t.Context(), createRequest("v", 1<<30, capability("", writer))); err != nil {
		t.Fatal(err)
	}
	// Others use the disk at the same time, so this is no equation.
	if after := get(&csi.GetCapacityRequest{}); before.GetAvailableCapacity()-after.GetAvailableCapacity() < 1<<29 {
		t.Errorf("1 GiB more took only %d bytes", before.GetAvailableCapacity()-after.GetAvailableCapacity())
	}
	if r := get(&csi.GetCapacityRequest{
		AccessibleTopology: topologyOf(DefaultName+"/pool", "elsewhere"),
	}); r.GetAvailableCapacity() != 0 {
		t.Errorf("%v", r)
	}
	if r := get(&csi.GetCapacityRequest{
		AccessibleTopology: topologyOf(DefaultName+"/pool", p.pool.ID()),
	}); r.GetAvailableCapacity() == 0 {
		t.Errorf("%v", r)
	}
	if r := get(&csi.GetCapacityRequest{
		VolumeCapabilities: []*csi.VolumeCapability{capability("xfs", writer)},
	}); r.GetMinimumVolumeSize().GetValue() != 300*mebibyte {
		t.Errorf("%v", r)
	}
	_, err := p.GetCapacity(t.Context(), &csi.GetCapacityRequest{Parameters: map[string]string{"x": "y"}})
	wantCode(t, err, codes.InvalidArgument)
	_, err = p.GetCapacity(t.Context(), &csi.GetCapacityRequest{
		VolumeCapabilities: []*csi.VolumeCapability{capability("", everywhere)},
	})
	wantCode(t, err, codes.InvalidArgument)
}

func TestControllerExpandVolume(t *testing.T) {
	p := startDriver(t)
	handle := p.create(t, "v", capability("", writer))
	for name, c := range map[string]struct {
		r    *csi.ControllerExpandVolumeRequest
		code codes.Code
	}{
		"no volume": {&csi.ControllerExpandVolumeRequest{
			CapacityRange: &csi.CapacityRange{RequiredBytes: 1},
		}, codes.InvalidArgument},
		"no size": {&csi.ControllerExpandVolumeRequest{VolumeId: handle}, codes.InvalidArgument},
		"wrong use": {&csi.ControllerExpandVolumeRequest{
			VolumeId: handle, CapacityRange: &csi.CapacityRange{RequiredBytes: 1},
			VolumeCapability: capability("", everywhere),
		}, codes.InvalidArgument},
		"shrink": {&csi.ControllerExpandVolumeRequest{
			VolumeId: handle, CapacityRange: &csi.CapacityRange{RequiredBytes: mebibyte, LimitBytes: mebibyte},
		}, codes.OutOfRange},
		"negative": {&csi.ControllerExpandVolumeRequest{
			VolumeId: handle, CapacityRange: &csi.CapacityRange{RequiredBytes: -1},
		}, codes.InvalidArgument},
		"beyond disk": {&csi.ControllerExpandVolumeRequest{
			VolumeId: handle, CapacityRange: &csi.CapacityRange{RequiredBytes: 1 << 50},
		}, codes.ResourceExhausted},
		"beyond limit": {&csi.ControllerExpandVolumeRequest{
			VolumeId: handle, CapacityRange: &csi.CapacityRange{RequiredBytes: 1 << 62},
		}, codes.OutOfRange},
	} {
		_, err := p.ControllerExpandVolume(t.Context(), c.r)
		t.Log(name, err)
		wantCode(t, err, c.code)
	}
	for _, size := range []int64{16 * mebibyte, 1, 20 * mebibyte, 20 * mebibyte} {
		r, err := p.ControllerExpandVolume(t.Context(), &csi.ControllerExpandVolumeRequest{
			VolumeId: handle, CapacityRange: &csi.CapacityRange{RequiredBytes: size},
		})
		if err != nil || r.GetCapacityBytes() != max(size, 16*mebibyte) || !r.GetNodeExpansionRequired() {
			t.Errorf("to %d: %v, %v", size, r, err)
		}
	}
}
