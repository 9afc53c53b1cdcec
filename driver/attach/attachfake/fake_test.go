package attachfake_test

import (
	"testing"

	"github.com/qcow-csi/qcow-csi/driver/attach"
	"github.com/qcow-csi/qcow-csi/driver/attach/attachfake"
	"github.com/qcow-csi/qcow-csi/driver/attach/attachtest"
)

func TestConformance(t *testing.T) {
	var kernel attachfake.Kernel
	attachtest.Run(t, attachtest.Subject{
		New: func(owner string) attach.Attacher { return kernel.Attacher(owner) },
	})
}
