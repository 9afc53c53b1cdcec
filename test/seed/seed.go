// Package seed gives the tests that draw at random what they draw from.
package seed

import (
	"os"
	"strconv"
	"testing"
	"time"
)

// Of returns the seed of a test and logs it: the one that QCOW_CSI_SEED asks for, from 0 to 2^64-1, otherwise another one
// each time.
func Of(t testing.TB) uint64 {
	t.Helper()
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("QCOW_CSI_SEED"); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 0, 64); err != nil {
			t.Fatalf("QCOW_CSI_SEED: %v", err)
		}
	}
	t.Logf("QCOW_CSI_SEED=%d", seed)
	return seed
}
