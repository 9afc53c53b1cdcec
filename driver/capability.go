package driver

import (
	"slices"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/qcow-csi/qcow-csi/driver/mount"
)

// DefaultFilesystem is made where nobody names a type.
const DefaultFilesystem = "ext4"

// accessModes are the supported ones. A volume is used on one node at a time, so that none of the MULTI_NODE modes is.
var accessModes = []csi.VolumeCapability_AccessMode_Mode{
	csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER,
	csi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY,
	csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER,
	csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER,
}

// checkCapability returns nil when volumes can be used as c says.
func checkCapability(c *csi.VolumeCapability) error {
	if c == nil {
		return argumentf("volume_capability is missing")
	}
	if mode := c.GetAccessMode().GetMode(); !slices.Contains(accessModes, mode) {
		return argumentf("access mode %s is not supported", mode)
	}
	switch use := c.GetAccessType().(type) {
	case *csi.VolumeCapability_Block:
		return nil
	case *csi.VolumeCapability_Mount:
		if use.Mount.GetVolumeMountGroup() != "" {
			return argumentf("volume_mount_group is not supported")
		}
		return filesystemOf(c, "").Validate()
	default:
		return argumentf("neither block nor mount is asked for")
	}
}

func checkCapabilities(list []*csi.VolumeCapability) error {
	if len(list) == 0 {
		return argumentf("volume_capabilities are missing")
	}
	for _, c := range list {
		if err := checkCapability(c); err != nil {
			return err
		}
	}
	return nil
}

// isBlock reports whether c asks for a raw block device.
func isBlock(c *csi.VolumeCapability) bool { return c.GetBlock() != nil }

// readOnlyMode reports whether c allows nothing but reading.
func readOnlyMode(c *csi.VolumeCapability) bool {
	return c.GetAccessMode().GetMode() == csi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY
}

// manyTargets reports whether c allows several publications of a volume on its node.
func manyTargets(c *csi.VolumeCapability) bool {
	return c.GetAccessMode().GetMode() == csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER
}

// filesystemOf returns the filesystem that c asks for. Where it names no type, preferred does, or else the default is
// meant.
func filesystemOf(c *csi.VolumeCapability, preferred string) mount.Filesystem {
	m := c.GetMount()
	for _, name := range []string{m.GetFsType(), preferred} {
		if name != "" {
			return mount.Filesystem{Type: name, Options: m.GetMountFlags()}
		}
	}
	return mount.Filesystem{Type: DefaultFilesystem, Options: m.GetMountFlags()}
}

// smallestFor returns the size that a volume needs at least to be used in all the ways of list.
func smallestFor(list []*csi.VolumeCapability, preferred string) int64 {
	var size int64
	for _, c := range list {
		if !isBlock(c) {
			size = max(size, mount.MinimumSize(filesystemOf(c, preferred).Type))
		}
	}
	return size
}
