package driver

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"k8s.io/klog/v2"

	"github.com/qcow-csi/qcow-csi/driver/mount/mountfake"
	"github.com/qcow-csi/qcow-csi/driver/pool"
)

func TestListen(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "csi.sock")
	// A process that was killed leaves its socket.
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	dead.SetUnlinkOnClose(false)
	dead.Close()
	if _, err := os.Lstat(path); err != nil {
		t.Fatal(err)
	}
	listener, err := Listen(t.Context(), "unix://"+path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(t.Context(), "unix:"+path); err == nil || !strings.Contains(err.Error(), "another process") {
		t.Errorf("a living socket was taken over: %v", err)
	}
	listener.Close()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, endpoint := range []string{
		"unix://" + file, "unix://" + filepath.Join(dir, "absent", "csi.sock"),
		"tcp://127.0.0.1:5000", path, "unix://relative/path", "unix:relative", "",
	} {
		if listener, err := Listen(t.Context(), endpoint); err == nil {
			t.Errorf("endpoint %q was accepted", endpoint)
			listener.Close()
		}
	}
	if b, err := os.ReadFile(file); err != nil || string(b) != "precious" {
		t.Errorf("%q, %v", b, err)
	}
}

// TestOrderlyEnd: a call that is running when the end comes is finished and answered, and no new one is taken.
func TestOrderlyEnd(t *testing.T) {
	p := startDriver(t)
	c := capability("", writer)
	handle := p.create(t, "v", c)
	begun, goOn := p.pauseAt("Mount")
	result := make(chan error, 1)
	go func() { result <- p.stage(t, handle, c) }()
	<-begun
	killed := make(chan struct{})
	go func() {
		defer close(killed)
		p.kill()
	}()
	select {
	case <-killed:
		t.Error("ended in the middle of a call")
	case <-time.After(50 * time.Millisecond): // nothing depends on it: it gives the end the chance to come too early
	}
	goOn()
	wantCode(t, <-result, codes.OK)
	<-killed
	if mounts, err := p.node.Mounter.Mounts(t.Context(), p.path("staging")); err != nil || len(mounts) != 1 {
		t.Errorf("%v, %v", mounts, err)
	}
}

// pauseAt holds the next call of the Mounter's method until goOn is called.
func (p *process) pauseAt(op string) (begun <-chan struct{}, goOn func()) {
	arrived, release := make(chan struct{}), make(chan struct{})
	var held atomic.Bool
	p.node.Mounter.SetHook(func(c mountfake.Call) error {
		if c.Op == op && held.CompareAndSwap(false, true) {
			close(arrived)
			<-release
		}
		return nil
	})
	return arrived, func() { close(release) }
}

// TestBusyVolume: while a call for a volume runs, others for it are told to come again, and those for other volumes are
// not.
func TestBusyVolume(t *testing.T) {
	p := startDriver(t)
	c := capability("", writer)
	handle, other := p.create(t, "v", c), p.create(t, "other", c)
	begun, goOn := p.pauseAt("Mount")
	result := make(chan error, 1)
	go func() { result <- p.stage(t, handle, c) }()
	<-begun
	wantCode(t, p.stage(t, handle, c), codes.Aborted)
	wantCode(t, p.publish(t, handle, "pod", c, false), codes.Aborted)
	wantCode(t, p.unpublish(t, handle, "pod"), codes.Aborted)
	wantCode(t, p.unstage(t, handle), codes.Aborted)
	_, err := p.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: handle})
	wantCode(t, err, codes.Aborted)
	_, err = p.ControllerExpandVolume(t.Context(), &csi.ControllerExpandVolumeRequest{
		VolumeId: handle, CapacityRange: &csi.CapacityRange{RequiredBytes: 1},
	})
	wantCode(t, err, codes.Aborted)
	_, err = p.NodeExpandVolume(t.Context(), &csi.NodeExpandVolumeRequest{VolumeId: handle, VolumePath: p.path("staging")})
	wantCode(t, err, codes.Aborted)
	_, err = p.NodeGetVolumeStats(t.Context(), &csi.NodeGetVolumeStatsRequest{
		VolumeId: handle, VolumePath: p.path("staging"),
	})
	wantCode(t, err, codes.NotFound)
	_, err = p.NodeStageVolume(t.Context(), &csi.NodeStageVolumeRequest{
		VolumeId: other, StagingTargetPath: p.path("other"), VolumeCapability: c,
	})
	wantCode(t, err, codes.OK)
	goOn()
	wantCode(t, <-result, codes.OK)
	wantCode(t, p.publish(t, handle, "pod", c, false), codes.OK)
}

// TestCallerGivesUp: the caller's context ends in the middle of staging. What was done is undone all the same.
func TestCallerGivesUp(t *testing.T) {
	p := startDriver(t)
	c := capability("", writer)
	handle := p.create(t, "v", c)
	for _, op := range []string{"Probe", "Format", "Mount"} {
		ctx, cancel := context.WithCancel(t.Context())
		p.node.Mounter.SetHook(func(c mountfake.Call) error {
			if c.Op == op {
				cancel()
				return ctx.Err()
			}
			return nil
		})
		_, err := p.driver.node.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{
			VolumeId: handle, StagingTargetPath: p.path("staging"), VolumeCapability: c,
		})
		if !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v", op, err)
		}
		p.node.Mounter.SetHook(nil)
		p.wantNothing(t)
	}
	wantCode(t, p.stage(t, handle, c), codes.OK)
}

func TestPanicIsAnError(t *testing.T) {
	p := startDriver(t)
	c := capability("", writer)
	handle := p.create(t, "v", c)
	p.node.Mounter.SetHook(func(c mountfake.Call) error {
		if c.Op == "Mounts" {
			panic("oops")
		}
		return nil
	})
	err := p.stage(t, handle, c)
	wantCode(t, err, codes.Internal)
	if !strings.Contains(status.Convert(err).Message(), "oops") {
		t.Error(err)
	}
	p.node.Mounter.SetHook(nil)
	if _, err := p.Probe(t.Context(), &csi.ProbeRequest{}); err != nil {
		t.Error(err)
	}
}

func TestEveryClassHasItsCode(t *testing.T) {
	for _, c := range codeOf {
		if got := statusOf(fmt.Errorf("outer: %w: %w", c.class, syscall.EIO)).Code(); got != c.code {
			t.Errorf("%v: %v, want %v", c.class, got, c.code)
		}
	}
	if got := statusOf(nil).Code(); got != codes.OK {
		t.Error(got)
	}
	if got := statusOf(errors.New("?")).Code(); got != codes.Internal {
		t.Error(got)
	}
	// Both a full disk and what it made impossible: the former is what one can do something about.
	if got := statusOf(fmt.Errorf("%w: %w", pool.ErrNoSpace, syscall.ENOSPC)).Code(); got != codes.ResourceExhausted {
		t.Error(got)
	}
}

func TestLogsKeepSecrets(t *testing.T) {
	const secret = "hunter2"
	secrets := map[string]string{"password": secret}
	flags := &csi.VolumeCapability{
		AccessType: &csi.VolumeCapability_Mount{
			Mount: &csi.VolumeCapability_MountVolume{FsType: "ext4", MountFlags: []string{secret}},
		},
	}
	for _, message := range []any{
		&csi.CreateVolumeRequest{Name: "visible", Secrets: secrets, VolumeCapabilities: []*csi.VolumeCapability{flags}},
		&csi.NodeStageVolumeRequest{VolumeId: "visible", Secrets: secrets, VolumeCapability: flags},
		&csi.NodePublishVolumeRequest{VolumeId: "visible", Secrets: secrets, VolumeCapability: flags},
		&csi.ControllerExpandVolumeRequest{VolumeId: "visible", Secrets: secrets, VolumeCapability: flags},
		&csi.NodeExpandVolumeRequest{VolumeId: "visible", Secrets: secrets},
		&csi.DeleteVolumeRequest{VolumeId: "visible", Secrets: secrets},
		&csi.ListVolumesResponse{Entries: []*csi.ListVolumesResponse_Entry{{Volume: &csi.Volume{VolumeId: "visible"}}}},
	} {
		text := redacted(message).String()
		json, err := redacted(message).MarshalJSON()
		if err != nil {
			t.Error(err)
		}
		for _, s := range []string{text, string(json)} {
			if strings.Contains(s, secret) || !strings.Contains(s, "visible") {
				t.Errorf("%T: %s", message, s)
			}
		}
	}
	if secrets["password"] != secret {
		t.Error("the message itself has changed")
	}
	if got := redacted(5).String(); got != "{}" {
		t.Error(got)
	}

	// The whole way: at the highest level, nothing of it is in the log.
	var log bytes.Buffer
	logger := slog.New(slog.NewJSONHandler(&log, &slog.HandlerOptions{Level: slog.Level(-10)}))
	klog.SetSlogLogger(logger)
	around := &calls{logger: klog.Background()}
	klog.SetSlogLogger(slog.New(slog.DiscardHandler))
	_, err := around.intercept(t.Context(), &csi.NodeStageVolumeRequest{
		VolumeId: "visible", Secrets: secrets, VolumeCapability: flags,
	},
		&grpc.UnaryServerInfo{FullMethod: "/csi.v1.Node/NodeStageVolume"},
		func(context.Context, any) (any, error) { return nil, pool.ErrNotFound })
	wantCode(t, err, codes.NotFound)
	for _, want := range []string{"visible", "NodeStageVolume", "NotFound", `"request":1`} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("log lacks %s: %s", want, &log)
		}
	}
	if strings.Contains(log.String(), secret) {
		t.Errorf("log: %s", &log)
	}
}

// TestConcurrentCalls lets many callers do everything to a few volumes. Every answer has an expected code, and in the
// end everything can be taken down.
func TestConcurrentCalls(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	p := startDriver(t)
	c := capability("", multiWriter)
	handles := []string{p.create(t, "a", c), p.create(t, "b", c)}
	staging := func(i int) string { return p.path(fmt.Sprint("staging-", i)) }
	target := func(i, k int) string { return p.path(fmt.Sprint("pod-", i, "-", k)) }
	unpublish := func(i, k int) error {
		_, err := p.NodeUnpublishVolume(t.Context(), &csi.NodeUnpublishVolumeRequest{
			VolumeId: handles[i], TargetPath: target(i, k),
		})
		return err
	}
	unstage := func(i int) error {
		_, err := p.NodeUnstageVolume(t.Context(), &csi.NodeUnstageVolumeRequest{
			VolumeId: handles[i], StagingTargetPath: staging(i),
		})
		return err
	}
	var callers sync.WaitGroup
	for n := range 8 {
		callers.Go(func() {
			random := rand.New(rand.NewPCG(seed, uint64(n)))
			for range 100 {
				i, k := random.IntN(len(handles)), random.IntN(2)
				var err error
				switch random.IntN(8) {
				case 0, 1:
					_, err = p.NodeStageVolume(t.Context(), &csi.NodeStageVolumeRequest{
						VolumeId: handles[i], StagingTargetPath: staging(i), VolumeCapability: c,
					})
				case 2, 3:
					_, err = p.NodePublishVolume(t.Context(), &csi.NodePublishVolumeRequest{
						VolumeId: handles[i], StagingTargetPath: staging(i), TargetPath: target(i, k), VolumeCapability: c,
					})
				case 4:
					err = unpublish(i, k)
				case 5:
					err = unstage(i)
				case 6:
					_, err = p.NodeGetVolumeStats(t.Context(), &csi.NodeGetVolumeStatsRequest{
						VolumeId: handles[i], VolumePath: target(i, k),
					})
				default:
					_, err = p.ControllerExpandVolume(t.Context(), &csi.ControllerExpandVolumeRequest{
						VolumeId:      handles[i],
						CapacityRange: &csi.CapacityRange{RequiredBytes: int64(16+random.IntN(8)) * mebibyte},
					})
				}
				switch status.Code(err) {
				case codes.OK, codes.Aborted, codes.FailedPrecondition, codes.NotFound:
				default:
					t.Error(err)
				}
			}
		})
	}
	callers.Wait()
	for i := range handles {
		for k := range 2 {
			wantCode(t, unpublish(i, k), codes.OK)
		}
		wantCode(t, unstage(i), codes.OK)
	}
	p.wantNothing(t)
}
