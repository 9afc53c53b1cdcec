package qcow_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/check"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// A shelf is an image file that the engine and QEMU's tools change by turns, with what must be in it.
type shelf struct {
	t       *testing.T
	rng     *rand.Rand
	path    string
	cluster int64
	want    []byte
	kept    []keptDisk
	serial  int
}

// keptDisk is what a snapshot must hold.
type keptDisk struct {
	name    string
	content []byte
}

// run runs a tool and returns what it prints.
func (s *shelf) run(tool string, args ...string) []byte {
	s.t.Helper()
	cmd := exec.CommandContext(s.t.Context(), tool, args...)
	cmd.Env = append(os.Environ(), "TZ=UTC", "LC_ALL=C")
	out, err := cmd.CombinedOutput()
	if err != nil || tool == "qemu-io" && bytes.Contains(out, []byte("fail")) {
		s.t.Fatalf("%s %s: %v\n%s", tool, strings.Join(args, " "), err, out)
	}
	return out
}

func (s *shelf) qemuIO(command string, args ...any) {
	s.t.Helper()
	s.run("qemu-io", "-f", "qcow2", "-c", fmt.Sprintf(command, args...), s.path)
}

// load returns the content of the file. The engine works on a copy in memory: a lock on the file itself could live on for a moment in
// a child process that another test starts.
func (s *shelf) load() []byte {
	s.t.Helper()
	b, err := os.ReadFile(s.path)
	if err != nil {
		s.t.Fatal(err)
	}
	return b
}

func (s *shelf) store(b []byte) {
	s.t.Helper()
	if err := os.WriteFile(s.path, b, 0o600); err != nil {
		s.t.Fatal(err)
	}
}

// engine opens the image, lets do change it, and closes it.
func (s *shelf) engine(do func(img *qcow.Image) error) {
	s.t.Helper()
	f := storage.NewMemoryFrom(s.load())
	img := open(s.t, f, qcow.Options{ReserveBytes: 8 * s.cluster})
	if err := do(img); err != nil {
		s.t.Fatal(err)
	}
	if err := img.Close(); err != nil {
		s.t.Fatalf("close: %v", err)
	}
	s.store(f.Bytes())
}

// verify holds the image against the model: it is without findings, and the engine reads every disk, and QEMU the active one and one
// of the others.
func (s *shelf) verify() {
	s.t.Helper()
	b := s.load()
	report, err := check.Check(s.t.Context(), storage.NewMemoryFrom(b), check.Options{})
	if err != nil || !report.Clean() {
		s.t.Fatalf("check: %v, %v", err, report)
	}
	s.run("qemu-img", "check", "-f", "qcow2", s.path)
	s.expect(b, "", s.want)
	for _, k := range s.kept {
		s.expect(b, k.name, k.content)
	}
	s.expectFromQEMU("", s.want)
	if n := len(s.kept); n > 0 {
		k := s.kept[s.rng.IntN(n)]
		s.expectFromQEMU(k.name, k.content)
	}
}

// expect reads the disk, or the one in a snapshot.
func (s *shelf) expect(image []byte, snapshot string, want []byte) {
	s.t.Helper()
	img := open(s.t, storage.NewMemoryFrom(image), qcow.Options{ReadOnly: true, Snapshot: snapshot})
	if img.Size() != int64(len(want)) {
		s.t.Fatalf("snapshot %q: the disk has %d bytes instead of %d", snapshot, img.Size(), len(want))
	}
	expectAt(s.t, img, want, 0)
	if err := img.Close(); err != nil {
		s.t.Fatal(err)
	}
}

// expectFromQEMU lets QEMU read. It reads the disk in a snapshot as if it were as large as the active one, which it can't where it is
// smaller.
func (s *shelf) expectFromQEMU(snapshot string, want []byte) {
	s.t.Helper()
	if snapshot != "" && len(want) < len(s.want) {
		return
	}
	raw := s.path + ".raw"
	args := []string{"convert", "-f", "qcow2", "-O", "raw", s.path, raw}
	if snapshot != "" {
		args = append([]string{"convert", "-l", "snapshot.name=" + snapshot}, args[1:]...)
	}
	s.run("qemu-img", args...)
	got, err := os.ReadFile(raw)
	if err != nil {
		s.t.Fatal(err)
	}
	if i := firstDifference(got, want[:min(len(want), len(s.want))]); i >= 0 {
		s.t.Fatalf("snapshot %q: QEMU reads byte %d of %d otherwise", snapshot, i, len(got))
	}
}

// step lets the engine or QEMU do something random.
func (s *shelf) step(qemu bool) string {
	s.t.Helper()
	switch n := s.rng.IntN(12); {
	case n < 4:
		return s.write(qemu)
	case n < 6:
		return s.discard(qemu)
	case n < 9 && len(s.kept) < 4:
		return s.create(qemu)
	case n < 11 && len(s.kept) > 0:
		return s.apply(qemu)
	case len(s.kept) > 0:
		return s.remove(qemu)
	}
	return s.write(qemu)
}

// someRange returns a random range of whole sectors.
func (s *shelf) someRange() (off, n int64) {
	size := int64(len(s.want))
	n = min((s.rng.Int64N(5*s.cluster)+sector)/sector*sector, size)
	return s.rng.Int64N(size-n+1) / sector * sector, n
}

func (s *shelf) write(qemu bool) string {
	s.t.Helper()
	off, n := s.someRange()
	s.serial++
	p := repeated(byte(s.serial%255+1), n)
	if qemu {
		s.qemuIO("write -P %d %d %d", p[0], off, n)
	} else {
		s.engine(func(img *qcow.Image) error { _, err := img.WriteAt(p, off); return err })
	}
	copy(s.want[off:], p)
	return fmt.Sprintf("write %d %d+%d", p[0], off, n)
}

// discard makes whole clusters read as zeroes.
func (s *shelf) discard(qemu bool) string {
	s.t.Helper()
	off, n := s.someRange()
	off, n = off/s.cluster*s.cluster, (n+s.cluster-1)/s.cluster*s.cluster
	n = min(n, int64(len(s.want))-off)
	if qemu {
		s.qemuIO("write -z -u %d %d", off, n)
	} else {
		s.engine(func(img *qcow.Image) error { return img.Discard(off, n) })
	}
	clear(s.want[off:][:n])
	return fmt.Sprintf("discard %d+%d", off, n)
}

func (s *shelf) create(qemu bool) string {
	s.t.Helper()
	s.serial++
	name := fmt.Sprintf("disk %d", s.serial)
	refused := false
	if qemu {
		s.run("qemu-img", "snapshot", "-c", name, s.path)
	} else {
		s.engine(func(img *qcow.Image) error {
			_, err := img.CreateSnapshot(s.t.Context(), name, time.Unix(1700000000, 0))
			if refused = errors.Is(err, qcow.ErrInvalid) && img.Info().RefcountBits <= 2; refused {
				return nil // as many references as can be counted
			}
			return err
		})
	}
	if refused {
		return "create " + name + ": refused"
	}
	s.kept = append(s.kept, keptDisk{name, bytes.Clone(s.want)})
	return "create " + name
}

func (s *shelf) apply(qemu bool) string {
	s.t.Helper()
	k := s.kept[s.rng.IntN(len(s.kept))]
	if qemu {
		s.run("qemu-img", "snapshot", "-a", k.name, s.path)
	} else {
		s.engine(func(img *qcow.Image) error { return img.ApplySnapshot(s.t.Context(), k.name) })
	}
	s.want = bytes.Clone(k.content)
	return "apply " + k.name
}

func (s *shelf) remove(qemu bool) string {
	s.t.Helper()
	i := s.rng.IntN(len(s.kept))
	name := s.kept[i].name
	if qemu {
		s.run("qemu-img", "snapshot", "-d", name, s.path)
	} else {
		s.engine(func(img *qcow.Image) error { return img.DeleteSnapshot(s.t.Context(), name) })
	}
	s.kept = append(s.kept[:i:i], s.kept[i+1:]...)
	return "delete " + name
}

// newShelf lets QEMU make an image with those options.
func newShelf(t *testing.T, seed uint64, size, cluster int64, options string, compressed bool) *shelf {
	s := &shelf{t: t, rng: rand.New(rand.NewPCG(seed, 3)), path: filepath.Join(t.TempDir(), "image.qcow2"), cluster: cluster, want: make([]byte, size)}
	if !compressed {
		s.run("qemu-img", "create", "-q", "-f", "qcow2", "-o", fmt.Sprintf("cluster_size=%d,%s", cluster, options), s.path, fmt.Sprint(size))
		return s
	}
	for off := int64(0); off < size*2/3; off += 512 { // text that compresses to something
		copy(s.want[off:][:512], bytes.Repeat(fmt.Appendf(nil, "%d ", s.rng.IntN(1e6)), 512))
	}
	s.convert(s.want, options, true)
	return s
}

// convert lets QEMU make an image with that content.
func (s *shelf) convert(content []byte, options string, compressed bool) {
	s.t.Helper()
	raw := s.path + ".raw"
	if err := os.WriteFile(raw, content, 0o600); err != nil {
		s.t.Fatal(err)
	}
	args := []string{"convert", "-f", "raw", "-O", "qcow2", "-o", fmt.Sprintf("cluster_size=%d,%s", s.cluster, options), raw, s.path}
	if compressed {
		args = append([]string{"convert", "-c"}, args[1:]...)
	}
	s.run("qemu-img", args...)
}
