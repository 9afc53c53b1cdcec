package main

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/qcow-csi/qcow-csi/nbdexport"
	"github.com/qcow-csi/qcow-csi/nbdexport/nbdtest"
	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// isDirect says whether this process has the file open past the page cache.
func isDirect(t *testing.T, path string) (direct bool) {
	t.Helper()
	for _, fd := range names(t, "/proc/self/fd") {
		if target, err := os.Readlink("/proc/self/fd/" + fd); err != nil || target != path {
			continue
		}
		m := regexp.MustCompile(`flags:\s+(\d+)`).FindSubmatch(read(t, "/proc/self/fdinfo/"+fd))
		flags, err := strconv.ParseUint(string(m[1]), 8, 64)
		if err != nil {
			t.Fatal(err)
		}
		direct = direct || flags&unix.O_DIRECT != 0
	}
	return direct
}

func TestExportDirect(t *testing.T) {
	image := create(t)
	f, err := storage.OpenWith(image, storage.Options{Direct: true})
	require.Feature(t, err == nil, "needs O_DIRECT on the file system of "+filepath.Dir(image))
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args   []string
		direct bool
	}{
		{nil, false},
		{[]string{"--cache=none"}, true},
		{[]string{"-n"}, true},
		{[]string{"--cache=writeback"}, false},
		{[]string{"--cache=writethrough"}, false},
		{[]string{"--cache=directsync"}, true},
		{[]string{"--cache=unsafe"}, false},
	} {
		e, client := exportedTo(t, image, c.args...)
		if got := isDirect(t, image); got != c.direct {
			t.Errorf("%q: past the page cache: %t", c.args, got)
		}
		data := strings.Repeat(fmt.Sprintf("%16.16s", strings.Join(c.args, "")), 16<<10) // 256 KiB
		put(t, client, 1<<20, data)
		wantBytes(t, client, 1<<20, data)
		e.end(t, client)
		mustImage(t, "check", image)
	}
}

// TestCacheModes: which mode makes what durable, of the image and of its data file.
func TestCacheModes(t *testing.T) {
	for mode, want := range map[cacheMode]struct{ direct, through, unsafe bool }{
		"none": {true, false, false}, "writeback": {}, "writethrough": {false, true, false}, "directsync": {true, true, false}, "unsafe": {false, false, true},
	} {
		_, through := mode.backend(nbdtest.NewMemory(nbdexport.Info{})).(writeThrough)
		_, unsafe := mode.file(storage.NewMemory()).(unsynced)
		if mode.direct() != want.direct || through != want.through || unsafe != want.unsafe {
			t.Errorf("%s: direct %t, through %t, unsafe %t", mode, mode.direct(), through, unsafe)
		}
		for _, readOnly := range []bool{false, true} {
			o, err := mode.gate(func(qcow.Reference) (qcow.Opened, error) { return qcow.Opened{File: storage.NewMemory()}, nil })(qcow.Reference{ReadOnly: readOnly})
			if _, unsafe := o.File.(unsynced); err != nil || unsafe != (want.unsafe && !readOnly) {
				t.Errorf("%s: a file that the image names, read-only %t: unsafe %t, %v", mode, readOnly, unsafe, err)
			}
		}
	}
}

// recorded returns a backend, and the kinds of what it carries out.
func recorded(size int64) (m *nbdtest.Memory, kinds *[]nbdtest.Kind) {
	m, kinds = nbdtest.NewMemory(nbdexport.Info{Size: size}), new([]nbdtest.Kind)
	m.Before = func(o nbdtest.Operation) error {
		*kinds = append(*kinds, o.Kind)
		return nil
	}
	return m, kinds
}

func TestWriteThrough(t *testing.T) {
	m, kinds := recorded(1 << 20)
	w := writeThrough{m}
	if _, err := w.WriteAt([]byte("x"), 0); err != nil {
		t.Error(err)
	}
	if err := w.WriteZeroes(0, 1, nbdexport.Zeroing{}); err != nil {
		t.Error(err)
	}
	if want := []nbdtest.Kind{nbdtest.WriteSync, nbdtest.WriteZeroes, nbdtest.Flush}; !slices.Equal(*kinds, want) {
		t.Errorf("%q, want %q", *kinds, want)
	}
}

func TestZeroDetector(t *testing.T) {
	m, kinds := recorded(1 << 20)
	z := zeroDetector{m, true}
	for _, p := range [][]byte{{1, 0}, {0, 1}, {0, 0}} {
		if _, err := z.WriteAt(p, 0); err != nil {
			t.Error(err)
		}
		if _, err := z.WriteSync(p, 0); err != nil {
			t.Error(err)
		}
	}
	want := []nbdtest.Kind{
		nbdtest.Write, nbdtest.WriteSync, nbdtest.Write, nbdtest.WriteSync,
		nbdtest.WriteZeroes, nbdtest.WriteZeroes, nbdtest.Flush,
	}
	if !slices.Equal(*kinds, want) {
		t.Errorf("%q, want %q", *kinds, want)
	}
}

// TestExportBackends: all of them keep the promises of a backend.
func TestExportBackends(t *testing.T) {
	for _, options := range []string{"cache=writethrough", "cache=unsafe", "detect-zeroes=on", "detect-zeroes=unmap,cache=writethrough"} {
		t.Run(options, func(t *testing.T) {
			nbdtest.TestBackend(t, func(t *testing.T) nbdexport.Backend {
				t.Chdir(t.TempDir()) // whose name has commas
				const path = "disk.qcow2"
				mustImage(t, "create", "-q", path, strconv.Itoa(nbdtest.BackendSize))
				i, err := newExportedImage().with("file=" + path + "," + options)
				if err != nil {
					t.Fatal(err)
				}
				o, err := i.open(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() {
					if err := o.close(); err != nil {
						t.Error(err)
					}
				})
				return o.backend
			})
		})
	}
}

// TestUnsynced writes and flushes an image, of which nothing is made durable before it is closed.
func TestUnsynced(t *testing.T) {
	memory := storage.NewMemory()
	if err := qcow.Create(memory, qcow.CreateOptions{Size: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	recorder := storage.NewRecorder(memory)
	img, err := qcow.Open(unsynced{recorder}, qcow.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := img.WriteAt([]byte("x"), 0); err != nil {
		t.Error(err)
	}
	if _, err := img.WriteSync([]byte("y"), 0); err != nil {
		t.Error(err)
	}
	if err := img.Flush(); err != nil {
		t.Error(err)
	}
	durable := func() (n int) {
		for _, op := range recorder.Ops() {
			if op.Kind == storage.OpSync || op.Kind == storage.OpWriteSync {
				n++
			}
		}
		return n
	}
	if n := durable(); n != 0 {
		t.Errorf("%d operations made something durable", n)
	}
	if err := img.Close(); err != nil {
		t.Error(err)
	}
	if ops := recorder.Ops(); durable() != 1 || ops[len(ops)-1].Kind != storage.OpSync {
		t.Errorf("closing made the file durable %d times, and ended with %v", durable(), ops[len(ops)-1])
	}
}
