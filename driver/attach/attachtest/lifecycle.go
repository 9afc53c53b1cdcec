package attachtest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/qcow-csi/qcow-csi/driver/attach"
	"github.com/qcow-csi/qcow-csi/nbdexport"
)

// lifecycle is the tests that need no I/O.
var lifecycle = map[string]func(*rig){
	"probe":                                probe,
	"a device comes and goes":              comesAndGoes,
	"volume ids of all kinds":              volumeIDs,
	"an attached volume is busy":           attachedIsBusy,
	"one of many concurrent attaches wins": oneWins,
	"volumes are attached side by side":    sideBySide,
	"bad requests are refused":             badRequests,
	"a cancelled attach leaves nothing":    cancelled,
	"a cancel at any moment leaves order":  cancelledMidway,
	"resize":                               resize,
	"a restart finds what was left":        restart,
	"owners do not see each other":         owners,
	"nothing works after close":            afterClose,
}

func probe(r *rig) {
	if err := r.a.Probe(r.Context()); err != nil {
		r.Errorf("probe: %v", err)
	}
	if r.a.Name() == "" || r.a.Name() == attach.Auto {
		r.Errorf("the attacher is called %q", r.a.Name())
	}
}

func comesAndGoes(r *rig) {
	for range 3 {
		b := NewBackend(r, deviceSize)
		d := r.attach("pool/volume", b)
		want := attach.Device{VolumeID: "pool/volume", Path: d.Path, Size: deviceSize, Served: true}
		if d != want {
			r.Errorf("attached %+v, want %+v", d, want)
		}
		if !strings.HasPrefix(d.Path, "/dev/") {
			r.Errorf("the device is at %q", d.Path)
		}
		if got := r.list(r.Context(), r.a); len(got) != 1 || got["pool/volume"] != want {
			r.Errorf("listed %+v, want %+v", got, want)
		}
		r.detach("pool/volume", b)
		if got := r.list(r.Context(), r.a); len(got) != 0 {
			r.Errorf("listed after detach: %+v", got)
		}
		if err := r.a.Detach(r.Context(), "pool/volume"); err != nil {
			r.Errorf("detach of what is not there: %v", err)
		}
	}
}

func volumeIDs(r *rig) {
	ids := []string{
		"v", "pool/volume", "../../etc/passwd", "a b", " ", "%2F", "100%", "größe", ":", "qcow-csi:x:y",
		"(deleted)", "x (deleted)", strings.Repeat("x", 128), strings.Repeat("/", 128), strings.Repeat("ä", 64),
	}
	backends := make(map[string]*Backend)
	for _, id := range ids {
		backends[id] = NewBackend(r, mebibyte)
		r.attach(id, backends[id])
	}
	got := slices.Sorted(maps.Keys(r.list(r.Context(), r.a)))
	if slices.Sort(ids); !slices.Equal(got, ids) {
		r.Errorf("listed %q, want %q", got, ids)
	}
	for _, id := range ids {
		r.detach(id, backends[id])
	}
}

func attachedIsBusy(r *rig) {
	b, second := NewBackend(r, deviceSize), NewBackend(r, deviceSize)
	d := r.attach("v", b)
	_, err := r.a.Attach(r.Context(), attach.Request{VolumeID: "v", Backend: second})
	second.Retire()
	if !errors.Is(err, attach.ErrBusy) {
		r.Errorf("second attach: %v, want %v", err, attach.ErrBusy)
	}
	if got := r.list(r.Context(), r.a); len(got) != 1 || got["v"] != d {
		r.Errorf("listed %+v, want %+v", got, d)
	}
	r.detach("v", b)
}

func oneWins(r *rig) {
	const contenders = 8
	var (
		group    sync.WaitGroup
		errs     [contenders]error
		backends [contenders]*Backend
	)
	for i := range contenders {
		backends[i] = NewBackend(r, mebibyte)
		group.Go(func() {
			_, errs[i] = r.a.Attach(r.Context(), attach.Request{VolumeID: "v", Backend: backends[i]})
			if errs[i] != nil {
				backends[i].Retire()
			}
		})
	}
	group.Wait()
	winner := slices.Index(errs[:], nil)
	if winner < 0 {
		r.Fatalf("nobody won: %v", errors.Join(errs[:]...))
	}
	for i, err := range errs {
		if i != winner && !errors.Is(err, attach.ErrBusy) {
			r.Errorf("attacher %d: %v, want %v", i, err, attach.ErrBusy)
		}
	}
	r.detach("v", backends[winner])
}

func sideBySide(r *rig) {
	const volumes = 6
	var (
		group    sync.WaitGroup
		backends [volumes]*Backend
	)
	id := func(i int) string { return fmt.Sprintf("pool/%d", i) }
	for i := range volumes {
		backends[i] = NewBackend(r, int64(i+1)*mebibyte)
		group.Go(func() {
			if _, err := r.a.Attach(r.Context(), attach.Request{VolumeID: id(i), Backend: backends[i]}); err != nil {
				r.Errorf("attach %d: %v", i, err)
			}
		})
	}
	group.Wait()
	listed := r.list(r.Context(), r.a)
	paths := make(map[string]bool)
	for i := range volumes {
		d := listed[id(i)]
		paths[d.Path] = true
		if want := int64(i+1) * mebibyte; d.Size != want || !d.Served {
			r.Errorf("listed %+v, want %d bytes", d, want)
		}
	}
	if len(paths) != volumes {
		r.Errorf("%d volumes have %d devices", volumes, len(paths))
	}
	for i := range volumes {
		group.Go(func() {
			if err := r.a.Detach(r.Context(), id(i)); err != nil {
				r.Errorf("detach %d: %v", i, err)
			}
			backends[i].Retire()
		})
	}
	group.Wait()
}

func badRequests(r *rig) {
	withBlock := func(minimum uint32, size int64) *Backend {
		b := NewBackend(r, size)
		b.Describe(nbdexport.Info{MinimumBlock: minimum})
		return b
	}
	for name, request := range map[string]attach.Request{
		"no volume id":               {VolumeID: "", Backend: NewBackend(r, mebibyte)},
		"long volume id":             {VolumeID: strings.Repeat("x", 129), Backend: NewBackend(r, mebibyte)},
		"control character":          {VolumeID: "a\nb", Backend: NewBackend(r, mebibyte)},
		"NUL":                        {VolumeID: "a\x00b", Backend: NewBackend(r, mebibyte)},
		"not UTF-8":                  {VolumeID: "a\xff", Backend: NewBackend(r, mebibyte)},
		"no backend":                 {VolumeID: "v"},
		"no size":                    {VolumeID: "v", Backend: NewBackend(r, 0)},
		"half a sector":              {VolumeID: "v", Backend: NewBackend(r, mebibyte+256)},
		"half a block":               {VolumeID: "v", Backend: withBlock(4096, mebibyte+512)},
		"blocks larger than a page":  {VolumeID: "v", Backend: withBlock(64<<10, mebibyte)},
		"blocks of no power of two":  {VolumeID: "v", Backend: withBlock(1536, 1536*1024)},
		"blocks of 2 GiB and a half": {VolumeID: "v", Backend: withBlock(5<<29, mebibyte)},
	} {
		if b, ok := request.Backend.(*Backend); ok {
			b.Retire()
		}
		if d, err := r.a.Attach(r.Context(), request); !errors.Is(err, attach.ErrInvalid) {
			r.Errorf("%s: attached %+v, error %v; want %v", name, d, err, attach.ErrInvalid)
		}
	}
}

func cancelled(r *rig) {
	ctx, cancel := context.WithCancel(r.Context())
	cancel()
	b := NewBackend(r, mebibyte)
	_, err := r.a.Attach(ctx, attach.Request{VolumeID: "v", Backend: b})
	b.Retire()
	if !errors.Is(err, context.Canceled) {
		r.Errorf("attach: %v, want %v", err, context.Canceled)
	}
	if got := r.list(r.Context(), r.a); len(got) != 0 {
		r.Errorf("listed %+v", got)
	}
}

func cancelledMidway(r *rig) {
	for range 20 {
		ctx, cancel := context.WithTimeout(r.Context(), time.Duration(r.random.Int64N(int64(20*time.Millisecond))))
		b := NewBackend(r, mebibyte)
		_, err := r.a.Attach(ctx, attach.Request{VolumeID: "v", Backend: b})
		if err != nil {
			b.Retire()
			if got := r.list(r.Context(), r.a); len(got) != 0 {
				r.Fatalf("listed %+v after %v", got, err)
			}
		} else if err := r.a.Detach(ctx, "v"); err != nil {
			r.detach("v", b)
		}
		cancel()
	}
}

func resize(r *rig) {
	if err := r.a.Resize(r.Context(), "v", deviceSize); !errors.Is(err, attach.ErrNotAttached) {
		r.Errorf("resize of what is not attached: %v, want %v", err, attach.ErrNotAttached)
	}
	b := NewBackend(r, deviceSize)
	r.attach("v", b)
	size := int64(deviceSize)
	for _, grown := range []int64{deviceSize, deviceSize + 512, 3 * deviceSize} {
		b.Grow(grown)
		if err := r.a.Resize(r.Context(), "v", grown); err != nil {
			r.Fatalf("resize to %d: %v", grown, err)
		}
		size = grown
		if d := r.list(r.Context(), r.a)["v"]; d.Size != size || !d.Served {
			r.Errorf("listed %+v, want %d bytes", d, size)
		}
	}
	for _, bad := range []int64{-1, 0, deviceSize, size - 512, size + 1} {
		if err := r.a.Resize(r.Context(), "v", bad); !errors.Is(err, attach.ErrInvalid) {
			r.Errorf("resize from %d to %d: %v, want %v", size, bad, err, attach.ErrInvalid)
		}
	}
	if d := r.list(r.Context(), r.a)["v"]; d.Size != size {
		r.Errorf("listed %+v after bad sizes, want %d bytes", d, size)
	}
	r.detach("v", b)
	if err := r.a.Resize(r.Context(), "v", size); !errors.Is(err, attach.ErrNotAttached) {
		r.Errorf("resize after detach: %v, want %v", err, attach.ErrNotAttached)
	}
}

func restart(r *rig) {
	b := NewBackend(r, deviceSize)
	d := r.attach("pool/volume", b)
	if err := r.a.Close(); err != nil {
		r.Fatalf("close: %v", err)
	}
	b.Retire()

	r.a = r.start(owner)
	want := attach.Device{VolumeID: "pool/volume", Path: d.Path, Size: deviceSize, Served: false}
	if got := r.list(r.Context(), r.a); len(got) != 1 || got["pool/volume"] != want {
		r.Errorf("listed after restart %+v, want %+v", got, want)
	}
	again := NewBackend(r, deviceSize)
	if _, err := r.a.Attach(r.Context(), attach.Request{VolumeID: "pool/volume", Backend: again}); !errors.Is(err, attach.ErrBusy) {
		r.Errorf("attach over what was left: %v, want %v", err, attach.ErrBusy)
	}
	if err := r.a.Resize(r.Context(), "pool/volume", 2*deviceSize); !errors.Is(err, attach.ErrNotAttached) {
		r.Errorf("resize of what was left: %v, want %v", err, attach.ErrNotAttached)
	}
	if err := r.a.Detach(r.Context(), "pool/volume"); err != nil {
		r.Errorf("detach of what was left: %v", err)
	}
	r.attach("pool/volume", again)
	r.detach("pool/volume", again)
}

func owners(r *rig) {
	other := r.start(otherOwner)
	mine, theirs := NewBackend(r, deviceSize), NewBackend(r, 2*deviceSize)
	r.attach("v", mine)
	d, err := other.Attach(r.Context(), attach.Request{VolumeID: "v", Backend: theirs})
	if err != nil {
		r.Fatalf("attach for another owner: %v", err)
	}
	if got := r.list(r.Context(), other); len(got) != 1 || got["v"] != d {
		r.Errorf("the other owner has %+v, want %+v", got, d)
	}
	r.detach("v", mine)
	if err := r.a.Detach(r.Context(), "v"); err != nil {
		r.Errorf("second detach: %v", err)
	}
	if got := r.list(r.Context(), other); len(got) != 1 || got["v"] != d {
		r.Errorf("the other owner has %+v, want %+v", got, d)
	}
	if err := other.Detach(r.Context(), "v"); err != nil {
		r.Errorf("detach for the other owner: %v", err)
	}
}

func afterClose(r *rig) {
	if err := r.a.Close(); err != nil {
		r.Errorf("close: %v", err)
	}
	b := NewBackend(r, mebibyte)
	b.Retire()
	_, err := r.a.Attach(r.Context(), attach.Request{VolumeID: "v", Backend: b})
	for what, err := range map[string]error{
		"attach": err,
		"detach": r.a.Detach(r.Context(), "v"),
		"resize": r.a.Resize(r.Context(), "v", mebibyte),
	} {
		if !errors.Is(err, attach.ErrClosed) {
			r.Errorf("%s after close: %v, want %v", what, err, attach.ErrClosed)
		}
	}
	if err := r.a.Close(); err != nil {
		r.Errorf("second close: %v", err)
	}
}
