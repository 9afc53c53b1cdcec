package driver

import (
	"fmt"
	"slices"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

// topology says where volumes can be used: on every node that has the pool.
type topology struct {
	key, pool string
}

func (t topology) segments() *csi.Topology {
	return &csi.Topology{Segments: map[string]string{t.key: t.pool}}
}

// has reports whether volumes of this pool are accessible in other. Segments of other keys are none that the driver
// ever reported.
func (t topology) has(other *csi.Topology) bool {
	for key, value := range other.GetSegments() {
		if key != t.key || value != t.pool {
			return false
		}
	}
	return true
}

// satisfy returns nil when a volume of this pool fulfils the requirement.
func (t topology) satisfy(r *csi.TopologyRequirement) error {
	allowed := r.GetRequisite()
	if len(allowed) == 0 {
		allowed = r.GetPreferred()
	}
	if len(allowed) == 0 || slices.ContainsFunc(allowed, t.has) {
		return nil
	}
	return fmt.Errorf("%w: this is %s=%s", errElsewhere, t.key, t.pool)
}
