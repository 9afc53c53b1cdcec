package driver

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/qcow-csi/qcow-csi/driver/mount"
)

// Parameters of a StorageClass. Those that begin with csi.storage.k8s.io/ are the sidecars' convention.
const (
	parameterClusterSize = "clusterSize"
	parameterFilesystem  = "csi.storage.k8s.io/fstype"
)

// Added by external-provisioner with --extra-create-metadata; they say where a volume comes from and mean nothing here.
var ignoredParameters = map[string]bool{
	"csi.storage.k8s.io/pvc/name":      true,
	"csi.storage.k8s.io/pvc/namespace": true,
	"csi.storage.k8s.io/pv/name":       true,
}

// parameters are what a StorageClass can set.
type parameters struct {
	clusterSize int    // bytes; 0: the default
	filesystem  string // for capabilities that name none
}

// parseParameters refuses what it does not know: a misspelt parameter must not be found out after years.
func parseParameters(from map[string]string) (parameters, error) {
	var p parameters
	for key, value := range from {
		switch {
		case key == parameterClusterSize:
			size, err := parseBytes(value)
			if err != nil {
				return p, argumentf("parameter %s: %q is not a number of bytes such as 65536 or 64Ki", key, value)
			}
			p.clusterSize = size
		case key == parameterFilesystem:
			if err := (mount.Filesystem{Type: value}).Validate(); err != nil {
				return p, fmt.Errorf("parameter %s: %w", key, err)
			}
			p.filesystem = value
		case ignoredParameters[key]:
		default:
			return p, argumentf("unknown parameter %q", key)
		}
	}
	return p, nil
}

// parseBytes parses a positive number of bytes, with Ki or Mi behind it or without.
func parseBytes(s string) (int, error) {
	digits, shift := s, 0
	if rest, ok := strings.CutSuffix(s, "Ki"); ok {
		digits, shift = rest, 10
	} else if rest, ok := strings.CutSuffix(s, "Mi"); ok {
		digits, shift = rest, 20
	}
	n, err := strconv.ParseUint(digits, 10, 31-shift)
	if err == nil && n == 0 {
		err = strconv.ErrRange
	}
	return int(n) << shift, err
}
