package driver

import (
	"context"
	"fmt"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/qcow-csi/qcow-csi/driver/pool"
)

// controller is the Controller service.
type controller struct {
	csi.UnimplementedControllerServer

	pool     *pool.Pool
	topology topology
	busy     *inflight
}

func (s *controller) ControllerGetCapabilities(
	context.Context, *csi.ControllerGetCapabilitiesRequest,
) (*csi.ControllerGetCapabilitiesResponse, error) {
	response := &csi.ControllerGetCapabilitiesResponse{}
	for _, t := range []csi.ControllerServiceCapability_RPC_Type{
		csi.ControllerServiceCapability_RPC_CREATE_DELETE_VOLUME,
		csi.ControllerServiceCapability_RPC_LIST_VOLUMES,
		csi.ControllerServiceCapability_RPC_GET_VOLUME,
		csi.ControllerServiceCapability_RPC_GET_CAPACITY,
		csi.ControllerServiceCapability_RPC_EXPAND_VOLUME,
		csi.ControllerServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER,
	} {
		rpc := &csi.ControllerServiceCapability_Rpc{Rpc: &csi.ControllerServiceCapability_RPC{Type: t}}
		response.Capabilities = append(response.Capabilities, &csi.ControllerServiceCapability{Type: rpc})
	}
	return response, nil
}

func (s *controller) CreateVolume(ctx context.Context, r *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error) {
	if err := checkName(r.GetName()); err != nil {
		return nil, err
	}
	if err := checkCapabilities(r.GetVolumeCapabilities()); err != nil {
		return nil, err
	}
	params, err := parseParameters(r.GetParameters())
	if err != nil {
		return nil, err
	}
	if r.GetVolumeContentSource() != nil {
		return nil, argumentf("volume_content_source is not supported")
	}
	if len(r.GetMutableParameters()) > 0 {
		return nil, argumentf("mutable_parameters are not supported")
	}
	if err := s.topology.satisfy(r.GetAccessibilityRequirements()); err != nil {
		return nil, err
	}
	done, err := s.busy.start("name "+r.GetName(), "CreateVolume")
	if err != nil {
		return nil, err
	}
	defer done()

	size := sizeRange(r.GetCapacityRange())
	smallest := smallestFor(r.GetVolumeCapabilities(), params.filesystem)
	if size.Required > 0 || size.Limit > 0 && size.Limit < smallest { // else the pool chooses, and chooses larger
		size.Required = max(size.Required, smallest)
	}
	v, err := s.pool.Create(ctx, pool.Spec{
		Name: r.GetName(), Size: size, ClusterSize: params.clusterSize, FilesystemType: params.filesystem,
	})
	if err != nil {
		return nil, err
	}
	for _, c := range r.GetVolumeCapabilities() {
		if err := usable(v, c); err != nil {
			return nil, err
		}
	}
	return &csi.CreateVolumeResponse{Volume: s.describe(v)}, nil
}

// checkName refuses what the specification bans from names.
func checkName(name string) error {
	switch {
	case name == "":
		return argumentf("name is missing")
	case len(name) > pool.MaxNameLength:
		return argumentf("name has %d bytes, more than %d", len(name), pool.MaxNameLength)
	case strings.ContainsFunc(name, func(r rune) bool {
		return r < 0x20 && r != '\t' && r != '\n' && r != '\r' || r >= 0x7f && r <= 0x9f
	}):
		return argumentf("name contains control characters")
	}
	return nil
}

func sizeRange(r *csi.CapacityRange) pool.SizeRange {
	return pool.SizeRange{Required: r.GetRequiredBytes(), Limit: r.GetLimitBytes()}
}

// usable returns nil when v, for what is on it, can be used as c says.
func usable(v pool.Volume, c *csi.VolumeCapability) error {
	want := filesystemOf(c, v.FilesystemType).Type
	if has := v.Format.Filesystem; !isBlock(c) && has != "" && has != want {
		return fmt.Errorf("%w: the volume has a filesystem of type %s, not %s", errIncompatible, has, want)
	}
	return nil
}

// describe returns v as CSI has it. The size of a damaged volume is unknown, which is what 0 means.
func (s *controller) describe(v pool.Volume) *csi.Volume {
	return &csi.Volume{
		VolumeId:           volumeHandle(s.pool.ID(), v.ID),
		CapacityBytes:      v.Size,
		AccessibleTopology: []*csi.Topology{s.topology.segments()},
	}
}

func (s *controller) DeleteVolume(ctx context.Context, r *csi.DeleteVolumeRequest) (*csi.DeleteVolumeResponse, error) {
	if err := checkHandle(r.GetVolumeId()); err != nil {
		return nil, err
	}
	id, err := parseHandle(r.GetVolumeId(), s.pool.ID())
	if err != nil { // deleted, or never a volume
		return &csi.DeleteVolumeResponse{}, nil
	}
	done, err := s.busy.start(r.GetVolumeId(), "DeleteVolume")
	if err != nil {
		return nil, err
	}
	defer done()
	if err := s.pool.Delete(ctx, id); err != nil {
		return nil, err
	}
	return &csi.DeleteVolumeResponse{}, nil
}

func (s *controller) ValidateVolumeCapabilities(
	ctx context.Context, r *csi.ValidateVolumeCapabilitiesRequest,
) (*csi.ValidateVolumeCapabilitiesResponse, error) {
	if err := checkHandle(r.GetVolumeId()); err != nil {
		return nil, err
	}
	if len(r.GetVolumeCapabilities()) == 0 {
		return nil, argumentf("volume_capabilities are missing")
	}
	id, err := parseHandle(r.GetVolumeId(), s.pool.ID())
	if err != nil {
		return nil, err
	}
	v, err := s.pool.Get(ctx, id)
	if err != nil {
		return nil, err
	}
	if err := confirm(v, r); err != nil {
		return &csi.ValidateVolumeCapabilitiesResponse{Message: err.Error()}, nil //nolint:nilerr // that is the answer
	}
	return &csi.ValidateVolumeCapabilitiesResponse{Confirmed: &csi.ValidateVolumeCapabilitiesResponse_Confirmed{
		VolumeContext: r.GetVolumeContext(), VolumeCapabilities: r.GetVolumeCapabilities(), Parameters: r.GetParameters(),
	}}, nil
}

// confirm returns nil when v has what the request asks about.
func confirm(v pool.Volume, r *csi.ValidateVolumeCapabilitiesRequest) error {
	params, err := parseParameters(r.GetParameters())
	if err != nil {
		return err
	}
	if params.clusterSize != 0 && params.clusterSize != v.ClusterSize {
		return argumentf("the volume has clusters of %d bytes", v.ClusterSize)
	}
	if err := checkCapabilities(r.GetVolumeCapabilities()); err != nil {
		return err
	}
	for _, c := range r.GetVolumeCapabilities() {
		if err := usable(v, c); err != nil {
			return err
		}
	}
	return nil
}

// tokenPrefix makes a token of ListVolumes from the id of the last volume of a page. No id contains a slash.
const tokenPrefix = "after/"

func (s *controller) ListVolumes(ctx context.Context, r *csi.ListVolumesRequest) (*csi.ListVolumesResponse, error) {
	if r.GetMaxEntries() < 0 {
		return nil, argumentf("max_entries is negative")
	}
	after, ok := strings.CutPrefix(r.GetStartingToken(), tokenPrefix)
	if r.GetStartingToken() != "" && (!ok || !pool.ValidID(after)) {
		return nil, errToken
	}
	volumes, more, err := s.pool.List(ctx, after, int(r.GetMaxEntries()))
	if err != nil {
		return nil, err
	}
	response := &csi.ListVolumesResponse{}
	for _, v := range volumes {
		response.Entries = append(response.Entries, &csi.ListVolumesResponse_Entry{Volume: s.describe(v)})
	}
	if more {
		response.NextToken = tokenPrefix + volumes[len(volumes)-1].ID
	}
	return response, nil
}

func (s *controller) ControllerGetVolume(
	ctx context.Context, r *csi.ControllerGetVolumeRequest,
) (*csi.ControllerGetVolumeResponse, error) {
	if err := checkHandle(r.GetVolumeId()); err != nil {
		return nil, err
	}
	id, err := parseHandle(r.GetVolumeId(), s.pool.ID())
	if err != nil {
		return nil, err
	}
	v, err := s.pool.Get(ctx, id)
	if err != nil {
		return nil, err
	}
	return &csi.ControllerGetVolumeResponse{
		Volume: s.describe(v), Status: &csi.ControllerGetVolumeResponse_VolumeStatus{},
	}, nil
}

// GetCapacity reports the size of the largest volume that could be created, tables included in the reckoning.
func (s *controller) GetCapacity(ctx context.Context, r *csi.GetCapacityRequest) (*csi.GetCapacityResponse, error) {
	params, err := parseParameters(r.GetParameters())
	if err != nil {
		return nil, err
	}
	for _, c := range r.GetVolumeCapabilities() {
		if err := checkCapability(c); err != nil {
			return nil, err
		}
	}
	if !s.topology.has(r.GetAccessibleTopology()) {
		return &csi.GetCapacityResponse{}, nil
	}
	c, err := s.pool.Capacity(ctx)
	if err != nil {
		return nil, err
	}
	largest, err := pool.LargestVolume(c.Available, params.clusterSize)
	if err != nil {
		return nil, err
	}
	return &csi.GetCapacityResponse{
		AvailableCapacity: largest,
		MaximumVolumeSize: wrapperspb.Int64(largest),
		MinimumVolumeSize: wrapperspb.Int64(max(pool.Granule, smallestFor(r.GetVolumeCapabilities(), params.filesystem))),
	}, nil
}

// ControllerExpandVolume grows the image, under its users when it is attached. The node then has to tell the kernel,
// for raw block volumes too.
func (s *controller) ControllerExpandVolume(
	ctx context.Context, r *csi.ControllerExpandVolumeRequest,
) (*csi.ControllerExpandVolumeResponse, error) {
	if err := checkHandle(r.GetVolumeId()); err != nil {
		return nil, err
	}
	if r.GetCapacityRange() == nil {
		return nil, argumentf("capacity_range is missing")
	}
	if c := r.GetVolumeCapability(); c != nil {
		if err := checkCapability(c); err != nil {
			return nil, err
		}
	}
	id, err := parseHandle(r.GetVolumeId(), s.pool.ID())
	if err != nil {
		return nil, err
	}
	done, err := s.busy.start(r.GetVolumeId(), "ControllerExpandVolume")
	if err != nil {
		return nil, err
	}
	defer done()
	size, err := s.pool.Expand(ctx, id, sizeRange(r.GetCapacityRange()))
	if err != nil {
		return nil, err
	}
	return &csi.ControllerExpandVolumeResponse{CapacityBytes: size, NodeExpansionRequired: true}, nil
}
