package pool

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow/check"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

const mebibyte = 1 << 20

// openPool opens dir for the length of the test. At its end every image that the pool can use is clean.
func openPool(t *testing.T, dir string) *Pool {
	t.Helper()
	p, err := Open(t.Context(), dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
		checkImages(t, p)
	})
	return p
}

// newPool makes a pool in a directory of its own.
func newPool(t *testing.T) *Pool {
	t.Helper()
	return openPool(t, t.TempDir())
}

// checkImages checks the images of all volumes that are still there, but those that were found damaged.
func checkImages(t *testing.T, p *Pool) {
	t.Helper()
	for id, v := range p.volumes {
		path := filepath.Join(p.dir.path, volumesDir, id, headImage)
		if _, err := os.Lstat(path); err == nil && v.fault == nil {
			checkImage(t, path)
		}
	}
}

func checkImage(t *testing.T, path string) {
	t.Helper()
	f, err := storage.Open(path, storage.ReadOnly)
	if err != nil {
		t.Error(err)
		return
	}
	report, err := check.Check(context.Background(), f, check.Options{})
	if err := errors.Join(err, f.Close()); err != nil {
		t.Errorf("check %s: %v", path, err)
	} else if !report.Clean() {
		t.Errorf("check %s: %+v", path, report.Findings)
	}
}

func mustCreate(t *testing.T, p *Pool, name string, size int64) Volume {
	t.Helper()
	v, err := p.Create(t.Context(), Spec{Name: name, Size: SizeRange{Required: size}})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func mustAcquire(t *testing.T, p *Pool, id string) *Handle {
	t.Helper()
	h, err := p.Acquire(t.Context(), id, false)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// fill writes n bytes of value b at the start of a volume and closes it again.
func fill(t *testing.T, p *Pool, id string, b byte, n int) {
	t.Helper()
	h := mustAcquire(t, p, id)
	if _, err := h.Image().WriteAt(bytes.Repeat([]byte{b}, n), 0); err != nil {
		t.Fatal(err)
	}
	if err := h.Release(); err != nil {
		t.Fatal(err)
	}
}

// expect fails the test unless the volume begins with n bytes of value b.
func expect(t *testing.T, p *Pool, id string, b byte, n int) {
	t.Helper()
	h := mustAcquire(t, p, id)
	got := make([]byte, n)
	if _, err := h.Image().ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, bytes.Repeat([]byte{b}, n)) {
		t.Errorf("volume %s does not hold what was written to it", id)
	}
	if err := h.Release(); err != nil {
		t.Fatal(err)
	}
}

func list(t *testing.T, p *Pool) []string {
	t.Helper()
	volumes, more, err := p.List(t.Context(), "", 0)
	if err != nil || more {
		t.Fatal(err, more)
	}
	ids := []string{}
	for _, v := range volumes {
		ids = append(ids, v.ID)
	}
	return ids
}

func wantClass(t *testing.T, err, class error) {
	t.Helper()
	if !errors.Is(err, class) {
		t.Errorf("error is %v, want class %v", err, class)
	}
}

func TestPoolIsWhatTheDirectoryHolds(t *testing.T) {
	dir := t.TempDir()
	p := openPool(t, dir)
	v := mustCreate(t, p, "data", 5*mebibyte)
	fill(t, p, v.ID, 7, 100000)
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	again := openPool(t, dir)
	if again.ID() != p.ID() || !ValidID(p.ID()) {
		t.Errorf("pool id was %q, is %q", p.ID(), again.ID())
	}
	got, err := again.Get(t.Context(), v.ID)
	if err != nil {
		t.Fatal(err)
	}
	if got != v {
		t.Errorf("volume was %+v, is %+v", v, got)
	}
	expect(t, again, v.ID, 7, 100000)
}

func TestOneProcessPerDirectory(t *testing.T) {
	dir := t.TempDir()
	p := openPool(t, dir)
	_, err := Open(t.Context(), dir, Options{})
	wantClass(t, err, ErrBusy)
	if err == nil || !strings.Contains(err.Error(), "another process serves the storage directory "+dir) {
		t.Errorf("unclear: %v", err)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	openPool(t, dir)
}

func TestOpenRefuses(t *testing.T) {
	write := func(name, content string) func(t *testing.T, dir string) {
		return func(t *testing.T, dir string) {
			if err := os.MkdirAll(filepath.Join(dir, filepath.Dir(name)), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	for name, c := range map[string]struct {
		prepare func(t *testing.T, dir string)
		class   error
		says    string
	}{
		"something else's directory": {write("etc/passwd", "x"), ErrInvalid, "etc"},
		"volumes without a pool":     {write("volumes/a-1/volume.json", "{}"), ErrCorrupt, poolFile},
		"newer pool":                 {write(poolFile, `{"version": 2, "flavour": "new"}`), ErrUnsupported, "version 2"},
		"pool without an id":         {write(poolFile, `{"version": 1}`), ErrCorrupt, poolFile},
		"pool with a wild id":        {write(poolFile, `{"version": 1, "id": "../x"}`), ErrCorrupt, "../x"},
		"unknown field":              {write(poolFile, `{"version": 1, "id": "p", "x": 1}`), ErrCorrupt, `"x"`},
		"torn pool.json":             {write(poolFile, `{"version": 1, "id"`), ErrCorrupt, poolFile},
		"pool.json with a tail":      {write(poolFile, `{"version": 1, "id": "p"}{}`), ErrCorrupt, poolFile},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			c.prepare(t, dir)
			before := tree(t, dir)
			p, err := Open(t.Context(), dir, Options{})
			if err == nil {
				t.Fatal(errors.Join(errors.New("opened"), p.Close()))
			}
			wantClass(t, err, c.class)
			if !strings.Contains(err.Error(), c.says) {
				t.Errorf("%q does not say %q", err, c.says)
			}
			after := slices.DeleteFunc(tree(t, dir), func(s string) bool { return s == lockFile })
			if !slices.Equal(before, after) {
				t.Errorf("directory was %v, is %v", before, after)
			}
		})
	}
	t.Run("a file", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(t.Context(), path, Options{}); err == nil {
			t.Error("opened")
		}
	})
	t.Run("nothing", func(t *testing.T) {
		_, err := Open(t.Context(), filepath.Join(t.TempDir(), "absent"), Options{})
		wantClass(t, err, fs.ErrNotExist)
	})
}

func TestOpenAcceptsAFreshFilesystem(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"lost+found", ".snapshot"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	openPool(t, dir)
}

// tree returns the names of everything below dir.
func tree(t *testing.T, dir string) []string {
	t.Helper()
	var names []string
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if path != dir {
			rel, relErr := filepath.Rel(dir, path)
			if relErr != nil {
				return relErr
			}
			names = append(names, rel)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return names
}

func TestListInPages(t *testing.T) {
	p := newPool(t)
	var want []string
	for _, name := range []string{"c", "a", "b", "e", "d"} {
		want = append(want, mustCreate(t, p, name, mebibyte).ID)
	}
	slices.Sort(want)
	var got []string
	for after, more := "", true; more; {
		var page []Volume
		var err error
		if page, more, err = p.List(t.Context(), after, 2); err != nil {
			t.Fatal(err)
		}
		if len(page) > 2 {
			t.Fatalf("page of %d", len(page))
		}
		for _, v := range page {
			got = append(got, v.ID)
		}
		after = got[len(got)-1]
		if err := p.Delete(t.Context(), after); err != nil { // a token outlives its volume
			t.Fatal(err)
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("listed %v, want %v", got, want)
	}
}

func TestProbe(t *testing.T) {
	dir := t.TempDir()
	p := openPool(t, dir)
	if err := p.Probe(t.Context()); err != nil {
		t.Error(err)
	}
	path := filepath.Join(dir, poolFile)
	original, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(`{"version": 1, "id": "other"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	wantClass(t, p.Probe(t.Context()), ErrInvalid)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	wantClass(t, p.Probe(t.Context()), fs.ErrNotExist)
	if err := os.WriteFile(path, original, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := p.Probe(t.Context()); err != nil {
		t.Error(err)
	}
	if err := errors.Join(os.Rename(dir, dir+"-moved"), os.Mkdir(dir, 0o700)); err != nil { // as a mount over it looks
		t.Fatal(err)
	}
	wantClass(t, p.Probe(t.Context()), ErrInvalid)
}

func TestRestoredWithoutEmptyDirectories(t *testing.T) {
	dir := t.TempDir()
	p := openPool(t, dir)
	v := mustCreate(t, p, "v", mebibyte)
	if err := errors.Join(p.Close(), os.Remove(filepath.Join(dir, tmpDir))); err != nil {
		t.Fatal(err)
	}
	p = openPool(t, dir)
	mustCreate(t, p, "w", mebibyte)
	expect(t, p, v.ID, 0, 100)
	if err := errors.Join(p.Close(), os.Rename(filepath.Join(dir, volumesDir), filepath.Join(dir, "elsewhere"))); err != nil {
		t.Fatal(err)
	}
	_, err := Open(t.Context(), dir, Options{}) // all volumes gone is another matter
	wantClass(t, err, fs.ErrNotExist)
}

func TestCloseClosesImages(t *testing.T) {
	dir := t.TempDir()
	p := openPool(t, dir)
	v := mustCreate(t, p, "v", 8*mebibyte)
	h := mustAcquire(t, p, v.ID)
	if _, err := h.Image().WriteAt([]byte{5}, 0); err != nil {
		t.Fatal(err)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if err := p.Close(); err != nil {
		t.Errorf("second close: %v", err)
	}
	if _, err := h.Image().WriteAt([]byte{6}, 0); err == nil {
		t.Error("image takes writes after the pool was closed")
	}
	if err := h.Release(); err != nil {
		t.Errorf("release after close: %v", err)
	}
	_, err := p.Create(t.Context(), Spec{Name: "late"})
	wantClass(t, err, ErrClosed)
	_, err = p.Acquire(t.Context(), v.ID, false)
	wantClass(t, err, ErrClosed)
	wantClass(t, p.Delete(t.Context(), v.ID), ErrClosed)
	wantClass(t, p.Probe(t.Context()), ErrClosed)
	expect(t, openPool(t, dir), v.ID, 5, 1)
}

func TestContextEnds(t *testing.T) {
	p := newPool(t)
	v := mustCreate(t, p, "v", mebibyte)
	ended, end := context.WithCancel(t.Context())
	end()
	_, err := p.Create(ended, Spec{Name: "x"})
	wantClass(t, err, context.Canceled)
	_, err = p.Get(ended, v.ID)
	wantClass(t, err, context.Canceled)
	wantClass(t, p.Delete(ended, v.ID), context.Canceled)

	// A call that waits for its turn gives up with its context.
	p.volumes[v.ID].turn <- struct{}{}
	waiting, stop := context.WithCancel(t.Context())
	result := make(chan error)
	go func() {
		_, err := p.Expand(waiting, v.ID, SizeRange{Required: 2 * mebibyte})
		result <- err
	}()
	stop()
	wantClass(t, <-result, context.Canceled)
	<-p.volumes[v.ID].turn
}
