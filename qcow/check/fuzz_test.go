package check_test

import (
	"bytes"
	"maps"
	"os"
	"os/exec"
	"slices"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow/check"
	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/test/edit"
)

// FuzzCheck feeds Check with damaged images. Whatever they hold it must not panic, hang or take much memory, and its counts
// must agree with its findings.
//
// The fuzzer does not mutate whole images, most of whose bytes mean nothing: it chooses a valid one and edits for it.
func FuzzCheck(f *testing.F) {
	var bases []edit.Base
	for _, bits := range []uint32{9, 12} {
		for order := range uint32(format.MaxRefcountOrder + 1) {
			b := newBuilder(f, bits, order, 80<<bits)
			b.data(0)
			b.data(70)
			b.compressed(3, b.alloc(1), 1)
			if order > 0 {
				b.snapshot("first")
			}
			b.bitmap("dirty")
			bases = append(bases, newBase(f, b.image()))
		}
	}
	for _, b := range []*builder{newVersion2(f), newExtended(f), newDataFile(f, false), newDataFile(f, true)} {
		bases = append(bases, newBase(f, b.image()))
	}
	if _, err := exec.LookPath("qemu-img"); err == nil { // last, so that the numbers of the others do not change
		for _, c := range qemuCases() {
			if c.clusterSize > 16<<10 {
				continue
			}
			image, err := os.ReadFile(qemuImage(f, f.TempDir(), c.clusterSize, c.refcountBits, c.features))
			if err != nil {
				f.Fatal(err)
			}
			if len(image) < 1<<20 {
				bases = append(bases, newBase(f, image))
			}
		}
	}
	for i := range bases {
		f.Add(uint8(i), []byte{})
		f.Add(uint8(i), bytes.Repeat([]byte{0, byte(i), 3, 0, 0, 0, 0, 0, 0, 0, 2, 0}, 3))
		f.Add(uint8(i), bytes.Repeat([]byte{2, 0, byte(i), 1, 0, 0, 0, 0, 0, 0, 0, 9}, 2))
	}

	f.Fuzz(func(t *testing.T, i uint8, edits []byte) {
		image := bases[int(i)%len(bases)].Apply(edits)
		before := bytes.Clone(image)
		options := check.Options{MaxFindings: 1 << 20, MaxMemory: 64 << 20}
		r, err := check.Check(t.Context(), memory(image), options)
		if !bytes.Equal(image, before) {
			t.Fatal("the image was changed")
		}
		if err != nil {
			if r != nil {
				t.Fatalf("both a report and an error: %v", err)
			}
			return
		}
		leaks, corruptions := 0, 0
		for _, finding := range r.Findings {
			if finding.String() == "" || finding.Severity != finding.Kind.Severity() {
				t.Errorf("finding %#v", finding)
			}
			if finding.Severity == check.Leak {
				leaks++
			} else {
				corruptions++
			}
		}
		if len(r.Findings) < options.MaxFindings && (leaks != r.Leaks || corruptions != r.Corruptions) {
			t.Errorf("counted %d leaks and %d corruptions, reported %d and %d", leaks, corruptions, r.Leaks, r.Corruptions)
		}
		// A second check, whose memory comes from the first, says the same.
		again, err := check.Check(t.Context(), memory(image), options)
		if err != nil || again.String() != r.String() {
			t.Errorf("first %v\nthen %v, error %v", r, again, err)
		}
	})
}

func newBase(t testing.TB, image []byte) edit.Base {
	ts := findTables(t, image)
	var refcounts []int
	for _, block := range ts.blocks {
		for off := range int(ts.h.ClusterSize()) / 8 {
			refcounts = append(refcounts, block+off*8)
		}
	}
	return edit.NewBase(image, refcounts, slices.Concat(slices.Collect(maps.Values(ts.entries))...))
}
