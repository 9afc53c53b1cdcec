package qcow_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/check"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// dirtyModel says what must be dirty: one bool for each bit.
type dirtyModel struct {
	size, granularity int64
	dirty             []bool
}

func newDirtyModel(size, granularity int64) *dirtyModel {
	m := &dirtyModel{granularity: granularity}
	m.resize(size)
	return m
}

// resize cuts off or adds bits, which are not set.
func (m *dirtyModel) resize(size int64) {
	n := int((size + m.granularity - 1) / m.granularity)
	m.dirty = append(m.dirty, make([]bool, max(n-len(m.dirty), 0))...)[:n]
	m.size = size
}

func (m *dirtyModel) note(off, n int64) {
	for i := off / m.granularity; n > 0 && i <= (off+n-1)/m.granularity; i++ {
		m.dirty[i] = true
	}
}

func (m *dirtyModel) extents() []qcow.DirtyExtent {
	var list []qcow.DirtyExtent
	for i, dirty := range m.dirty {
		if !dirty {
			continue
		}
		start := int64(i) * m.granularity
		list = joinExtent(list, qcow.DirtyExtent{Offset: start, Length: min(m.granularity, m.size-start)})
	}
	return list
}

func joinExtent(list []qcow.DirtyExtent, e qcow.DirtyExtent) []qcow.DirtyExtent {
	if last := len(list) - 1; last >= 0 && list[last].Offset+list[last].Length == e.Offset {
		list[last].Length += e.Length
		return list
	}
	return append(list, e)
}

// dirtyExtents returns what is dirty of the whole disk.
func dirtyExtents(img *qcow.Image, name string) ([]qcow.DirtyExtent, error) {
	var list []qcow.DirtyExtent
	for e, err := range img.DirtyExtents(name, 0, img.Size()) {
		if err != nil {
			return list, err
		}
		list = append(list, e)
	}
	return list, nil
}

func expectDirty(t testing.TB, img *qcow.Image, name string, want []qcow.DirtyExtent) {
	t.Helper()
	got, err := dirtyExtents(img, name)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(got, want) {
		t.Fatalf("bitmap %q says %s\nwant %s", name, briefly(got), briefly(want))
	}
	sum := int64(0)
	for _, e := range want {
		sum += e.Length
	}
	if info := bitmapInfo(t, img, name); info.Count != sum {
		t.Fatalf("bitmap %q counts %d dirty bytes, want %d", name, info.Count, sum)
	}
}

// briefly returns the first extents.
func briefly(list []qcow.DirtyExtent) string {
	return fmt.Sprintf("%d extents, %v", len(list), list[:min(len(list), 12)])
}

func bitmapInfo(t testing.TB, img *qcow.Image, name string) qcow.BitmapInfo {
	t.Helper()
	list, err := img.Bitmaps()
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(list, func(b qcow.BitmapInfo) bool { return b.Name == name })
	if i < 0 {
		t.Fatalf("no bitmap %q among %+v", name, list)
	}
	return list[i]
}

func addBitmap(t testing.TB, img *qcow.Image, name string, o qcow.BitmapOptions) {
	t.Helper()
	if err := img.AddBitmap(t.Context(), name, o); err != nil {
		t.Fatalf("add bitmap %q: %v", name, err)
	}
}

func do(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// qemuFile is an image in a file of its own, for QEMU's programs.
type qemuFile struct {
	t    testing.TB
	path string
}

func newQEMUFile(t testing.TB, content []byte) *qemuFile {
	t.Helper()
	q := &qemuFile{t: t, path: filepath.Join(t.TempDir(), "image.qcow2")}
	if content != nil {
		do(t, os.WriteFile(q.path, content, 0o600))
	}
	return q
}

func (q *qemuFile) run(name string, args ...string) []byte {
	q.t.Helper()
	var stderr bytes.Buffer
	cmd := exec.CommandContext(q.t.Context(), name, args...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		q.t.Fatalf("%s %v: %v\n%s%s", name, args, err, out, stderr.Bytes())
	}
	return out
}

// bitmap runs qemu-img bitmap.
func (q *qemuFile) bitmap(args ...string) {
	q.t.Helper()
	q.run("qemu-img", append([]string{"bitmap", "-f", "qcow2"}, args...)...)
}

// io runs commands of qemu-io.
func (q *qemuFile) io(commands ...string) {
	q.t.Helper()
	args := []string{"-f", "qcow2"}
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	if out := q.run("qemu-io", append(args, q.path)...); bytes.Contains(out, []byte("failed")) {
		q.t.Fatalf("qemu-io %v: %s", commands, out)
	}
}

// qemuBitmap is what qemu-img info says of a bitmap.
type qemuBitmap struct {
	Name        string
	Granularity int64
	Flags       []string
}

func (q *qemuFile) bitmaps() []qemuBitmap {
	q.t.Helper()
	var info struct {
		Format struct {
			Data struct{ Bitmaps []qemuBitmap }
		} `json:"format-specific"`
	}
	do(q.t, json.Unmarshal(q.run("qemu-img", "info", "-f", "qcow2", "--output=json", q.path), &info))
	return info.Format.Data.Bitmaps
}

// dirty returns what a bitmap says to QEMU. The file is changed: QEMU gives out bitmaps only that are disabled.
func (q *qemuFile) dirty(name string) []qcow.DirtyExtent {
	q.t.Helper()
	q.bitmap("--disable", q.path, name)
	out := q.run("nbdinfo", "--map=qemu:dirty-bitmap:"+name, "--", "[", "qemu-nbd", "-r", "-f", "qcow2", "-B", name, q.path, "]")
	var list []qcow.DirtyExtent
	for line := range strings.Lines(string(out)) {
		f := strings.Fields(line)
		if len(f) < 4 {
			q.t.Fatalf("nbdinfo says %q", line)
		}
		off, err := strconv.ParseInt(f[0], 10, 64)
		do(q.t, err)
		n, err := strconv.ParseInt(f[1], 10, 64)
		do(q.t, err)
		if f[2] == "1" {
			list = joinExtent(list, qcow.DirtyExtent{Offset: off, Length: n})
		}
	}
	return list
}

func (q *qemuFile) expectDirty(name string, want []qcow.DirtyExtent) {
	q.t.Helper()
	if got := q.dirty(name); !slices.Equal(got, want) {
		q.t.Fatalf("bitmap %q says to QEMU: %s\nwant %s", name, briefly(got), briefly(want))
	}
}

// change opens the image, lets do change it, and closes it.
func (q *qemuFile) change(do func(img *qcow.Image)) {
	q.t.Helper()
	f, err := storage.Open(q.path, storage.ReadWrite)
	if err != nil {
		q.t.Fatal(err)
	}
	change(q.t, f, do)
}

// read opens the image for reading.
func (q *qemuFile) read(do func(img *qcow.Image)) {
	q.t.Helper()
	f, err := storage.Open(q.path, storage.ReadOnly)
	if err != nil {
		q.t.Fatal(err)
	}
	img := open(q.t, f, qcow.Options{ReadOnly: true})
	do(img)
	if err := img.Close(); err != nil {
		q.t.Fatal(err)
	}
}

// expectClean holds the file against the checkers.
func (q *qemuFile) expectClean() {
	q.t.Helper()
	f, err := storage.Open(q.path, storage.ReadOnly)
	if err != nil {
		q.t.Fatal(err)
	}
	report, err := check.Check(q.t.Context(), f, check.Options{})
	if err != nil || !report.Clean() {
		q.t.Fatalf("the image is not clean: %v, %v", report, err)
	}
	do(q.t, f.Close())
	q.run("qemu-img", "check", "-f", "qcow2", q.path)
}

// guest sends random requests of every kind, and tells what they touch.
type guest struct {
	t    testing.TB
	rng  *rand.Rand
	img  *qcow.Image
	note func(off, n int64)
}

func (g *guest) step() {
	g.t.Helper()
	size, cluster := g.img.Size(), int64(g.img.Info().ClusterSize)
	n := 1 + g.rng.Int64N(min(size, 1<<(1+g.rng.IntN(18))))
	off := g.rng.Int64N(size - n + 1)
	if g.rng.IntN(8) == 0 {
		off = size - n
	}
	var err error
	switch g.rng.IntN(9) {
	case 0:
		err = g.img.WriteZeroes(off, n, g.rng.IntN(2) == 0)
	case 1:
		err = g.img.Discard(off, n)
	case 2:
		_, err = g.img.WriteSync(repeated(byte(g.rng.Uint32()), n), off)
	case 3:
		off = off / cluster * cluster
		n = min((n+cluster-1)/cluster*cluster, size-off)
		err = g.img.WriteCompressed(repeated(byte(g.rng.Uint32()), n), off)
	default:
		_, err = g.img.WriteAt(repeated(byte(g.rng.Uint32()), n), off)
	}
	if err != nil {
		g.t.Fatal(err)
	}
	g.note(off, n)
}

func (m *dirtyModel) extentsOrNone() []qcow.DirtyExtent {
	if m == nil {
		return nil
	}
	return m.extents()
}
