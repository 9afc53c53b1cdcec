package qcow_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// Spans of an image and of its backing file alternate, at the start of a large disk, behind 4 GiB, and across the end of the backing file, which is
// inside a cluster. The disk reads the same when it is copied, rebased onto what it has, and committed.
func TestPatternsOverBacking(t *testing.T) {
	const cluster, end, size = 64 << 10, 7<<30 + 1536, 8 << 30
	base, want := create(t, qcow.CreateOptions{Size: end, ClusterSize: 4096}), sparseDisk{}
	spans := append(pattern(cluster, 0, 2), pattern(cluster, 4<<30, 2)...)
	for off := int64(end - 8*512); off < end+8*512; off += 512 {
		spans = append(spans, span{off, 512})
	}
	change(t, base, func(img *qcow.Image) {
		for i, s := range spans {
			if i%2 == 0 && s.off < end {
				writeAt(t, img, want.write(s.off, s.n, 1), s.off)
			}
		}
	})
	f := files{"base": base}
	top := overlay(t, qcow.CreateOptions{Size: size}, "base", "qcow2")
	f["top"] = top
	img := open(t, top, qcow.Options{Gate: f.gate, CommitDepth: 1, ReserveBytes: 4 << 20})
	want.expect(t, img)
	for i, s := range spans {
		if i%2 == 1 {
			writeAt(t, img, want.write(s.off, s.n, 2), s.off)
		}
	}
	want.expect(t, img)
	expectAt(t, img, want.bytes(end-1<<20-1536, 4<<20), end-1<<20-1536) // one read across the end

	alone := create(t, qcow.CreateOptions{Size: size, ClusterSize: 16 << 10})
	copied := open(t, alone, qcow.Options{})
	if err := qcow.Copy(t.Context(), copied, img, qcow.CopyOptions{TargetIsZero: true}); err != nil {
		t.Fatal(err)
	}
	want.expect(t, copied)
	closeClean(t, copied, alone)

	if err := img.Commit(t.Context(), qcow.CommitOptions{}); err != nil {
		t.Fatal(err)
	}
	want.expect(t, img)
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	expectClean(t, base.Bytes())
	committed := open(t, base, qcow.Options{ReadOnly: true})
	if committed.Size() != size {
		t.Errorf("the backing file has %d bytes", committed.Size())
	}
	want.expect(t, committed)
	img = open(t, top, qcow.Options{Gate: f.gate})
	before := kindsOf(t, img)
	if err := img.Rebase(t.Context(), qcow.RebaseOptions{BackingFile: "base", BackingFormat: "qcow2", Gate: f.gate}); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(kindsOf(t, img), before) {
		t.Error("a rebase onto the same file has allocated clusters")
	}
	want.expect(t, img)
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	(&chain{t: t, files: f}).expectClean("top")
}

// rebaseRow is what clusters have in the old backing file, in the new one, and in the image between: nothing, data, other data, zeroes.
func rebaseRow() (row [][3]byte) {
	for _, before := range []byte(".a") {
		for _, after := range []byte(".ab") {
			for _, own := range []byte(".cz") {
				row = append(row, [3]byte{before, after, own})
			}
		}
	}
	return row
}

// rebasedKind returns what becomes of a cluster.
func rebasedKind(c [3]byte) qcow.ExtentKind {
	switch {
	case c[2] == 'c':
		return qcow.ExtentData
	case c[2] == 'z':
		return qcow.ExtentZero
	case c[0] == c[1]:
		return qcow.ExtentUnallocated
	case c[0] == '.': // what the new one has must not show
		return qcow.ExtentZero
	}
	return qcow.ExtentData
}

// Clusters with something, something else and nothing in the old backing file, the new one and the image read as before, and are copied only
// where the files differ and the image has nothing.
func TestRebaseOfEveryCombination(t *testing.T) {
	const cluster = 4096
	row := rebaseRow()
	backwards := slices.Clone(row)
	slices.Reverse(backwards)
	for name, row := range map[string][][3]byte{"in order": row, "backwards": backwards} {
		for _, backed := range []bool{true, false} {
			for _, empty := range []bool{true, false} { // the new one has nothing at all
				t.Run(fmt.Sprintf("%s/backed=%v/onto nothing=%v", name, backed, empty), func(t *testing.T) {
					row := slices.Clone(row)
					for i := range row {
						if !backed {
							row[i][0] = '.'
						}
						if empty {
							row[i][1] = '.'
						}
					}
					rebaseEvery(t, cluster, row, backed, empty)
				})
			}
		}
	}
}

func rebaseEvery(t *testing.T, cluster int64, row [][3]byte, backed, empty bool) {
	size := int64(len(row)) * cluster
	c := &chain{t: t, files: files{}, names: []string{"after", "top"}, kinds: []string{"", ""}, want: make([]byte, size)}
	o := qcow.CreateOptions{Size: size, ClusterSize: int(cluster)}
	for i, name := range []string{"before", "after", "top"} {
		if i == 2 && backed {
			o.BackingFile, o.BackingFormat = "before", "qcow2"
		}
		c.files[name] = create(t, o)
		img := open(t, c.files[name], qcow.Options{Gate: c.files.gate})
		for k, kinds := range row {
			off := int64(k) * cluster
			var err error
			p := repeated(kinds[i], cluster)
			switch kinds[i] {
			case '.':
				continue
			case 'z':
				clear(p)
				_, err = img.WriteAt(repeated(1, cluster), off)
				err = first(err, img.WriteZeroes(off, cluster, true))
			default:
				_, err = img.WriteAt(p, off)
			}
			if err != nil {
				t.Fatal(err)
			}
			if i != 1 {
				copy(c.want[off:], p)
			}
		}
		if err := img.Close(); err != nil {
			t.Fatal(err)
		}
	}
	rebase := qcow.RebaseOptions{BackingFile: "after", BackingFormat: "qcow2", Gate: c.files.gate}
	if empty {
		rebase = qcow.RebaseOptions{}
		c.names, c.kinds = []string{"top"}, []string{""}
	}
	before := contentOf(t, c.files["top"])
	img := c.open(qcow.Options{})
	if err := img.Rebase(t.Context(), rebase); err != nil {
		t.Fatal(err)
	}
	expect(t, "disk", diskOf(t, img), c.want)
	var want []qcow.ExtentKind
	for _, kinds := range row {
		kind := rebasedKind(kinds)
		if kinds[2] == 'z' && !backed { // nothing was there to be hidden, until now
			kind = rebasedKind([3]byte{'.', kinds[1], '.'})
		}
		want = append(want, kind)
	}
	expectKinds(t, img, want...)
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	delete(c.files, "before")
	c.expectQEMU()
	if !backed && empty {
		expect(t, "an image rebased from nothing onto nothing", contentOf(t, c.files["top"]), before)
	}
}

// A disk of no bytes is committed, rebased onto another one, and copied.
func TestRebaseOfNoBytes(t *testing.T) {
	f := files{"a": create(t, qcow.CreateOptions{}), "b": create(t, qcow.CreateOptions{})}
	top := overlay(t, qcow.CreateOptions{}, "a", "qcow2")
	img := open(t, top, qcow.Options{Gate: f.gate, CommitDepth: 1})
	if err := img.Commit(t.Context(), qcow.CommitOptions{Empty: true}); err != nil {
		t.Fatal(err)
	}
	if err := img.Rebase(t.Context(), qcow.RebaseOptions{BackingFile: "b", BackingFormat: "qcow2", Gate: f.gate}); err != nil {
		t.Fatal(err)
	}
	f["copy"], f["top"] = create(t, qcow.CreateOptions{}), top
	change(t, f["copy"], func(copied *qcow.Image) {
		for _, compress := range []bool{false, true} {
			if err := qcow.Copy(t.Context(), copied, img, qcow.CopyOptions{Compress: compress}); err != nil {
				t.Fatal(err)
			}
		}
	})
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	for name := range f {
		(&chain{t: t, files: f}).expectClean(name)
	}
}

// A disk that is cut off inside a cluster, and grows inside the same one, shows neither what it had there nor what its backing file has.
func TestShrinkAndGrowInOneCluster(t *testing.T) {
	const k = 1 << 10
	for _, kind := range []string{"", "v2", "extended"} {
		l := layer{kind: kind, size: 1 << 20, cluster: 64 * k}
		c := &chain{
			t: t, files: files{"base": storage.NewMemoryFrom(repeated(0x11, 1<<20)), "top": l.make(t)}, names: []string{"base", "top"},
			kinds: []string{"raw", kind},
		}
		if err := qcow.RebaseUnsafe(c.files["top"], "base", "raw"); err != nil {
			t.Fatal(err)
		}
		img := c.open(qcow.Options{})
		writeAt(t, img, repeated(0x22, 1<<20), 0)
		for _, size := range []int64{520 * k, 567 * k} {
			if err := img.Resize(t.Context(), size); err != nil {
				t.Fatal(err)
			}
		}
		c.want = append(repeated(0x22, 520*k), make([]byte, 47*k)...)
		expect(t, "disk", diskOf(t, img), c.want)
		if err := img.Close(); err != nil {
			t.Fatal(err)
		}
		c.expectQEMU()
	}
}

// A disk shorter than its backing file grows beyond that one, aligned or not: nothing of the file comes to light, and only what has to be hidden
// takes entries.
func TestGrowPastTheBackingFile(t *testing.T) {
	const k, gib = 1 << 10, 1 << 30
	for _, x := range []struct{ base, old, now int64 }{
		{6 * gib, 1 * gib, 8 * gib},
		{384 * k, 253 * k, 512 * k},
		{384*k + 512, 64 * k, 384*k + 1024},
		{2 * gib, 512, 2*gib - 512},
	} {
		t.Run(fmt.Sprint(x), func(t *testing.T) {
			base, want := create(t, qcow.CreateOptions{Size: x.base, ClusterSize: 512}), sparseDisk{}
			change(t, base, func(img *qcow.Image) {
				for i := range int64(16) {
					off := x.base / 16 * i / 512 * 512
					writeAt(t, img, want.write(off, 1024, byte(i)), off)
				}
				writeAt(t, img, want.write(x.base-512, 512, 0), x.base-512)
			})
			f := files{"base": base}
			top := overlay(t, qcow.CreateOptions{Size: x.old}, "base", "qcow2")
			img := open(t, top, qcow.Options{Gate: f.gate})
			if err := img.Resize(t.Context(), x.now); err != nil {
				t.Fatal(err)
			}
			want.zero(x.old, x.base-x.old)
			want.expect(t, img)
			if err := img.Close(); err != nil {
				t.Fatal(err)
			}
			(&chain{t: t, files: files{"top": top}}).expectClean("top")
			for cluster, e := range entriesOf(t, top) {
				if at := int64(cluster) * 64 * k; at >= x.base {
					t.Errorf("the cluster at %d, behind the end of the backing file, is %#x", at, uint64(e.L2Entry))
				}
			}
			img = open(t, top, qcow.Options{Gate: f.gate, ReadOnly: true})
			want.expect(t, img)
			if err := img.Close(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// A chain whose middle is shorter than what is before and behind it shows zeroes where that has ended.
func TestShortMiddle(t *testing.T) {
	const mib = 1 << 20
	for depth := range 3 { // into which file it is committed
		rng := rand.New(rand.NewPCG(2, 7))
		base := noise(rng, 2*mib)
		c := &chain{t: t, files: files{}, names: []string{"base", "middle", "top"}, kinds: []string{"", "", ""}}
		c.files["base"] = create(t, qcow.CreateOptions{Size: 2 * mib})
		change(t, c.files["base"], func(img *qcow.Image) { writeAt(t, img, base, 0) })
		c.files["middle"] = overlay(t, qcow.CreateOptions{Size: mib}, "base", "qcow2")
		c.files["top"] = overlay(t, qcow.CreateOptions{Size: 2 * mib}, "middle", "qcow2")
		c.want = append(bytes.Clone(base[:mib]), make([]byte, mib)...)
		c.expectQEMU() // reads and maps it the same
		img := c.open(qcow.Options{CommitDepth: depth})
		p := noise(rng, 64<<10)
		writeAt(t, img, p, 512<<10)
		copy(c.want[512<<10:], p)
		want := map[string][]byte{"base": base, "middle": bytes.Clone(base[:mib])}
		switch depth {
		case 1:
			want["middle"] = c.want
		case 2:
			want["base"] = c.want // the tail is zero, and so is that of the middle
			want["middle"] = c.want[:mib]
		}
		if depth > 0 {
			if err := img.Commit(t.Context(), qcow.CommitOptions{}); err != nil {
				t.Fatal(err)
			}
		}
		if err := img.Close(); err != nil {
			t.Fatal(err)
		}
		for name, content := range want {
			expect(t, fmt.Sprintf("depth %d: %s", depth, name), c.content(name), content)
		}
		c.expectQEMU()
	}
}
