package qcow_test

import (
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow"
)

// With the detection of zeroes, writing them takes no space, and gives back what was there.
func TestDetectZeroes(t *testing.T) {
	const cluster = 64 << 10
	for _, detect := range []bool{false, true} {
		f := create(t, qcow.CreateOptions{Size: 1 << 20})
		img := open(t, f, qcow.Options{DetectZeroes: detect})
		content := repeated(0, 1<<20)
		write := func(v byte, off, n int64) {
			p := repeated(v, n)
			writeAt(t, img, p, off)
			copy(content[off:], p)
		}
		write(0, 0, 4*cluster)
		write(1, 8*cluster, 4*cluster)
		write(0, 9*cluster, cluster)
		write(0, 10*cluster+512, 1024)
		expectAt(t, img, content, 0)
		data := int64(0)
		for e, err := range img.Extents(0, img.Size()) {
			if err != nil {
				t.Fatal(err)
			}
			if e.Kind == qcow.ExtentData {
				data += e.Length
			}
		}
		want := int64(8 * cluster)
		if detect {
			want = 3 * cluster
		}
		if data != want {
			t.Errorf("detection %v: %d bytes of data, want %d", detect, data, want)
		}
		if err := img.Close(); err != nil {
			t.Fatal(err)
		}
		expectClean(t, f.Bytes())
	}
}
