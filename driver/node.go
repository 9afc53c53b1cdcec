package driver

import (
	"context"
	"fmt"
	"path/filepath"
	"sync"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/proto"

	"github.com/qcow-csi/qcow-csi/driver/attach"
	"github.com/qcow-csi/qcow-csi/driver/mount"
	"github.com/qcow-csi/qcow-csi/driver/pool"
)

// node is the Node service.
type node struct {
	csi.UnimplementedNodeServer

	id         string
	maxVolumes int64
	topology   topology
	busy       *inflight
	pool       *pool.Pool
	attacher   attach.Attacher
	mounter    mount.Mounter
	run        func(ctx context.Context, argv ...string) error

	mu     sync.Mutex
	staged map[string]*staged // by volume handle
}

// staged is a volume that this process serves. What changes of it is changed by the one call that may run for the volume,
// and under node.mu, because calls for other volumes and NodeGetVolumeStats look at it at any time.
type staged struct {
	volume     *pool.Handle
	device     attach.Device
	path       string // staging path
	capability *csi.VolumeCapability
	complete   bool // else a call failed, and so did undoing it: only undoing it again is possible

	published map[string]publication // by target path
}

// publication is how a volume was published to a target.
type publication struct {
	capability *csi.VolumeCapability
	readOnly   bool
}

func (p publication) equal(other publication) bool {
	return p.readOnly == other.readOnly && proto.Equal(p.capability, other.capability)
}

// find returns what is known of a volume, or nil.
func (s *node) find(handle string) *staged {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.staged[handle]
}

// ready returns the staged volume of a handle, or nil.
func (s *node) ready(handle string) *staged {
	s.mu.Lock()
	defer s.mu.Unlock()
	if v := s.staged[handle]; v != nil && v.complete {
		return v
	}
	return nil
}

// checkFree refuses a path at which another volume than that of handle is staged or published.
func (s *node) checkFree(path, handle string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for other, v := range s.staged {
		if _, published := v.published[path]; other != handle && (published || v.path == path) {
			return fmt.Errorf("%w: %s is where volume %s is", errPrecondition, path, other)
		}
	}
	return nil
}

// at returns nil when the volume is at path: staged or published there, or bound there by somebody else. Kubelet binds
// the device nodes of raw block volumes to paths of its own, and asks about those.
func (s *node) at(ctx context.Context, v *staged, path string) error {
	path = filepath.Clean(path)
	s.mu.Lock()
	_, published := v.published[path]
	s.mu.Unlock()
	if published || v.path == path {
		return nil
	}
	if filepath.IsAbs(path) {
		mounts, err := s.mounter.Mounts(ctx, path)
		if err != nil {
			return err
		}
		if n := len(mounts); n > 0 && mounts[n-1].Device == v.device.Path {
			return nil
		}
	}
	return fmt.Errorf("%w: %s", errNotThere, path)
}

// checkPath refuses a path that is missing, relative, or cannot be a target.
func checkPath(field, path string) error {
	switch {
	case path == "":
		return argumentf("%s is missing", field)
	case !filepath.IsAbs(path) || filepath.Clean(path) == "/":
		return argumentf("%s is no absolute path to a directory or file of its own", field)
	}
	return nil
}

// unwindTimeout bounds what undoes a call that failed.
const unwindTimeout = time.Minute

// unwinding returns a context for undoing what a call did, which must not end with the call.
func unwinding(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), unwindTimeout)
}

func (s *node) NodeGetCapabilities(
	context.Context, *csi.NodeGetCapabilitiesRequest,
) (*csi.NodeGetCapabilitiesResponse, error) {
	response := &csi.NodeGetCapabilitiesResponse{}
	for _, t := range []csi.NodeServiceCapability_RPC_Type{
		csi.NodeServiceCapability_RPC_STAGE_UNSTAGE_VOLUME,
		csi.NodeServiceCapability_RPC_GET_VOLUME_STATS,
		csi.NodeServiceCapability_RPC_EXPAND_VOLUME,
		csi.NodeServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER,
	} {
		rpc := &csi.NodeServiceCapability_Rpc{Rpc: &csi.NodeServiceCapability_RPC{Type: t}}
		response.Capabilities = append(response.Capabilities, &csi.NodeServiceCapability{Type: rpc})
	}
	return response, nil
}

func (s *node) NodeGetInfo(context.Context, *csi.NodeGetInfoRequest) (*csi.NodeGetInfoResponse, error) {
	return &csi.NodeGetInfoResponse{
		NodeId: s.id, MaxVolumesPerNode: s.maxVolumes, AccessibleTopology: s.topology.segments(),
	}, nil
}

// notStaged is the error of a call that needs a staged volume: it is not, or there is no such volume at all.
func (s *node) notStaged(ctx context.Context, handle string) error {
	id, err := parseHandle(handle, s.pool.ID())
	if err != nil {
		return err
	}
	if _, err := s.pool.Get(ctx, id); err != nil {
		return err
	}
	return fmt.Errorf("%w: the volume is not staged", errPrecondition)
}
