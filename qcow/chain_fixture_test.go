package qcow_test

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/check"
	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/luks"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// files are what a gate opens by name, in memory.
type files map[string]storage.File

// gate opens the files, and trusts the formats that images state.
func (f files) gate(r qcow.Reference) (qcow.Opened, error) {
	file := f[r.Name]
	if file == nil {
		return qcow.Opened{}, fmt.Errorf("%q: %w", r.Name, os.ErrNotExist)
	}
	return qcow.Opened{File: file, Format: r.Format, Gate: f.gate}, nil
}

// copied returns copies of the files, all in memory, as they are now.
func (f files) copied() files {
	list := files{}
	for name, file := range f {
		list[name] = storage.NewMemoryFrom(file.(*storage.Memory).Bytes())
	}
	return list
}

// overlay returns a file with a new image on the backing file with that name and format.
func overlay(t testing.TB, o qcow.CreateOptions, name, backingFormat string) *storage.Memory {
	t.Helper()
	f := create(t, o)
	if err := qcow.RebaseUnsafe(f, name, backingFormat); err != nil {
		t.Fatal(err)
	}
	return f
}

// run runs a program and returns what it printed.
func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// readFile returns the content of a file of the file system.
func readFile(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func writeFile(t testing.TB, path string, b []byte) {
	t.Helper()
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// A layer is one file of a chain to be made. The zero value is an image of version 3.
type layer struct {
	kind    string // "", "raw", "v2", "extended", "compressed" or "luks"
	size    int64
	cluster int // bytes; default 512, and 16 KiB for extended L2 entries
}

const passphrase = "open sesame"

// make returns a new image without content. Those that the engine does not make itself are QEMU's.
func (l *layer) make(t testing.TB) *storage.Memory {
	t.Helper()
	if l.cluster == 0 {
		l.cluster = 512
		if l.kind == "extended" {
			l.cluster = 16 << 10
		}
	}
	options := map[string]string{"v2": "compat=0.10", "extended": "extended_l2=on"}
	o, qemu := options[l.kind]
	switch {
	case l.kind == "luks":
		return encrypted(t, qcow.CreateOptions{Size: l.size, ClusterSize: l.cluster})
	case !qemu:
		return create(t, qcow.CreateOptions{Size: l.size, ClusterSize: l.cluster})
	}
	require.Tool(t, "qemu-img")
	path := filepath.Join(t.TempDir(), "image")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", fmt.Sprintf("%s,cluster_size=%d", o, l.cluster), path, fmt.Sprint(l.size))
	return storage.NewMemoryFrom(readFile(t, path))
}

// encrypted returns a new image that is encrypted. QEMU would take seconds for it, to find out how fast the machine is.
func encrypted(t testing.TB, o qcow.CreateOptions) *storage.Memory {
	t.Helper()
	m := newHandmade(t, o, nil)
	header, _, err := luks.Create(t.Context(), []byte(passphrase), luks.CreateOptions{KeyOptions: luks.KeyOptions{Iterations: luks.MinIterations}})
	if err != nil {
		t.Fatal(err)
	}
	at := uint64(len(m.b))
	for off := at; off < at+uint64(len(header)); off += m.h.ClusterSize() {
		m.setRefcount(format.HostOffset(off), 1)
	}
	m.h.CryptMethod = 2
	m.h.SetExtension(format.ExtFullDisk, binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(nil, at), uint64(len(header))))
	first, err := m.h.Encode()
	if err != nil {
		t.Fatal(err)
	}
	copy(m.b, first)
	m.b = append(m.b, header...)
	return m.file()
}

// A chain is images one on the other in memory, the one without a backing file first, and what the last reads as.
type chain struct {
	t     testing.TB
	rng   *rand.Rand
	files files
	names []string
	kinds []string
	want  []byte
}

// newChain makes a chain of layers with random content: data, zeroes and nothing, at any alignment.
func newChain(t testing.TB, rng *rand.Rand, layers ...layer) *chain {
	t.Helper()
	c := &chain{t: t, rng: rng, files: files{}}
	for i := range layers {
		c.add(&layers[i])
	}
	return c
}

// add puts a layer on the chain.
func (c *chain) add(l *layer) {
	c.t.Helper()
	want := make([]byte, l.size)
	copy(want, c.want)
	name := fmt.Sprintf("%d.%s", len(c.names), l.format())
	switch {
	case l.kind == "raw":
		c.scribble(want, 1, func(p []byte, off int64) { copy(want[off:], p) })
		c.files[name] = storage.NewMemoryFrom(bytes.Clone(want))
	case l.kind == "compressed": // the lowest one only: QEMU copies all of it
		c.scribble(want, 1, func(p []byte, off int64) { copy(want[off:], p) })
		c.files[name] = c.compress(want, l.cluster)
	default:
		c.files[name] = l.make(c.t)
	}
	if len(c.names) > 0 {
		if err := qcow.RebaseUnsafe(c.files[name], c.top(), formatOf(c.kinds[len(c.kinds)-1])); err != nil {
			c.t.Fatal(err)
		}
	}
	c.names, c.kinds, c.want = append(c.names, name), append(c.kinds, l.kind), want
	if l.kind == "raw" || l.kind == "compressed" {
		return
	}
	img := c.open(qcow.Options{ReserveBytes: 64 << 10})
	c.scribble(want, 512, func(p []byte, off int64) {
		if c.rng.IntN(4) == 0 {
			clear(p)
			if err := img.WriteZeroes(off, int64(len(p)), c.rng.IntN(2) == 0); err != nil {
				c.t.Fatal(err)
			}
		} else {
			writeAt(c.t, img, p, off)
		}
		copy(want[off:], p)
	})
	if err := img.Close(); err != nil {
		c.t.Fatal(err)
	}
}

func (l *layer) format() string { return formatOf(l.kind) }

func formatOf(kind string) string {
	if kind == "raw" {
		return "raw"
	}
	return "qcow2"
}

func (c *chain) top() string { return c.names[len(c.names)-1] }

// scribble calls write with some random ranges of the disk, of whole units.
func (c *chain) scribble(want []byte, unit int64, write func(p []byte, off int64)) {
	size := int64(len(want))
	for range 8 {
		n := min((c.rng.Int64N(size/4)+unit)/unit*unit, size)
		off := c.rng.Int64N(size-n+1) / unit * unit
		write(noise(c.rng, n), off)
	}
}

// noise returns n random bytes, none of them zero.
func noise(rng *rand.Rand, n int64) []byte {
	p := make([]byte, n)
	seed := byte(1 + rng.IntN(255))
	for i := range p {
		p[i] = seed + byte(i/7)
		if p[i] == 0 {
			p[i] = 1
		}
	}
	return p
}

// compress returns an image of compressed clusters.
func (c *chain) compress(content []byte, cluster int) *storage.Memory {
	require.Tool(c.t, "qemu-img")
	dir := c.t.TempDir()
	writeFile(c.t, filepath.Join(dir, "raw"), content)
	run(c.t, "qemu-img", "convert", "-f", "raw", "-c", "-O", "qcow2", "-o", fmt.Sprintf("cluster_size=%d", max(cluster, 4096)),
		filepath.Join(dir, "raw"), filepath.Join(dir, "image"))
	return storage.NewMemoryFrom(readFile(c.t, filepath.Join(dir, "image")))
}

// open opens the last image of the chain.
func (c *chain) open(o qcow.Options) *qcow.Image {
	c.t.Helper()
	o.Gate, o.Passphrase = c.files.gate, []byte(passphrase)
	return open(c.t, c.files[c.top()], o)
}

// content returns what an image of the chain reads as.
func (c *chain) content(name string) []byte {
	c.t.Helper()
	f := c.files[name]
	if strings.HasSuffix(name, ".raw") {
		return contentOf(c.t, f)
	}
	img := open(c.t, f, qcow.Options{ReadOnly: true, Gate: c.files.gate, Passphrase: []byte(passphrase)})
	return diskOf(c.t, img)
}

// contentOf returns the bytes of a file.
func contentOf(t testing.TB, f storage.File) []byte {
	t.Helper()
	size, err := f.Size()
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, size)
	if n, err := f.ReadAt(b, 0); n != len(b) {
		t.Fatalf("read %d of %d bytes: %v", n, len(b), err)
	}
	return b
}

// diskOf returns what an image reads as.
func diskOf(t testing.TB, img *qcow.Image) []byte {
	t.Helper()
	b := make([]byte, img.Size())
	if n, err := img.ReadAt(b, 0); err != nil || n != len(b) {
		t.Fatalf("read %d of %d bytes: %v", n, len(b), err)
	}
	return b
}

// expect fails the test unless got is want.
func expect(t testing.TB, what string, got, want []byte) {
	t.Helper()
	if i := firstDifference(got, want); i >= 0 || len(got) != len(want) {
		t.Fatalf("%s: %d bytes, want %d; byte %d differs", what, len(got), len(want), i)
	}
}

// store writes the files of the chain to a folder, where their names refer to each other, and returns it.
func (c *chain) store() string {
	c.t.Helper()
	dir := c.t.TempDir()
	for name, f := range c.files {
		writeFile(c.t, filepath.Join(dir, name), contentOf(c.t, f))
	}
	return dir
}

// expectQEMU holds the chain against QEMU: its images are clean, and the last one reads as the model says, from the same places.
func (c *chain) expectQEMU() {
	c.t.Helper()
	require.Tool(c.t, "qemu-img")
	dir := c.store()
	for i, name := range c.names {
		if formatOf(c.kinds[i]) == "qcow2" {
			c.expectClean(name)
		}
	}
	want := append(bytes.Clone(c.want), make([]byte, -len(c.want)&511)...)
	top := filepath.Join(dir, c.top())
	if slices.Contains(c.kinds, "luks") {
		run(c.t, "qemu-img", "convert", "--object", "secret,id=key,data="+passphrase, "--image-opts", "-O", "raw", c.imageOptions(dir), top+".out")
		expect(c.t, "QEMU reads", readFile(c.t, top+".out"), want)
		return
	}
	for i, name := range c.names {
		if formatOf(c.kinds[i]) == "qcow2" {
			run(c.t, "qemu-img", "check", "-f", "qcow2", filepath.Join(dir, name))
		}
	}
	run(c.t, "qemu-img", "convert", "-f", formatOf(c.kinds[len(c.kinds)-1]), "-O", "raw", top, top+".out")
	expect(c.t, "QEMU reads", readFile(c.t, top+".out"), want)
	c.expectMap(top)
}

// imageOptions tells QEMU every file of the chain in the folder, and which key opens it.
func (c *chain) imageOptions(dir string) string {
	var options []string
	for i, name := range slices.Backward(c.names) {
		node := strings.Repeat("backing.", len(c.names)-1-i)
		options = append(options, node+"driver="+formatOf(c.kinds[i]), node+"file.driver=file", node+"file.filename="+filepath.Join(dir, name))
		if c.kinds[i] == "luks" {
			options = append(options, node+"encrypt.key-secret=key")
		}
	}
	return strings.Join(options, ",")
}

// expectClean holds one image of the chain, at rest, against the checker.
func (c *chain) expectClean(name string) {
	c.t.Helper()
	report, err := check.Check(c.t.Context(), c.files[name], check.Options{})
	if err != nil {
		c.t.Fatal(err)
	}
	if !report.Clean() {
		c.t.Fatalf("%s is not clean: %v", name, report.Findings)
	}
}

// mapped is an element of qemu-img map's output.
type mapped struct {
	Start, Length       int64
	Depth               int
	Present, Zero, Data bool
	Offset              *int64
}

// expectMap holds the extents of the last image against what QEMU says of the file at path, byte by byte.
func (c *chain) expectMap(path string) {
	c.t.Helper()
	out, err := exec.CommandContext(c.t.Context(), "qemu-img", "map", "-f", "qcow2", "--output=json", path).Output()
	if err != nil {
		c.t.Fatal(err)
	}
	var list []mapped
	if err := json.Unmarshal(out, &list); err != nil {
		c.t.Fatal(err)
	}
	img := c.open(qcow.Options{ReadOnly: true})
	at := 0
	for e, err := range img.Extents(0, img.Size()) {
		if err != nil {
			c.t.Fatal(err)
		}
		for off := e.Offset; off < e.Offset+e.Length; {
			for list[at].Start+list[at].Length <= off {
				at++
			}
			q := list[at]
			n := min(e.Offset+e.Length, q.Start+q.Length) - off
			raw := e.Depth < len(c.kinds) && c.kinds[len(c.kinds)-1-e.Depth] == "raw"
			if q.Length < sector {
				// The rest of the last sector of a raw file, which QEMU has end with a sector.
			} else if e.Depth != q.Depth || !raw && (q.Present != (e.Kind != qcow.ExtentUnallocated) || q.Data != (e.Kind == qcow.ExtentData || e.Kind == qcow.ExtentCompressed)) {
				c.t.Fatalf("at %d: QEMU says %+v, the extent is %+v", off, q, e)
			}
			if !raw && e.Kind == qcow.ExtentData && q.Offset != nil && *q.Offset+off-q.Start != int64(e.Host)+off-e.Offset {
				c.t.Fatalf("at %d: QEMU says %+v at %#x, the extent is %+v", off, q, *q.Offset, e)
			}
			off += n
		}
	}
	if err := img.Close(); err != nil {
		c.t.Fatal(err)
	}
}

// entriesOf returns the L2 entries of the image at rest in f that are not 0, by guest cluster.
func entriesOf(t testing.TB, f storage.File) map[uint64]format.MappingEntry {
	t.Helper()
	b := contentOf(t, f)
	h, err := format.DecodeHeader(b)
	if err != nil {
		t.Fatal(err)
	}
	entries := map[uint64]format.MappingEntry{}
	for i := range uint64(h.L1Entries) {
		table := format.L1Entry(format.Entry(b[h.L1Offset:], i)).Offset()
		for k := uint64(0); table != 0 && k < h.L2Entries(); k++ {
			if e := h.MappingEntry(b[table:], k); e != (format.MappingEntry{}) {
				entries[i<<h.L2Bits()+k] = e
			}
		}
	}
	return entries
}
