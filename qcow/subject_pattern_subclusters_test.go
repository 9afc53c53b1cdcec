package qcow_test

import (
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"testing"
	"time"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// A subclusterStep is a request to an image whose subclusters have 2 KiB. Offset and length are in KiB.
type subclusterStep struct {
	what   string
	off, n float64
}

// subclusterSteps write, zero and discard subclusters in whole and in part, alone and several, of clusters of all kinds. The disk ends at
// 2083 KiB, inside a subcluster.
var subclusterSteps = []subclusterStep{
	{"write", 0, 1},
	{"write", 3, 0.5},
	{"write", 8, 4},
	{"write", 31, 3},
	{"write", 126, 68}, // the end of a cluster, a whole one, the start of another
	{"unmap", 40, 4},
	{"zero", 44, 4},
	{"unmap", 49, 4}, // half a subcluster, a whole one, half a one
	{"zero", 9, 0.5},
	{"unmap", 32, 2}, // subclusters with data
	{"zero", 34, 2},
	{"zero", 128, 64},
	{"unmap", 192, 64},
	{"write", 130, 2}, // into a cluster of zeroes that keeps its place
	{"discard", 128, 64},
	{"discard", 0, 32}, // less than a cluster
	{"compressed", 256, 64},
	{"zero", 258, 2},
	{"compressed", 320, 64},
	{"unmap", 321, 0.5},
	{"compressed", 384, 64},
	{"discard", 384, 64},
	{"compressed", 448, 64},
	{"write", 450, 2},
	{"write", 2080, 0.5},
	{"write", 2082, 1},
	{"write", 1024, 8},
	{"unmap", 1000, 100}, // from nothing over data to nothing
	{"zero", 900, 130},
	{"snapshot", 0, 0},
	{"write", 20, 1}, // between subclusters that have to move along
	{"write", 140, 30},
	{"unmap", 12, 2},
	{"write", 2081, 2},
	{"discard", 1024, 1059}, // to the end of the disk
}

// TestSubclusterWords does requests to two images, here and in QEMU, and compares all L2 entries after each: which subclusters have data, which are
// zeroes, and whether the cluster has a place. Both read as the model says.
func TestSubclusterWords(t *testing.T) {
	require.Tool(t, "qemu-img", "qemu-io")
	for _, backed := range []bool{true, false} {
		t.Run(fmt.Sprintf("backed=%v", backed), func(t *testing.T) {
			l := layer{kind: "extended", size: 2083 << 10, cluster: 64 << 10}
			dir := t.TempDir()
			c := &chain{t: t, files: files{"top": l.make(t)}, names: []string{"top"}, kinds: []string{"extended"}, want: make([]byte, l.size)}
			if backed {
				c.want = noise(rand.New(rand.NewPCG(1, 1)), l.size)
				writeFile(t, filepath.Join(dir, "base"), c.want)
				c.files["base"] = storage.NewMemoryFrom(append([]byte(nil), c.want...))
				c.names, c.kinds = []string{"base", "top"}, []string{"raw", "extended"}
				if err := qcow.RebaseUnsafe(c.files["top"], "base", "raw"); err != nil {
					t.Fatal(err)
				}
			}
			theirs := filepath.Join(dir, "theirs")
			writeFile(t, theirs, contentOf(t, c.files["top"]))
			alike := alikeWords
			if !backed {
				alike = alikeWithoutBacking
			}
			for i, s := range subclusterSteps {
				s.doHere(c, byte(i+1))
				s.doInQEMU(t, theirs, byte(i+1))
				if s.what == "snapshot" {
					alike = alikeAfterSnapshot
				}
				expectWords(t, fmt.Sprintf("%+v", s), c.files["top"], storage.NewMemoryFrom(readFile(t, theirs)), alike)
			}
			c.expectQEMU()
			c.files["top"] = storage.NewMemoryFrom(readFile(t, theirs))
			c.expectQEMU()
		})
	}
}

func (s subclusterStep) doHere(c *chain, value byte) {
	c.t.Helper()
	off, n := int64(s.off*1024), int64(s.n*1024)
	img := c.open(qcow.Options{ReserveBytes: 1})
	p := repeated(value, n)
	var err error
	switch s.what {
	case "write":
		_, err = img.WriteAt(p, off)
	case "compressed":
		err = img.WriteCompressed(p, off)
	case "snapshot":
		_, err = img.CreateSnapshot(c.t.Context(), "s", time.Unix(1, 0))
	case "discard":
		if first, end := wholeClusters(img, off, n); first < end {
			clear(c.want[first:end])
		}
		err = img.Discard(off, n)
		p = nil
	default:
		clear(p)
		err = img.WriteZeroes(off, n, s.what == "unmap")
	}
	copy(c.want[off:], p)
	if err != nil {
		c.t.Fatalf("%+v: %v", s, err)
	}
	expect(c.t, fmt.Sprintf("%+v: disk", s), diskOf(c.t, img), c.want)
	if err := img.Close(); err != nil {
		c.t.Fatal(err)
	}
	c.expectClean("top")
}

func (s subclusterStep) doInQEMU(t *testing.T, path string, value byte) {
	t.Helper()
	if s.what == "snapshot" {
		run(t, "qemu-img", "snapshot", "-c", "s", path)
		return
	}
	command := map[string]string{
		"write":      fmt.Sprintf("write -P %d", value),
		"compressed": fmt.Sprintf("write -c -P %d", value),
		"discard":    "discard",
		"zero":       "write -z",
		"unmap":      "write -z -u",
	}[s.what]
	run(t, "qemu-io", "-f", "qcow2", "-d", "unmap", "-c", fmt.Sprintf("%s %d %d", command, int64(s.off*1024), int64(s.n*1024)), path)
}

func alikeWords(ours, theirs format.Subclusters) bool { return ours == theirs }

// alikeWithoutBacking: QEMU marks zeroes that read as such anyway.
func alikeWithoutBacking(ours, theirs format.Subclusters) bool {
	return ours&format.AllData == theirs&format.AllData && ours&^theirs == 0
}

// alikeAfterSnapshot: QEMU copies all from the first to the last subcluster that has data, and makes data of it; here what had none stays so.
func alikeAfterSnapshot(ours, theirs format.Subclusters) bool {
	return ours&format.AllData&^theirs == 0 && ours>>32&^(theirs|theirs>>32) == 0
}

// expectWords expects both images to have alike subclusters, and a place in the same clusters.
func expectWords(t *testing.T, what string, ours, theirs storage.File, alike func(ours, theirs format.Subclusters) bool) {
	t.Helper()
	a, b := entriesOf(t, ours), entriesOf(t, theirs)
	for c := range uint64(33) {
		x, y := a[c], b[c]
		if x.Kind() != y.Kind() || (x.Offset() != 0) != (y.Offset() != 0) || !alike(x.Subclusters, y.Subclusters) {
			t.Fatalf("%s: cluster %d is %#x, %#x; in QEMU %#x, %#x", what, c, uint64(x.L2Entry), uint64(x.Subclusters), uint64(y.L2Entry), uint64(y.Subclusters))
		}
	}
}

// Subclusters that contradict themselves or their cluster can be neither read nor changed, and stay as they are.
func TestImpossibleSubclusters(t *testing.T) {
	const cluster = 16 << 10
	for name, damage := range map[string]func(e *format.MappingEntry){
		"data and zeroes":        func(e *format.MappingEntry) { e.Subclusters |= 1 << 37 },
		"data without a cluster": func(e *format.MappingEntry) { e.L2Entry = 0 },
		"the zero flag":          func(e *format.MappingEntry) { e.L2Entry |= format.ZeroPlain },
		"a place between":        func(e *format.MappingEntry) { e.L2Entry += 512 },
	} {
		t.Run(name, func(t *testing.T) {
			m := newHandmade(t, qcow.CreateOptions{Size: 8 * cluster, ClusterSize: cluster, ExtendedL2: true}, func(img *qcow.Image) {
				writeAt(t, img, repeated(1, 2*cluster), 0)
			})
			at := m.l2Table(1)
			e := m.h.MappingEntry(m.b[at:], 1)
			damage(&e)
			m.h.PutMappingEntry(m.b[at:], 1, e)
			for what, do := range map[string]func(img *qcow.Image) error{
				"read":    func(img *qcow.Image) error { _, err := img.ReadAt(make([]byte, 512), cluster); return err },
				"write":   writing([]byte{9}, cluster+5<<9),
				"zeroes":  func(img *qcow.Image) error { return img.WriteZeroes(cluster, 512, true) },
				"discard": func(img *qcow.Image) error { return img.Discard(cluster, cluster) },
			} {
				f := m.file()
				img := open(t, f, qcow.Options{ReserveBytes: cluster})
				expectClass(t, what, do(img), qcow.ErrCorrupt)
				expectAt(t, img, repeated(1, cluster), 0)
				expectCorruptOrNil(t, "close", img.Close())
				m.expectUnchanged(what, f)
			}
		})
	}
}
