package attach_test

import (
	"strings"
	"testing"

	"github.com/qcow-csi/qcow-csi/driver/attach"
)

func TestTag(t *testing.T) {
	if got, want := attach.Tag("qcow-csi.io", "pool/volume"), "qcow-csi:qcow-csi.io:pool/volume"; got != want {
		t.Errorf("tag %q, want %q", got, want)
	}
	volumes := []string{"v", "b:v", ":", "pool/volume", " "}
	owners := []string{"a", "a:b", "a%3Ab", "", "qcow-csi.io"}
	for _, owner := range owners {
		for _, volume := range volumes {
			tag := attach.Tag(owner, volume)
			for _, other := range owners {
				got, ok := attach.VolumeOf(other, tag)
				if ok != (other == owner) || (ok && got != volume) {
					t.Errorf("owner %q: tag %q belongs to volume %q: %v", other, tag, got, ok)
				}
			}
		}
	}
	for _, tag := range []string{
		"", "qcow-csi:", "qcow-csi:o", "qcow-csi:o:", "xqcow-csi:o:v", "qcow-csi:o:a\nb", "qcow-csi:o:" + strings.Repeat("x", 129),
	} {
		if volume, ok := attach.VolumeOf("o", tag); ok {
			t.Errorf("tag %q belongs to volume %q", tag, volume)
		}
	}
}

func FuzzVolumeOf(f *testing.F) {
	f.Add("o", "qcow-csi:o:v")
	f.Add("a:b", "qcow-csi:a%3Ab:pool/volume")
	f.Fuzz(func(t *testing.T, owner, tag string) {
		if volume, ok := attach.VolumeOf(owner, tag); ok && attach.Tag(owner, volume) != tag {
			t.Errorf("owner %q: tag %q belongs to volume %q, whose tag is %q", owner, tag, volume, attach.Tag(owner, volume))
		}
	})
}
