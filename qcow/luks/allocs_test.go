//go:build !race

package luks_test

import (
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow/luks"
)

// TestCipherTakesNoMemory is of mode XTS, the one in use. It does not hold under the race detector, which empties pools at random.
func TestCipherTakesNoMemory(t *testing.T) {
	for _, o := range []luks.CreateOptions{{}, {Cipher: "twofish-256"}} {
		_, c := create(t, o, "pw")
		p := make([]byte, 4096)
		if n := testing.AllocsPerRun(100, func() { c.Encrypt(p, 7); c.Decrypt(p, 7) }); n >= 1 {
			t.Errorf("%+v: %v allocations", o, n)
		}
	}
}
