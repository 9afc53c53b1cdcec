package interop_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/seed"
)

// A bench is where the images of one direction are worked on: a folder with all of them, the inks and the backing files.
type bench struct {
	direction
	matrix *matrix
	dir    string
	seed   uint64

	// starting is held while a program is started, and shared while an image is closed. Between fork and exec a program has the files of
	// this process; without this an image would stay locked for a moment after it was closed.
	starting sync.RWMutex
	sessions chan *session // those of qemu-io that nobody uses

	mu    sync.Mutex
	bases map[string]*base
}

// newBench returns a bench that lasts as long as the test.
func newBench(t *testing.T, d direction) *bench {
	t.Helper()
	b := &bench{direction: d, matrix: d.matrix(), dir: scratch(t), bases: map[string]*base{}, sessions: make(chan *session, 64)}
	b.seed = seed.Of(t)
	if err := spill(b.dir); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		close(b.sessions)
		for s := range b.sessions {
			s.end()
		}
	})
	return b
}

// scratch returns a folder in memory, where there is room for that: what is measured here is not what a disk does. It is gone after the test.
func scratch(t *testing.T) string {
	t.Helper()
	const memory = "/dev/shm"
	var st unix.Statfs_t
	if err := unix.Statfs(memory, &st); err != nil || int64(st.Bavail)*st.Bsize < 1<<30 {
		return t.TempDir()
	}
	dir, err := os.MkdirTemp(memory, "qcow-csi-interop-") //nolint:usetesting // a file system of its own
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// newSubject returns the subject with a number, which has no image yet. When the test ends its files go, and when it has failed it says how
// to make them.
func (b *bench) newSubject(t *testing.T, number int, c combination) *subject {
	t.Helper()
	s := b.subject(fmt.Sprintf("%04d.qcow2", number), c, rand.New(rand.NewPCG(b.seed, uint64(number))))
	s.t = t
	if kind := c.value(byBacking); kind != "none" {
		var err error
		if s.backing, err = b.base(kind, c.size()); err != nil {
			t.Fatal(err)
		}
		copy(s.disk, s.backing.disk)
		s.bases = append(s.bases, s.backing)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("%s", s.report())
		}
		for _, name := range []string{s.name, s.dataFile(), s.name + ".raw", s.name + ".out"} {
			if err := os.Remove(s.path(name)); err != nil && !errors.Is(err, os.ErrNotExist) {
				t.Error(err)
			}
		}
		*s = subject{} // t, and this function with it, are kept until all images are done
	})
	return s
}

func (b *bench) subject(name string, c combination, rng *rand.Rand) *subject {
	return &subject{
		b: b, c: c, rng: rng, name: name, disk: make(disk, c.size()),
		version: c.number(byVersion), refcountBits: c.number(byRefcount), lazy: c.is(byLazy, "on"),
	}
}

func (b *bench) path(name string) string { return filepath.Join(b.dir, name) }

func (s *subject) path(name string) string { return s.b.path(name) }

// dataFile is the name of the external data file, if there is one.
func (s *subject) dataFile() string { return s.name + ".data" }

// longest is how long a program may take, which hangs otherwise.
const longest = 2 * time.Minute

// run runs one of QEMU's programs in the folder and returns its standard output. It is run again where QEMU could not measure how fast it
// derives keys, since the machine was too busy.
func (b *bench) run(name string, args ...string) (string, error) {
	var out, errs strings.Builder
	for range 1000 {
		out.Reset()
		errs.Reset()
		ctx, cancel := context.WithTimeout(context.Background(), longest)
		cmd := exec.CommandContext(ctx, name, args...)
		cmd.Dir, cmd.Stdout, cmd.Stderr = b.dir, &out, &errs
		err := b.start(cmd)
		if err == nil {
			err = cmd.Wait()
		}
		cancel()
		if err == nil {
			return out.String(), nil
		}
		if !strings.Contains(errs.String(), "Unable to get accurate CPU usage") {
			return out.String(), fmt.Errorf("%s: %w\n%s%s", line(name, args), err, out.String(), errs.String())
		}
	}
	return "", errors.New("qemu-img could not measure how fast it derives keys")
}

// start starts a program while no image is being closed.
func (b *bench) start(cmd *exec.Cmd) error {
	b.starting.Lock()
	defer b.starting.Unlock()
	return cmd.Start()
}

// line returns a command as a shell takes it.
func line(name string, args []string) string {
	words := []string{name}
	for _, a := range args {
		if a == "" || strings.ContainsAny(a, " []'\"") {
			a = "'" + a + "'"
		}
		words = append(words, a)
	}
	return strings.Join(words, " ")
}

// file is one of the engine's, which is not closed while a program is being started.
type file struct {
	storage.File
	b *bench
}

func (f file) Close() error {
	f.b.starting.RLock()
	defer f.b.starting.RUnlock()
	return f.File.Close()
}

// open opens a file of the folder.
func (b *bench) open(name string, mode storage.Mode) (storage.File, error) {
	f, err := storage.Open(b.path(name), mode)
	if err != nil {
		return nil, err
	}
	return file{f, b}, nil
}

// create makes a file in the folder.
func (b *bench) create(name string) (storage.File, error) {
	f, err := storage.Create(b.path(name))
	if err != nil {
		return nil, err
	}
	return file{f, b}, nil
}

// gate opens what an image of the folder names.
func (b *bench) gate(name string) qcow.Gate {
	beside := qcow.Beside(b.path(name))
	return func(r qcow.Reference) (qcow.Opened, error) {
		o, err := beside(r)
		if err == nil {
			o.File = file{o.File, b}
		}
		return o, err
	}
}
