package attach

import (
	"net/url"
	"strings"
)

// Tag is what a device carries in the kernel, so that its owner finds it again: "qcow-csi:OWNER:VOLUME".
func Tag(owner, volumeID string) string { return prefix(owner) + volumeID }

// VolumeOf returns the volume of a device with this tag, if it is one of owner's.
func VolumeOf(owner, tag string) (volumeID string, ok bool) {
	volumeID, ok = strings.CutPrefix(tag, prefix(owner))
	return volumeID, ok && checkVolumeID(volumeID) == nil
}

// prefix has the owner escaped, so that no owner's tags begin like another one's. The names of drivers stay as they are.
func prefix(owner string) string { return "qcow-csi:" + url.QueryEscape(owner) + ":" }
