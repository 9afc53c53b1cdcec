package driver

import (
	"fmt"
	"strings"

	"github.com/qcow-csi/qcow-csi/driver/pool"
)

// volumeHandle is what CSI calls a volume id: the pool's id, a slash, and the volume's id in that pool.
func volumeHandle(poolID, volumeID string) string { return poolID + "/" + volumeID }

// checkHandle refuses a missing handle. That a handle leads nowhere comes out later, when all else in a request is in
// order.
func checkHandle(handle string) error {
	if handle == "" {
		return argumentf("volume_id is missing")
	}
	return nil
}

// parseHandle returns the volume id in a handle of this pool. No other handle leads to a volume: ErrNotFound.
func parseHandle(handle, poolID string) (volumeID string, err error) {
	owner, volumeID, ok := strings.Cut(handle, "/")
	if !ok || !pool.ValidID(owner) || !pool.ValidID(volumeID) {
		return "", fmt.Errorf("%w: %q is no handle of a volume", pool.ErrNotFound, handle)
	}
	if owner != poolID {
		return "", fmt.Errorf("%w: %q belongs to another pool than %s", pool.ErrNotFound, handle, poolID)
	}
	return volumeID, nil
}
