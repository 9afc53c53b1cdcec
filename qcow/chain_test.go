package qcow_test

import (
	"bytes"
	"errors"
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
	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// chainShapes are chains of every kind of file; in each the last is written to.
var chainShapes = map[string][]layer{
	"raw":                    {{kind: "raw", size: 64 << 10}, {size: 64 << 10}},
	"short-raw":              {{kind: "raw", size: 40001}, {size: 64 << 10}},
	"long-raw":               {{kind: "raw", size: 100000}, {size: 64<<10 + 512, cluster: 4096}},
	"qcow2":                  {{size: 64 << 10}, {size: 64 << 10}},
	"small-on-large":         {{size: 256 << 10, cluster: 64 << 10}, {size: 256 << 10, cluster: 512}},
	"large-on-small":         {{size: 256 << 10, cluster: 512}, {size: 256 << 10, cluster: 64 << 10}},
	"short-in-between":       {{size: 200 << 10, cluster: 4096}, {size: 70<<10 + 512, cluster: 2048}, {size: 190 << 10, cluster: 4096}},
	"growing":                {{size: 20<<10 + 512}, {size: 50 << 10, cluster: 4096}, {size: 99 << 10, cluster: 1024}},
	"shrinking":              {{size: 99 << 10, cluster: 4096}, {size: 50 << 10, cluster: 2048}, {size: 33<<10 + 512}},
	"old":                    {{kind: "v2", size: 64 << 10}, {size: 64 << 10}},
	"old-on-top":             {{size: 64<<10 + 512, cluster: 4096}, {kind: "v2", size: 96 << 10}},
	"subclusters":            {{size: 192 << 10, cluster: 1024}, {kind: "extended", size: 192 << 10}},
	"subclusters-below":      {{kind: "extended", size: 192 << 10}, {size: 160<<10 + 512, cluster: 4096}},
	"subclusters-throughout": {{kind: "raw", size: 150001}, {kind: "extended", size: 192 << 10}, {kind: "extended", size: 256<<10 + 1536, cluster: 32 << 10}},
	"compressed":             {{kind: "compressed", size: 128 << 10, cluster: 8192}, {size: 128 << 10, cluster: 2048}},
	"encrypted-below":        {{kind: "luks", size: 72 << 10, cluster: 4096}, {size: 96 << 10, cluster: 4096}},
	"encrypted-on-top":       {{size: 64 << 10, cluster: 2048}, {kind: "luks", size: 72 << 10, cluster: 4096}},
	"deep":                   {{kind: "raw", size: 30 << 10}, {size: 40 << 10}, {kind: "v2", size: 64 << 10}, {size: 50 << 10, cluster: 1024}, {size: 64 << 10}, {size: 64 << 10, cluster: 4096}},
}

// TestChainModel does random requests on the last image of chains of every shape, and holds it against a model and against QEMU.
func TestChainModel(t *testing.T) {
	steps := 60
	if long() {
		steps = 1500
	}
	for name, layers := range chainShapes {
		for _, seed := range testSeeds(t, 1, 20) {
			t.Run(fmt.Sprintf("%s/seed=%d", name, seed), func(t *testing.T) {
				c := newChain(t, rand.New(rand.NewPCG(seed, 0)), layers...)
				c.expectQEMU()
				below := c.below()
				img := c.open(qcow.Options{CacheBytes: 1, ReserveBytes: 256 << 10})
				for i := range steps {
					c.step(img)
					if i%20 == 19 {
						expect(t, "disk", diskOf(t, img), c.want)
					}
				}
				if err := img.Close(); err != nil {
					t.Fatal(err)
				}
				c.expectQEMU()
				for name, want := range below {
					expect(t, name, contentOf(t, c.files[name]), want)
				}
			})
		}
	}
}

// What QEMU's requests leave over backing files is read here as it is there, and written on.
func TestChainWrittenByQEMU(t *testing.T) {
	require.Tool(t, "qemu-img", "qemu-io")
	for name, layers := range chainShapes {
		if slices.ContainsFunc(layers, func(l layer) bool { return l.kind == "luks" }) {
			continue // the command line has no place for the keys of a chain
		}
		t.Run(name, func(t *testing.T) {
			c := newChain(t, rand.New(rand.NewPCG(12, 0)), layers...)
			dir := c.store()
			args := []string{"-f", "qcow2", "-d", "unmap"}
			size := int64(len(c.want))
			cluster := int64(layers[len(layers)-1].cluster)
			for range 25 {
				n := (c.rng.Int64N(size/10) + sector) / sector * sector
				off := c.rng.Int64N(size-n+1) / sector * sector
				switch c.rng.IntN(5) {
				case 0:
					args = append(args, "-c", fmt.Sprintf("write -z %d %d", off, n))
					clear(c.want[off:][:n])
				case 1:
					args = append(args, "-c", fmt.Sprintf("write -z -u %d %d", off, n))
					clear(c.want[off:][:n])
				case 2:
					off, n = off/cluster*cluster, (n+cluster)/cluster*cluster
					if off+n <= size && c.kinds[len(c.kinds)-1] != "v2" {
						args = append(args, "-c", fmt.Sprintf("discard %d %d", off, n))
						clear(c.want[off:][:n])
					}
				default:
					v := byte(1 + c.rng.IntN(255))
					args = append(args, "-c", fmt.Sprintf("write -P %d %d %d", v, off, n))
					copy(c.want[off:], repeated(v, n))
				}
			}
			run(t, "qemu-io", append(args, filepath.Join(dir, c.top()))...)
			c.files[c.top()] = storage.NewMemoryFrom(readFile(t, filepath.Join(dir, c.top())))
			c.expectQEMU()
			img := c.open(qcow.Options{CacheBytes: 1})
			for range 40 {
				c.step(img)
			}
			expect(t, "disk", diskOf(t, img), c.want)
			if err := img.Close(); err != nil {
				t.Fatal(err)
			}
			c.expectQEMU()
		})
	}
}

// below returns the bytes of the files that nobody may write to.
func (c *chain) below() map[string][]byte {
	below := map[string][]byte{}
	for _, name := range c.names[:len(c.names)-1] {
		below[name] = contentOf(c.t, c.files[name])
	}
	return below
}

// step does a random request.
func (c *chain) step(img *qcow.Image) {
	c.t.Helper()
	size, unit := img.Size(), int64(img.Alignment())
	n := (c.rng.Int64N(size/6) + unit) / unit * unit
	off := c.rng.Int64N(size-n+1) / unit * unit
	many := min((off+4*n)/unit*unit, size) - off
	var err error
	switch c.rng.IntN(12) {
	case 0, 1:
		if c.rng.IntN(2) == 0 {
			n = many
		}
		err = img.WriteZeroes(off, n, c.rng.IntN(2) == 0)
		clear(c.want[off:][:n])
	case 2:
		n = many
		first, end := wholeClusters(img, off, n)
		if (c.kinds[len(c.kinds)-1] != "v2" || img.Chain() == nil) && first < end {
			clear(c.want[first:end])
		}
		err = img.Discard(off, n)
	case 3:
		err = img.Flush()
	case 4:
		c.resize(img)
	default:
		p := noise(c.rng, n)
		copy(c.want[off:], p)
		_, err = img.WriteAt(p, off)
	}
	if err != nil {
		c.t.Fatal(err)
	}
}

// wholeClusters returns which bytes a discard makes zero.
func wholeClusters(img *qcow.Image, off, n int64) (first, end int64) {
	cluster := int64(img.Info().ClusterSize)
	first, end = (off+cluster-1)/cluster*cluster, off+n
	if end != img.Size() {
		end = end / cluster * cluster
	}
	return first, end
}

// resize makes the disk a little smaller or larger.
func (c *chain) resize(img *qcow.Image) {
	c.t.Helper()
	size := max(int64(len(c.want))+(c.rng.Int64N(64)-32)*sector*4, 16<<10)
	if err := img.Resize(c.t.Context(), size); err != nil {
		c.t.Fatal(err)
	}
	want := make([]byte, size)
	copy(want, c.want)
	c.want = want
}

// A chain is told by name, format and size, and only to who opened it.
func TestChainOf(t *testing.T) {
	c := newChain(t, rand.New(rand.NewPCG(1, 1)), layer{kind: "raw", size: 1000}, layer{size: 4096}, layer{size: 8192})
	img := c.open(qcow.Options{})
	want := []qcow.ChainFile{{Name: "1.qcow2", Format: "qcow2", Size: 4096}, {Name: "0.raw", Format: "raw", Size: 1000}}
	if got := img.Chain(); !slices.Equal(got, want) {
		t.Errorf("chain %+v, want %+v", got, want)
	}
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	alone := open(t, c.files[c.top()], qcow.Options{ReadOnly: true, WithoutBacking: true})
	if got := alone.Chain(); got != nil {
		t.Errorf("chain %+v of an image opened without one", got)
	}
	for off, n := int64(0), alone.Size(); off < n; off += sector {
		p := make([]byte, sector)
		if _, err := alone.ReadAt(p, off); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(p, make([]byte, sector)) && !bytes.Equal(p, c.want[off:][:sector]) {
			t.Fatalf("sector at %d is neither its own nor zero", off)
		}
	}
	if err := alone.Close(); err != nil {
		t.Fatal(err)
	}
	_, err := qcow.Open(c.files[c.top()], qcow.Options{WithoutBacking: true, Gate: c.files.gate})
	expectClass(t, "open for writing without the backing file", err, qcow.ErrInvalid)
}

// counted is a file that counts how often it is closed.
type counted struct {
	storage.File
	closed *int
}

func (c counted) Close() error { *c.closed++; return c.File.Close() }

// What can't be opened is refused by class, and nothing that was opened on the way stays open.
func TestChainRefused(t *testing.T) {
	base := create(t, qcow.CreateOptions{Size: 4096, ClusterSize: 512})
	garbage := storage.NewMemoryFrom(bytes.Repeat([]byte("garbage "), 1000))
	for what, x := range map[string]struct {
		gate  qcow.Gate
		class error
		text  string
	}{
		"no gate":      {nil, qcow.ErrUnsupported, "leave"},
		"absent":       {files{}.gate, os.ErrNotExist, `backing file "1"`},
		"no format":    {func(qcow.Reference) (qcow.Opened, error) { return qcow.Opened{File: base}, nil }, qcow.ErrUnsupported, "not guessed"},
		"other format": {func(qcow.Reference) (qcow.Opened, error) { return qcow.Opened{File: base, Format: "vmdk"}, nil }, qcow.ErrUnsupported, "vmdk"},
		"not an image": {func(qcow.Reference) (qcow.Opened, error) { return qcow.Opened{File: garbage, Format: "qcow2"}, nil }, qcow.ErrCorrupt, "magic"},
		"image, no gate": {func(r qcow.Reference) (qcow.Opened, error) {
			o, err := files{"1": overlay(t, qcow.CreateOptions{Size: 512}, "2", "raw")}.gate(r)
			o.Gate = nil
			return o, err
		}, qcow.ErrUnsupported, `"2"`},
		"no size": {func(qcow.Reference) (qcow.Opened, error) {
			return qcow.Opened{File: sizeless{base}, Format: "raw"}, nil
		}, errInjected, "injected"},
	} {
		t.Run(what, func(t *testing.T) {
			opened, closed := 0, 0
			gate := qcow.Gate(func(r qcow.Reference) (qcow.Opened, error) {
				if !r.ReadOnly || r.Role != qcow.BackingFile || r.Name != "1" || r.Format != "qcow2" {
					t.Errorf("the gate is asked for %+v", r)
				}
				o, err := x.gate(r)
				if err == nil {
					opened++
					o.File = counted{o.File, &closed}
				}
				return o, err
			})
			if x.gate == nil {
				gate = nil
			}
			_, err := qcow.Open(overlay(t, qcow.CreateOptions{Size: 4096, ClusterSize: 512}, "1", "qcow2"), qcow.Options{Gate: gate})
			expectClass(t, "open", err, x.class)
			if !strings.Contains(err.Error(), x.text) {
				t.Errorf("%v; want %q in it", err, x.text)
			}
			if opened != closed {
				t.Errorf("%d files were opened, %d closed", opened, closed)
			}
		})
	}
}

// sizeless is a file that can't tell its size.
type sizeless struct{ storage.File }

func (sizeless) Size() (int64, error) { return 0, errInjected }

// A chain closes every file, once, and opens again.
func TestChainClose(t *testing.T) {
	c := newChain(t, rand.New(rand.NewPCG(1, 1)), layer{kind: "raw", size: 1000}, layer{size: 4096}, layer{size: 4096})
	closed := map[string]*int{}
	gate := func(r qcow.Reference) (qcow.Opened, error) {
		o, err := c.files.gate(r)
		closed[r.Name] = new(int)
		o.File, o.Gate = counted{o.File, closed[r.Name]}, nil
		if r.Name == "1.qcow2" {
			o.Gate = func(r qcow.Reference) (qcow.Opened, error) {
				o, err := c.files.gate(r)
				closed[r.Name] = new(int)
				o.File = counted{o.File, closed[r.Name]}
				return o, err
			}
		}
		return o, err
	}
	for range 2 {
		img := open(t, c.files[c.top()], qcow.Options{Gate: gate})
		if err := img.Close(); err != nil {
			t.Fatal(err)
		}
		for _, name := range c.names[:2] {
			if *closed[name] != 1 {
				t.Errorf("%s was closed %d times", name, *closed[name])
			}
		}
	}
}

// The length of a chain is bounded, whatever a gate lets through.
func TestChainDepth(t *testing.T) {
	f := files{"0": storage.NewMemoryFrom(repeated(7, 4096))}
	for i := 1; i <= 64; i++ {
		form := "qcow2"
		if i == 1 {
			form = "raw"
		}
		f[fmt.Sprint(i)] = overlay(t, qcow.CreateOptions{Size: 4096, ClusterSize: 512}, fmt.Sprint(i-1), form)
	}
	img := open(t, f["63"], qcow.Options{Gate: f.gate}) // 64 files
	expectAt(t, img, repeated(7, 4096), 0)
	if n := len(img.Chain()); n != 63 {
		t.Errorf("%d backing files", n)
	}
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	_, err := qcow.Open(f["64"], qcow.Options{Gate: f.gate})
	expectClass(t, "65 files", err, qcow.ErrCorrupt)
	f["loop"] = overlay(t, qcow.CreateOptions{Size: 4096, ClusterSize: 512}, "loop", "qcow2")
	_, err = qcow.Open(f["loop"], qcow.Options{Gate: f.gate, ReadOnly: true})
	expectClass(t, "an image on itself", err, qcow.ErrCorrupt)
}

// A read that fails names the file of the chain, and says where.
func TestChainReadError(t *testing.T) {
	c := newChain(t, rand.New(rand.NewPCG(1, 1)), layer{kind: "raw", size: 8192}, layer{size: 8192})
	c.files["0.raw"] = &hooked{File: c.files["0.raw"], beforeRead: func([]byte, int64) error { return errInjected }}
	top := overlay(t, qcow.CreateOptions{Size: 8192, ClusterSize: 1024}, "0.raw", "raw")
	img := open(t, top, qcow.Options{Gate: c.files.gate})
	_, err := img.ReadAt(make([]byte, 100), 0)
	expectClass(t, "read", err, errInjected)
	if !strings.Contains(err.Error(), `backing file "0.raw"`) {
		t.Errorf("%v does not name the file", err)
	}
	_, err = img.WriteAt([]byte{1}, 100) // what is around it can't be copied
	expectClass(t, "write", err, errInjected)
	writeAt(t, img, repeated(2, 1024), 1024) // nothing to copy
	expectAt(t, img, repeated(2, 1024), 1024)
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	report, err := check.Check(t.Context(), top, check.Options{})
	if err != nil || !report.Clean() {
		t.Errorf("check: %v, %v", report, err)
	}
}

// Backing files are locked as readers do: others may read them too, and nobody may write to them.
func TestChainLocks(t *testing.T) {
	require.Tool(t, "qemu-img", "qemu-io")
	c := newChain(t, rand.New(rand.NewPCG(3, 3)), layer{kind: "raw", size: 64 << 10}, layer{size: 64 << 10}, layer{size: 64 << 10})
	dir := c.store()
	openIn := func(name string) (*qcow.Image, error) {
		f, err := storage.Open(filepath.Join(dir, name), storage.ReadWrite)
		if err != nil {
			return nil, err
		}
		img, err := qcow.Open(f, qcow.Options{Gate: qcow.Beside(filepath.Join(dir, name))})
		if err != nil {
			return nil, errors.Join(err, f.Close())
		}
		return img, nil
	}
	img, err := openIn("2.qcow2")
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(dir, "other"), contentOf(t, c.files["2.qcow2"]))
	other, err := openIn("other")
	if err != nil {
		t.Fatalf("a second image on the same backing file: %v", err)
	}
	for _, name := range []string{"0.raw", "1.qcow2"} {
		out, err := exec.CommandContext(t.Context(), "qemu-io", "-f", formatOf(strings.TrimPrefix(filepath.Ext(name), ".")), "-c", "write 0 512", filepath.Join(dir, name)).CombinedOutput()
		if err == nil || !strings.Contains(string(out), "lock") {
			t.Errorf("QEMU writes to %s: %v\n%s", name, err, out)
		}
		run(t, "qemu-img", "convert", "-O", "raw", "-f", formatOf(strings.TrimPrefix(filepath.Ext(name), ".")), filepath.Join(dir, name), filepath.Join(dir, "copy"))
	}
	if _, err := openIn("1.qcow2"); !errors.Is(err, qcow.ErrBusy) {
		t.Errorf("a backing file opened for writing: %v", err)
	}
	for _, x := range []*qcow.Image{img, other} {
		if err := x.Close(); err != nil {
			t.Fatal(err)
		}
	}
	base, err := openIn("1.qcow2")
	if err != nil {
		t.Fatalf("when all is closed: %v", err)
	}
	if err := base.Close(); err != nil {
		t.Fatal(err)
	}
}
