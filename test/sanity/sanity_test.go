// Package sanity runs the conformance suite of the CSI project, csi-sanity, against the driver: once with fakes inside
// this process, which needs no privileges, and against the real program with real block devices and mounts, for mounted
// and for raw block volumes.
//
// The suite can run only once in a process, so each run is a copy of the test binary. Its report is read back: a test
// that was skipped fails the run, unless it is about something that the driver does not claim to do.
package sanity

import (
	"context"
	"encoding/json"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kubernetes-csi/csi-test/v5/pkg/sanity"
	"k8s.io/klog/v2"

	"github.com/qcow-csi/qcow-csi/driver"
	"github.com/qcow-csi/qcow-csi/driver/drivertest"
	"github.com/qcow-csi/qcow-csi/driver/pool"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// What a copy of the test binary is told.
const (
	endpointEnv = "QCOW_CSI_SANITY_ENDPOINT" // of the driver
	accessEnv   = "QCOW_CSI_SANITY_ACCESS"   // "mount" or "block"
	dirEnv      = "QCOW_CSI_SANITY_DIR"      // for staging and target paths
)

const gibibyte = 1 << 30

// TestSpecs is the suite itself, in a process of its own.
func TestSpecs(t *testing.T) {
	endpoint := os.Getenv(endpointEnv)
	if endpoint == "" {
		return // run by the tests below
	}
	config := sanity.NewTestConfig()
	config.Address = endpoint
	config.TargetPath = filepath.Join(os.Getenv(dirEnv), "target")
	config.StagingPath = filepath.Join(os.Getenv(dirEnv), "staging")
	config.TestVolumeAccessType = os.Getenv(accessEnv)
	config.TestVolumeSize = gibibyte
	config.TestVolumeExpandSize = 2 * gibibyte
	sanity.Test(t, config)
}

func TestWithFakes(t *testing.T) {
	for _, access := range []string{"mount", "block"} {
		t.Run(access, func(t *testing.T) { runSpecs(t, startFakes(t), access) })
	}
}

func TestForReal(t *testing.T) {
	require.Root(t)
	require.Tool(t, "mkfs.ext4", "resize2fs", "blkid")
	program := build(t)
	for _, access := range []string{"mount", "block"} {
		t.Run(access, func(t *testing.T) { runSpecs(t, start(t, program, t.TempDir()).endpoint, access) })
	}
}

// startFakes serves a driver with fakes and returns its endpoint.
func startFakes(t *testing.T) string {
	t.Helper()
	klog.SetSlogLogger(slog.New(slog.DiscardHandler))
	p, err := pool.Open(t.Context(), t.TempDir(), pool.Options{})
	if err != nil {
		t.Fatal(err)
	}
	node := drivertest.NewNode()
	attacher := node.Attacher(driver.DefaultName)
	d, err := driver.New(driver.Config{
		Name: driver.DefaultName, Version: "test", NodeID: "node-1", Pool: p, Attacher: attacher, Mounter: node.Mounter,
	})
	if err != nil {
		t.Fatal(err)
	}
	endpoint := "unix://" + filepath.Join(t.TempDir(), "csi.sock")
	listener, err := driver.Listen(t.Context(), endpoint)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- d.Serve(ctx, listener, time.Minute) }()
	t.Cleanup(func() {
		stop()
		for _, err := range []error{<-served, attacher.Close(), p.Close()} {
			if err != nil {
				t.Error(err)
			}
		}
	})
	return endpoint
}

// unclaimed are the reasons for which the suite skips tests of what the driver does not claim.
var unclaimed = []string{
	"ControllerPublishVolume not supported",
	"Controller Publish, UnpublishVolume not supported",
	"ControllerUnpublishVolume not supported",
	"Snapshot not supported",
	"ListSnapshots not supported",
	"GetSnapshot not supported",
	"CreateSnapshot not supported",
	"DeleteSnapshot not supported",
	"Volume Cloning not supported",
	"Modify volume not supported",
	"Modify Volume not supported",
	"ControllerModifyVolume not supported",
	"NodeGetVolumeHealth not supported",
	"NodeGetStorageHealth not supported",
	"ControllerGetVolumeHealth not supported",
	"ControllerListVolumeHealth not supported",
	"GroupControllerService not supported",
}

// claimed is how many tests of the suite, in its version 5.6, are about what the driver claims.
const claimed = 49

// spec is a test of the suite in its report.
type spec struct {
	ContainerHierarchyTexts []string
	LeafNodeText            string
	LeafNodeType            string
	State                   string
	Failure                 struct{ Message string }
}

// runSpecs runs the suite and checks what it says of itself.
func runSpecs(t *testing.T, endpoint, access string) {
	t.Helper()
	report := filepath.Join(t.TempDir(), "report.json")
	cmd := exec.CommandContext(t.Context(), os.Args[0],
		"-test.run=^TestSpecs$", "-ginkgo.json-report="+report, "-ginkgo.no-color")
	cmd.Env = append(os.Environ(), endpointEnv+"="+endpoint, accessEnv+"="+access, dirEnv+"="+t.TempDir())
	out, runErr := cmd.CombinedOutput()
	b, err := os.ReadFile(report)
	if err != nil {
		t.Fatalf("%v, %v: %s", runErr, err, out)
	}
	var suites []struct{ SpecReports []spec }
	if err := json.Unmarshal(b, &suites); err != nil {
		t.Fatal(err)
	}
	states := map[string]int{}
	for _, suite := range suites {
		for _, s := range suite.SpecReports {
			if s.LeafNodeType != "It" {
				continue
			}
			states[s.State]++
			name := strings.Join(append(s.ContainerHierarchyTexts, s.LeafNodeText), " ")
			if s.State == "skipped" && !slices.Contains(unclaimed, s.Failure.Message) {
				t.Errorf("skipped: %s: %s", name, s.Failure.Message)
			}
		}
	}
	t.Logf("%v", states)
	if runErr != nil {
		t.Errorf("%v: %s", runErr, out)
	}
	if states["passed"] < claimed {
		t.Errorf("only %d tests passed", states["passed"])
	}
}
