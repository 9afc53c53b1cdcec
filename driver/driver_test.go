package driver

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"k8s.io/klog/v2"

	"github.com/qcow-csi/qcow-csi/driver/attach"
	"github.com/qcow-csi/qcow-csi/driver/drivertest"
	"github.com/qcow-csi/qcow-csi/driver/pool"
)

const mebibyte = 1 << 20

func TestMain(m *testing.M) {
	klog.SetSlogLogger(slog.New(slog.DiscardHandler)) // refusals are the point of many tests
	os.Exit(m.Run())
}

// machine is a node and a storage directory, on which processes of the driver come and go.
type machine struct {
	node *drivertest.Node
	dir  string
	home string // staging and target paths are below it
}

func newMachine(t *testing.T) *machine {
	return &machine{node: drivertest.NewNode(), dir: t.TempDir(), home: t.TempDir()}
}

func (m *machine) path(name string) string { return filepath.Join(m.home, name) }

// process is a running driver, reached as kubelet and the sidecars reach it.
type process struct {
	csi.IdentityClient
	csi.ControllerClient
	csi.NodeClient

	*machine
	driver   *Driver
	pool     *pool.Pool
	attacher *drivertest.Attacher
	kill     func() // ends it; what it had attached and mounted stays
}

// start runs a driver for the length of the test, or until it is killed.
func (m *machine) start(t *testing.T) *process {
	t.Helper()
	p, err := pool.Open(t.Context(), m.dir, pool.Options{})
	if err != nil {
		t.Fatal(err)
	}
	attacher := m.node.Attacher(DefaultName)
	d, err := New(Config{
		Name: DefaultName, Version: "test", NodeID: "node-1", MaxVolumes: 7,
		Pool: p, Attacher: attacher, Mounter: m.node.Mounter,
	})
	if err != nil {
		t.Fatal(err)
	}
	endpoint := "unix://" + filepath.Join(t.TempDir(), "csi.sock")
	listener, err := Listen(t.Context(), endpoint)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- d.Serve(ctx, listener, time.Minute) }()
	conn, err := grpc.NewClient(endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	running := true
	kill := func() {
		if !running {
			return
		}
		running = false
		stop()
		if err := errors.Join(<-served, attacher.Close(), p.Close()); err != nil {
			t.Error(err)
		}
		conn.Close()
	}
	t.Cleanup(kill)
	return &process{
		IdentityClient:   csi.NewIdentityClient(conn),
		ControllerClient: csi.NewControllerClient(conn),
		NodeClient:       csi.NewNodeClient(conn),

		machine: m, driver: d, pool: p, attacher: attacher, kill: kill,
	}
}

func startDriver(t *testing.T) *process {
	t.Helper()
	return newMachine(t).start(t)
}

func wantCode(t *testing.T, err error, want codes.Code) {
	t.Helper()
	if got := status.Code(err); got != want {
		t.Errorf("code is %v (%v), want %v", got, err, want)
	}
}

// capability returns a capability to mount with that filesystem, "" for the default, or to use as "block".
func capability(use string, mode csi.VolumeCapability_AccessMode_Mode) *csi.VolumeCapability {
	c := &csi.VolumeCapability{AccessMode: &csi.VolumeCapability_AccessMode{Mode: mode}}
	if use == "block" {
		c.AccessType = &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}}
	} else {
		c.AccessType = &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: use}}
	}
	return c
}

const (
	writer       = csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER
	multiWriter  = csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER
	singleWriter = csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER
	reader       = csi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY
	everywhere   = csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER
)

func createRequest(name string, size int64, c *csi.VolumeCapability) *csi.CreateVolumeRequest {
	return &csi.CreateVolumeRequest{
		Name: name, CapacityRange: &csi.CapacityRange{RequiredBytes: size}, VolumeCapabilities: []*csi.VolumeCapability{c},
	}
}

// create makes a volume of 16 MiB and returns its handle.
func (p *process) create(t *testing.T, name string, c *csi.VolumeCapability) string {
	t.Helper()
	r, err := p.CreateVolume(t.Context(), createRequest(name, 16*mebibyte, c))
	if err != nil {
		t.Fatal(err)
	}
	return r.GetVolume().GetVolumeId()
}

func (p *process) stage(t *testing.T, handle string, c *csi.VolumeCapability) error {
	t.Helper()
	_, err := p.NodeStageVolume(t.Context(), &csi.NodeStageVolumeRequest{
		VolumeId: handle, StagingTargetPath: p.path("staging"), VolumeCapability: c,
	})
	return err
}

func (p *process) unstage(t *testing.T, handle string) error {
	t.Helper()
	_, err := p.NodeUnstageVolume(t.Context(), &csi.NodeUnstageVolumeRequest{
		VolumeId: handle, StagingTargetPath: p.path("staging"),
	})
	return err
}

func (p *process) publish(t *testing.T, handle, target string, c *csi.VolumeCapability, readOnly bool) error {
	t.Helper()
	_, err := p.NodePublishVolume(t.Context(), &csi.NodePublishVolumeRequest{
		VolumeId: handle, StagingTargetPath: p.path("staging"), TargetPath: p.path(target),
		VolumeCapability: c, Readonly: readOnly,
	})
	return err
}

func (p *process) unpublish(t *testing.T, handle, target string) error {
	t.Helper()
	_, err := p.NodeUnpublishVolume(t.Context(), &csi.NodeUnpublishVolumeRequest{
		VolumeId: handle, TargetPath: p.path(target),
	})
	return err
}

func (p *process) devices(t *testing.T) []attach.Device {
	t.Helper()
	devices, err := p.attacher.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return devices
}

// wantNothing fails the test if anything is attached, mounted or open.
func (p *process) wantNothing(t *testing.T) {
	t.Helper()
	if d := p.devices(t); len(d) > 0 {
		t.Errorf("attached: %v", d)
	}
	if m := p.node.Mounter.Targets(); len(m) > 0 {
		t.Errorf("mounted: %v", m)
	}
	if s := p.driver.node.staged; len(s) > 0 {
		t.Errorf("staged: %v", s)
	}
	volumes, _, err := p.pool.List(t.Context(), "", 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range volumes {
		h, err := p.pool.Acquire(t.Context(), v.ID, false)
		if err == nil {
			err = h.Release()
		}
		if err != nil {
			t.Errorf("volume %s: %v", v.ID, err)
		}
	}
}

// hostileHandles lead to no volume, and above all to nothing outside the pool.
func hostileHandles(poolID string) []string {
	return []string{
		"x", "/", "../..", poolID, poolID + "/", poolID + "/..", poolID + "/../../etc", poolID + "/a/../b",
		"../" + poolID + "/a", poolID + "/A", poolID + "/a\x00", "other/a", poolID + "//a", "/" + poolID + "/a", poolID + "/absent",
	}
}

func TestHostileHandles(t *testing.T) {
	p := startDriver(t)
	c := capability("", writer)
	for _, handle := range hostileHandles(p.pool.ID()) {
		t.Run(handle, func(t *testing.T) {
			if _, err := p.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: handle}); err != nil {
				t.Error(err)
			}
			_, err := p.ControllerGetVolume(t.Context(), &csi.ControllerGetVolumeRequest{VolumeId: handle})
			wantCode(t, err, codes.NotFound)
			_, err = p.ControllerExpandVolume(t.Context(), &csi.ControllerExpandVolumeRequest{
				VolumeId: handle, CapacityRange: &csi.CapacityRange{RequiredBytes: 1},
			})
			wantCode(t, err, codes.NotFound)
			_, err = p.ValidateVolumeCapabilities(t.Context(), &csi.ValidateVolumeCapabilitiesRequest{
				VolumeId: handle, VolumeCapabilities: []*csi.VolumeCapability{c},
			})
			wantCode(t, err, codes.NotFound)
			wantCode(t, p.stage(t, handle, c), codes.NotFound)
			wantCode(t, p.publish(t, handle, "target", c, false), codes.NotFound)
			_, err = p.NodeExpandVolume(t.Context(), &csi.NodeExpandVolumeRequest{
				VolumeId: handle, VolumePath: "some/path",
			})
			wantCode(t, err, codes.NotFound)
			_, err = p.NodeGetVolumeStats(t.Context(), &csi.NodeGetVolumeStatsRequest{
				VolumeId: handle, VolumePath: "some/path",
			})
			wantCode(t, err, codes.NotFound)
			wantCode(t, p.unpublish(t, handle, "target"), codes.OK)
			wantCode(t, p.unstage(t, handle), codes.OK)
		})
	}
	p.wantNothing(t)
	if left, err := os.ReadDir(p.home); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

func TestConfigIsChecked(t *testing.T) {
	p := startDriver(t)
	good := Config{Name: "a.b", Version: "1", NodeID: "n", Pool: p.pool, Attacher: p.attacher, Mounter: p.node.Mounter}
	if _, err := New(good); err != nil {
		t.Error(err)
	}
	for name, spoil := range map[string]func(c *Config){
		"no name":     func(c *Config) { c.Name = "" },
		"wild name":   func(c *Config) { c.Name = "a/b" },
		"no version":  func(c *Config) { c.Version = "" },
		"no node":     func(c *Config) { c.NodeID = "" },
		"long node":   func(c *Config) { c.NodeID = string(make([]byte, 193)) },
		"no pool":     func(c *Config) { c.Pool = nil },
		"no attacher": func(c *Config) { c.Attacher = nil },
		"no mounter":  func(c *Config) { c.Mounter = nil },
		"negative":    func(c *Config) { c.MaxVolumes = -1 },
	} {
		c := good
		spoil(&c)
		if _, err := New(c); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}
