package qcow_test

import (
	"bytes"
	"fmt"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/repair"
)

// Refcounts are rebuilt on a device that can't grow, in what is free inside the image: at its end or in a hole. Where nothing is free the repair
// fails, and the image is what it was.
func TestRebuildOnAFullDevice(t *testing.T) {
	const cluster = 4096
	content := repeated(1, 64*cluster)
	for name, c := range map[string]struct {
		hole, tail int64 // clusters that are free
		fits       bool
	}{
		"in a hole":  {hole: 8, fits: true},
		"at the end": {tail: 8, fits: true},
		"nowhere":    {},
	} {
		for what, spoil := range map[string]func(m *handmade){
			"no table":                 func(m *handmade) { m.patchHeader(atRefTable, 8, 0); m.patchHeader(atRefTableLength, 4, 0) },
			"no block":                 func(m *handmade) { m.put(m.h.RefcountTableOffset, 0) },
			"a block behind the world": func(m *handmade) { m.put(m.h.RefcountTableOffset, 1<<63-cluster) },
		} {
			t.Run(fmt.Sprintf("%s, %s", name, what), func(t *testing.T) {
				m := newHandmade(t, qcow.CreateOptions{Size: 1 << 20, ClusterSize: cluster}, func(img *qcow.Image) {
					writeAt(t, img, content, 0)
					do(t, img.Discard(20*cluster, c.hole*cluster))
				})
				m.b = append(m.b, make([]byte, c.tail*cluster)...)
				want := bytes.Clone(content)
				clear(want[20*cluster:][:c.hole*cluster])
				block := m.block()
				spoil(m)
				f := m.file()
				f.Limit(int64(len(m.b)))
				report, err := repair.Run(t.Context(), f, repair.Options{Mode: repair.All})
				if !c.fits && what != "no table" { // whose cluster, and that of its block, nothing refers to any more
					expectClass(t, "repair", err, qcow.ErrNoSpace)
					got := f.Bytes()
					clear(got[block:][:cluster]) // which nothing refers to either
					clear(m.b[block:][:cluster])
					if report != nil || !bytes.Equal(got, m.b) {
						t.Errorf("the image has changed: %v", report)
					}
					return
				}
				do(t, err)
				if n := len(f.Bytes()); n > len(m.b) || report.Raised() < 50 {
					t.Errorf("%d bytes became %d, %d refcounts were raised", len(m.b), n, report.Raised())
				}
				expectClean(t, f.Bytes())
				f.Limit(0)
				change(t, f, func(img *qcow.Image) {
					expectAt(t, img, want, 0)
					writeAt(t, img, repeated(2, 100*cluster), 100*cluster)
					expectAt(t, img, want, 0)
				})
				expectClean(t, f.Bytes())
			})
		}
	}
}
