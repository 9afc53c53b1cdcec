// Package attachtest is the suite that every attacher passes: the fake, attach/fuse on this machine's kernel, and
// attach/nbd in a guest whose kernel has NBD.
//
// It looks at an attacher as the driver does, through the interface, and at its devices as their users do: with open,
// read, write, fsync, ioctl and mount. Every device gets a [Backend] that watches what the attacher does with it.
package attachtest

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"testing"
	"time"

	"k8s.io/klog/v2"
	"k8s.io/klog/v2/ktesting"

	"github.com/qcow-csi/qcow-csi/driver/attach"
)

// Subject is the attacher under test.
type Subject struct {
	// New returns an attacher of this owner. Two of one owner stand for the processes before and after a restart.
	New func(owner string) attach.Attacher
	// Devices tells that the devices are the kernel's. Without, the suite leaves I/O out; with, the package's TestMain
	// calls Main.
	Devices bool
	// SeesOpen tells that Detach refuses a device that is merely open, not only one that is claimed.
	SeesOpen bool
}

const (
	mebibyte   = 1 << 20
	deviceSize = 8 * mebibyte
)

// The owners of the devices. Other runs of the suite on the same node have others.
var (
	owner      = cmp.Or(os.Getenv(ownerVariable), fmt.Sprintf("attachtest-%d", os.Getpid()))
	otherOwner = owner + "-other"
)

// Run runs the suite. It leaves nothing behind.
func Run(t *testing.T, s Subject) {
	run := func(tests map[string]func(*rig)) {
		for _, name := range slices.Sorted(maps.Keys(tests)) {
			t.Run(name, func(t *testing.T) { tests[name](newRig(t, s)) })
		}
	}
	run(lifecycle)
	if s.Devices {
		run(input)
	}
	if s.SeesOpen {
		run(map[string]func(*rig){"an open device is busy": openIsBusy})
	}
}

// rig is what one test works with.
type rig struct {
	*testing.T
	subject Subject
	a       attach.Attacher
	random  *rand.Rand
	ctx     context.Context // with a logger that writes to the test's output
}

// Context returns the context that the test hands to its attachers.
func (r *rig) Context() context.Context { return r.ctx }

// newRig makes a rig, and looks at the end of the test whether anything of it is left.
func newRig(t *testing.T, s Subject) *rig {
	seed := uint64(time.Now().UnixNano())
	r := &rig{T: t, subject: s, random: rand.New(rand.NewPCG(seed, 0))}
	r.ctx = klog.NewContext(t.Context(), ktesting.NewLogger(t, ktesting.DefaultConfig))
	for _, owner := range []string{owner, otherOwner} {
		t.Cleanup(func() {
			// As a process that starts after everything has gone wrong: context and attachers of the test are gone.
			ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
			defer cancel()
			a := s.New(owner)
			for _, d := range r.list(ctx, a) {
				t.Errorf("%s of volume %q is left", d.Path, d.VolumeID)
				if err := a.Detach(ctx, d.VolumeID); err != nil {
					t.Errorf("clean up: %v", err)
				}
			}
			if err := a.Close(); err != nil {
				t.Errorf("clean up: %v", err)
			}
		})
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("seed %d", seed)
		}
	})
	r.a = r.start(owner)
	return r
}

// start returns an attacher that is closed at the end of the test.
func (r *rig) start(owner string) attach.Attacher {
	a := r.subject.New(owner)
	r.Cleanup(func() {
		if err := a.Close(); err != nil {
			r.Errorf("close: %v", err)
		}
	})
	return a
}

// attach attaches the backend, and takes it for granted that this works.
func (r *rig) attach(volumeID string, b *Backend) attach.Device {
	r.Helper()
	d, err := r.a.Attach(r.Context(), attach.Request{VolumeID: volumeID, Backend: b})
	if err != nil {
		r.Fatalf("attach %q: %v", volumeID, err)
	}
	return d
}

// detach detaches the volume, whose backend is not used from there on.
func (r *rig) detach(volumeID string, b *Backend) {
	r.Helper()
	if err := r.a.Detach(r.Context(), volumeID); err != nil {
		r.Fatalf("detach %q: %v", volumeID, err)
	}
	b.Retire()
}

// list returns the devices that a lists, by volume.
func (r *rig) list(ctx context.Context, a attach.Attacher) map[string]attach.Device {
	r.Helper()
	devices, err := a.List(ctx)
	if err != nil {
		r.Fatalf("list: %v", err)
	}
	byVolume := make(map[string]attach.Device)
	for _, d := range devices {
		if _, twice := byVolume[d.VolumeID]; twice {
			r.Fatalf("volume %q is listed twice", d.VolumeID)
		}
		byVolume[d.VolumeID] = d
	}
	return byVolume
}

// bytes returns n random bytes.
func (r *rig) bytes(n int) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(r.random.Uint32())
	}
	return p
}
