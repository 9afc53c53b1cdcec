//go:build vmguest

package nbd

// These tests are for a guest whose kernel has NBD: test/vm runs them there.

import (
	"bytes"
	"context"
	"errors"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mdlayher/genetlink"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"
	"k8s.io/klog/v2/ktesting"

	"github.com/qcow-csi/qcow-csi/driver/attach"
	"github.com/qcow-csi/qcow-csi/driver/attach/attachtest"
)

func newAttacher(owner string) attach.Attacher {
	return New(Options{Owner: owner, DeadConnTimeout: time.Second}) // a lost device fails soon
}

func TestMain(m *testing.M) { os.Exit(attachtest.Main(m, newAttacher)) }

func TestConformance(t *testing.T) {
	attachtest.Run(t, attachtest.Subject{New: newAttacher, Devices: true})
}

const deviceSize = 4 << 20

// rig is an attacher with one attached volume.
type rig struct {
	*testing.T
	*Attacher
	ctx     context.Context
	backend *attachtest.Backend
	device  attach.Device
}

func newRig(t *testing.T, o Options) *rig {
	o.Owner = "kernel_test"
	r := &rig{
		T:        t,
		Attacher: New(o),
		ctx:      klog.NewContext(t.Context(), ktesting.NewLogger(t, ktesting.DefaultConfig)),
		backend:  attachtest.NewBackend(t, deviceSize),
	}
	var err error
	r.device, err = r.Attach(r.ctx, attach.Request{VolumeID: "v", Backend: r.backend})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Detach(context.Background(), "v"); err != nil {
			t.Error(err)
		}
		if err := r.Close(); err != nil {
			t.Error(err)
		}
		if left, err := r.List(context.Background()); len(left) > 0 || err != nil {
			t.Errorf("left: %+v, %v", left, err)
		}
	})
	return r
}

func (r *rig) open(flags int) int {
	r.Helper()
	fd, err := unix.Open(r.device.Path, unix.O_CLOEXEC|flags, 0)
	if err != nil {
		r.Fatal(err)
	}
	r.Cleanup(func() { _ = unix.Close(fd) })
	return fd
}

// deadLinks tells of every connection that the kernel gives up.
func deadLinks(t *testing.T) <-chan struct{} {
	conn, err := genetlink.Dial(nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	family, err := conn.GetFamily(familyName)
	if err != nil || len(family.Groups) != 1 {
		t.Fatalf("family %+v: %v", family, err)
	}
	if err := conn.JoinGroup(family.Groups[0].ID); err != nil {
		t.Fatal(err)
	}
	dead := make(chan struct{}, 16)
	go func() {
		for {
			messages, _, err := conn.Receive()
			if err != nil {
				return // closed
			}
			for range messages {
				dead <- struct{}{}
			}
		}
	}()
	return dead
}

// TestReconnect has the kernel lose its patience with a slow backend, and drop the connection. Nobody above notices more
// than the time it takes.
func TestReconnect(t *testing.T) {
	r := newRig(t, Options{RequestTimeout: time.Second, DeadConnTimeout: time.Minute})
	dead := deadLinks(t)
	fd := r.open(unix.O_RDWR | unix.O_SYNC)
	for i := range 2 {
		var attempts atomic.Int32
		r.backend.Fail(func(op attachtest.Op, _ int64) error {
			if op == attachtest.Write && attempts.Add(1) == 1 {
				<-dead
			}
			return nil
		})
		p := bytes.Repeat([]byte{byte(i + 1)}, 64<<10)
		// What the kernel says of an earlier death may come late, and ends the wait too soon: then once more.
		for tries := 0; attempts.Load() < 2; tries++ {
			if tries == 10 {
				t.Fatal("the kernel did not repeat the write")
			}
			for len(dead) > 0 {
				<-dead
			}
			attempts.Store(0)
			if _, err := unix.Pwrite(fd, p, 4096); err != nil {
				t.Errorf("write: %v", err)
			}
		}
		if !bytes.Equal(r.backend.Bytes(4096, int64(len(p))), p) {
			t.Error("the backend differs")
		}
	}
	r.backend.Fail(nil)
	r.backend.Grow(2 * deviceSize)
	if err := r.Resize(r.ctx, "v", 2*deviceSize); err != nil {
		t.Errorf("resize by the new connection: %v", err)
	}
	if _, err := unix.Pwrite(fd, make([]byte, 4096), 2*deviceSize-4096); err != nil {
		t.Errorf("write to what was gained: %v", err)
	}
	_ = unix.Close(fd)
}

// TestBoundedStall has a backend hang for longer than the kernel holds I/O back: then I/O fails, but nothing hangs,
// and the device can be detached.
func TestBoundedStall(t *testing.T) {
	r := newRig(t, Options{RequestTimeout: 2 * time.Second, DeadConnTimeout: 2 * time.Second})
	fd := r.open(unix.O_RDONLY | unix.O_DIRECT)
	release := make(chan struct{})
	r.backend.Fail(func(op attachtest.Op, _ int64) error {
		if op == attachtest.Read {
			<-release
		}
		return nil
	})
	if _, err := unix.Pread(fd, attachtest.Aligned(4096), 0); err == nil {
		t.Error("read from a backend that hangs")
	}
	close(release)
	_ = unix.Close(fd)
}

// TestOpenElsewhere: a device that is merely open is disconnected, and refused, until it is closed.
func TestOpenElsewhere(t *testing.T) {
	r := newRig(t, Options{})
	r.patience = 300 * time.Millisecond
	fd := r.open(unix.O_RDONLY | unix.O_DIRECT)
	if err := r.Detach(r.ctx, "v"); !errors.Is(err, attach.ErrBusy) {
		t.Errorf("detach: %v, want %v", err, attach.ErrBusy)
	}
	r.backend.Retire()
	if _, err := unix.Pread(fd, attachtest.Aligned(4096), 0); err == nil {
		t.Error("read from a disconnected device")
	}
	if got, err := r.List(r.ctx); len(got) != 1 || got[0].Served || err != nil {
		t.Errorf("listed %+v, %v; want a device that is not served", got, err)
	}
	if err := unix.Close(fd); err != nil {
		t.Error(err)
	}
	if err := r.Detach(r.ctx, "v"); err != nil {
		t.Errorf("detach once it is closed: %v", err)
	}
}

// TestDisconnectedByOthers: an administrator takes the device away.
func TestDisconnectedByOthers(t *testing.T) {
	r := newRig(t, Options{})
	before, _ := r.devices.Get("v")
	if err := r.kernel.disconnect(before.index); err != nil {
		t.Fatal(err)
	}
	<-before.ended
	r.backend.Retire()
	if got, err := r.List(r.ctx); len(got) > 0 || err != nil {
		t.Errorf("listed %+v, %v", got, err)
	}
	r.backend = attachtest.NewBackend(t, deviceSize)
	if _, err := r.Attach(r.ctx, attach.Request{VolumeID: "v", Backend: r.backend}); err != nil {
		t.Errorf("attach again: %v", err)
	}
}

// TestForeignDevices: other users of NBD on the node are left alone, and leave the numbers to the kernel.
func TestForeignDevices(t *testing.T) {
	var r *rig
	foreign := New(Options{Owner: "another driver"})
	b := attachtest.NewBackend(t, deviceSize)
	d, err := foreign.Attach(t.Context(), attach.Request{VolumeID: "v", Backend: b})
	if err != nil {
		t.Fatal(err)
	}
	t.Run("beside", func(t *testing.T) {
		r = newRig(t, Options{})
		if r.device.Path == d.Path {
			t.Errorf("both have %s", d.Path)
		}
	})
	if got, err := foreign.List(t.Context()); len(got) != 1 || !got[0].Served || err != nil {
		t.Errorf("listed %+v, %v", got, err)
	}
	if err := errors.Join(foreign.Detach(t.Context(), "v"), foreign.Close()); err != nil {
		t.Error(err)
	}
}

// TestNumbersAreUsedAgain: the node does not gain devices with every attach.
func TestNumbersAreUsedAgain(t *testing.T) {
	paths := make(map[string]bool)
	for range 10 {
		t.Run("", func(t *testing.T) { paths[newRig(t, Options{}).device.Path] = true })
	}
	if len(paths) > 2 {
		t.Errorf("ten devices, one after the other, were %d different ones", len(paths))
	}
}
