package attach_test

import (
	"errors"
	"testing"

	"github.com/qcow-csi/qcow-csi/driver/attach"
	"github.com/qcow-csi/qcow-csi/driver/attach/attachtest"
	"github.com/qcow-csi/qcow-csi/nbdexport"
)

func TestGeometry(t *testing.T) {
	for _, test := range []struct {
		info     nbdexport.Info
		readOnly bool
		want     attach.Geometry
	}{
		{nbdexport.Info{}, false, attach.Geometry{BlockSize: 512, Granularity: 4096}},
		{nbdexport.Info{MinimumBlock: 1, PreferredBlock: 64 << 10}, true, attach.Geometry{BlockSize: 512, Granularity: 64 << 10, ReadOnly: true}},
		{nbdexport.Info{MinimumBlock: 4096, PreferredBlock: 512, ReadOnly: true}, false, attach.Geometry{BlockSize: 4096, Granularity: 4096, ReadOnly: true}},
	} {
		b := attachtest.NewBackend(t, 1<<20)
		b.Describe(test.info)
		test.want.Size = 1 << 20
		got, err := attach.Request{VolumeID: "v", Backend: b, ReadOnly: test.readOnly}.Geometry()
		if got != test.want || err != nil {
			t.Errorf("%+v: %+v, %v; want %+v", test.info, got, err, test.want)
		}
	}
}

func TestCheckGrowth(t *testing.T) {
	g := attach.Geometry{Size: 8 << 10, BlockSize: 4096}
	for size, ok := range map[int64]bool{8 << 10: true, 12 << 10: true, 1 << 50: true, 4 << 10: false, 8<<10 + 512: false, 0: false, -4096: false} {
		if err := g.CheckGrowth(size); (err == nil) != ok || (err != nil && !errors.Is(err, attach.ErrInvalid)) {
			t.Errorf("from %d to %d bytes: %v", g.Size, size, err)
		}
	}
}
