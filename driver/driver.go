// Package driver is the CSI driver: the Identity, Controller and Node services of the Container Storage Interface 1.13
// over one storage directory. It and cmd are the only places that know gRPC, CSI and Kubernetes.
//
// # How a call runs
//
// A call is validated (InvalidArgument), then its volume is marked as busy, so that a second call for the same volume
// that arrives meanwhile is told to come again (Aborted), then it is carried out on the pool, the attacher and the
// mounter. Those know nothing of each other; what ties them together is here:
//
//	stage     open the image (pool) -> block device (attach) -> format if it was never used, mount (mount)
//	publish   bind the staged directory, or the device node of a raw block volume, to the pod's path
//	unpublish, unstage: the reverse
//	grow      the image through whoever has it open (pool), then the device's size (attach), then the filesystem (mount)
//
// Every call may be repeated, after success and after any failure. One that fails part way undoes what it did, with a
// context of its own, because the caller's may be what ended. Errors are of few classes; errors.go has the one table
// that turns classes into gRPC codes.
//
// # What is remembered
//
// The controller remembers nothing. The node remembers what it has staged: the open image, the device, the paths. After
// the process was killed that is gone, and so is the server behind the devices; Unpublish and Unstage then work from
// what the kernel says, and Stage clears a left-over device away before it makes a new one.
package driver

import (
	"errors"
	"fmt"
	"regexp"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"

	"github.com/qcow-csi/qcow-csi/driver/attach"
	"github.com/qcow-csi/qcow-csi/driver/mount"
	"github.com/qcow-csi/qcow-csi/driver/pool"
)

// DefaultName is the name of the driver, as CSIDriver and StorageClass objects refer to it.
const DefaultName = "qcow-csi.io"

// Config is what a driver is made of. All fields but MaxVolumes are required.
type Config struct {
	Name       string // of the driver: up to 63 characters of a-z, A-Z, 0-9, '-' and '.'
	Version    string
	NodeID     string // of this node, up to 192 bytes
	MaxVolumes int64  // that can be staged on this node; 0: no limit is reported
	Pool       *pool.Pool
	Attacher   attach.Attacher
	Mounter    mount.Mounter
}

var validName = regexp.MustCompile(`^[a-zA-Z]([a-zA-Z0-9.-]{0,61}[a-zA-Z0-9])?$`)

func (c *Config) validate() error {
	switch {
	case !validName.MatchString(c.Name):
		return fmt.Errorf("driver name %q is not 1 to 63 letters, digits, '-' and '.', beginning with a letter", c.Name)
	case c.Version == "":
		return errors.New("no version")
	case c.NodeID == "" || len(c.NodeID) > 192:
		return errors.New("the node id has 1 to 192 bytes")
	case c.MaxVolumes < 0:
		return errors.New("the number of volumes of a node cannot be negative")
	case c.Pool == nil || c.Attacher == nil || c.Mounter == nil:
		return errors.New("pool, attacher or mounter is missing")
	}
	return nil
}

// Driver has the services of one process that is controller and node of its pool at once.
type Driver struct {
	identity   *identity
	controller *controller
	node       *node
}

// New makes a driver.
func New(c Config) (*Driver, error) {
	if err := c.validate(); err != nil {
		return nil, fmt.Errorf("driver configuration: %w", err)
	}
	busy := newInflight()
	place := topology{key: c.Name + "/pool", pool: c.Pool.ID()}
	return &Driver{
		identity:   &identity{name: c.Name, version: c.Version, pool: c.Pool, attacher: c.Attacher},
		controller: &controller{pool: c.Pool, topology: place, busy: busy},
		node: &node{
			id: c.NodeID, maxVolumes: c.MaxVolumes, topology: place, busy: busy,
			pool: c.Pool, attacher: c.Attacher, mounter: c.Mounter, run: runProgram, staged: map[string]*staged{},
		},
	}, nil
}

// Register adds the services to a gRPC server.
func (d *Driver) Register(s grpc.ServiceRegistrar) {
	csi.RegisterIdentityServer(s, d.identity)
	csi.RegisterControllerServer(s, d.controller)
	csi.RegisterNodeServer(s, d.node)
}
