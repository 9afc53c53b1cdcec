package nbdtest_test

import (
	"testing"

	"github.com/qcow-csi/qcow-csi/nbdexport"
	"github.com/qcow-csi/qcow-csi/nbdexport/nbdtest"
)

func TestMemory(t *testing.T) {
	nbdtest.TestBackend(t, func(*testing.T) nbdexport.Backend {
		return nbdtest.NewMemory(nbdexport.Info{Size: nbdtest.BackendSize})
	})
}
