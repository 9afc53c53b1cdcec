package driver

import (
	"fmt"
	"testing"

	"google.golang.org/grpc/codes"

	"github.com/qcow-csi/qcow-csi/driver/mount"
	"github.com/qcow-csi/qcow-csi/driver/mount/mountfake"
	"github.com/qcow-csi/qcow-csi/driver/pool"
)

// TestNoFilesystemOverData is the format guard, seen from outside.
func TestNoFilesystemOverData(t *testing.T) {
	c := capability("", writer)
	for name, sabotage := range map[string]struct {
		do   func(t *testing.T, p *process, h *pool.Handle)
		code codes.Code
	}{
		"a volume with data and no record of it": {func(t *testing.T, p *process, h *pool.Handle) {
			if _, err := h.Image().WriteAt([]byte("data"), 5*mebibyte); err != nil {
				t.Fatal(err)
			}
		}, codes.FailedPrecondition},
		"a formatted volume that looks blank": {func(t *testing.T, p *process, h *pool.Handle) {
			if err := h.SetFormat(t.Context(), pool.Format{State: pool.Formatted, Filesystem: "ext4"}); err != nil {
				t.Fatal(err)
			}
		}, codes.DataLoss},
		"a raw block volume": {func(t *testing.T, p *process, h *pool.Handle) {
			if err := h.SetFormat(t.Context(), pool.Format{State: pool.RawBlock}); err != nil {
				t.Fatal(err)
			}
		}, codes.FailedPrecondition},
		"a volume with another filesystem": {func(t *testing.T, p *process, h *pool.Handle) {
			if err := h.SetFormat(t.Context(), pool.Format{State: pool.Formatted, Filesystem: "xfs"}); err != nil {
				t.Fatal(err)
			}
		}, codes.FailedPrecondition},
		"a device that cannot be read": {func(t *testing.T, p *process, _ *pool.Handle) {
			p.node.Mounter.SetHook(func(c mountfake.Call) error {
				if c.Op == "Probe" {
					return fmt.Errorf("%s: %w", c.Device, mount.ErrUnreadable)
				}
				return nil
			})
		}, codes.Unavailable},
	} {
		t.Run(name, func(t *testing.T) {
			p := startDriver(t)
			handle := p.create(t, "v", c)
			id, err := parseHandle(handle, p.pool.ID())
			if err != nil {
				t.Fatal(err)
			}
			h, err := p.pool.Acquire(t.Context(), id, false)
			if err != nil {
				t.Fatal(err)
			}
			sabotage.do(t, p, h)
			if err := h.Release(); err != nil {
				t.Fatal(err)
			}
			wantCode(t, p.stage(t, handle, c), sabotage.code)
			if calls := p.node.Mounter.Calls("Format"); len(calls) > 0 {
				t.Errorf("formatted: %v", calls)
			}
			p.node.Mounter.SetHook(nil)
			p.wantNothing(t)
		})
	}
}

// TestPhasesAreFormatStates: every phase that package mount records is one that package pool keeps.
func TestPhasesAreFormatStates(t *testing.T) {
	p := startDriver(t)
	handle := p.create(t, "v", capability("", writer))
	id, err := parseHandle(handle, p.pool.ID())
	if err != nil {
		t.Fatal(err)
	}
	h, err := p.pool.Acquire(t.Context(), id, false)
	if err != nil {
		t.Fatal(err)
	}
	g := guard{h}
	if got, err := g.Record(t.Context()); err != nil || got.Phase != mount.NeverFormatted {
		t.Errorf("a new volume is %v, %v", got, err)
	}
	for _, want := range []mount.FormatState{
		{Phase: mount.Formatting, Type: "xfs"}, {Phase: mount.Formatted, Type: "xfs"}, {Phase: mount.RawBlock},
	} {
		if err := g.SetRecord(t.Context(), want); err != nil {
			t.Error(err)
		}
		if got, err := g.Record(t.Context()); err != nil || got != want {
			t.Errorf("recorded %v, is %v, %v", want, got, err)
		}
	}
	if allocated, err := g.EverAllocated(t.Context()); err != nil || allocated {
		t.Error(allocated, err)
	}
	if _, err := h.Image().WriteAt([]byte{1}, 0); err != nil {
		t.Fatal(err)
	}
	if allocated, err := g.EverAllocated(t.Context()); err != nil || !allocated {
		t.Error(allocated, err)
	}
	if err := h.Release(); err != nil {
		t.Fatal(err)
	}
}
