package driver

import (
	"context"

	"github.com/qcow-csi/qcow-csi/driver/mount"
	"github.com/qcow-csi/qcow-csi/driver/pool"
)

// guard is what package mount asks before it formats: the volume's record in the pool, and its open image. The states
// have the same names in both packages.
type guard struct{ volume *pool.Handle }

var _ mount.Guard = guard{}

func (g guard) Record(context.Context) (mount.FormatState, error) {
	f := g.volume.Volume().Format
	return mount.FormatState{Phase: mount.Phase(f.State), Type: f.Filesystem}, nil
}

func (g guard) SetRecord(ctx context.Context, s mount.FormatState) error {
	return g.volume.SetFormat(ctx, pool.Format{State: pool.FormatState(s.Phase), Filesystem: s.Type})
}

func (g guard) EverAllocated(context.Context) (bool, error) {
	return g.volume.Image().Info().Allocated, nil
}
