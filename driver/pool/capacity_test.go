package pool

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/qcow-csi/qcow-csi/test/require"
)

// tmpfs mounts a filesystem of size bytes for the length of the test.
func tmpfs(t *testing.T, size int64) string {
	t.Helper()
	require.Root(t)
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%d", size)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// ballast takes all space but rest bytes, and returns what gives it back.
func ballast(t *testing.T, dir string, rest int64) (drop func()) {
	t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, ".ballast")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(unix.Fallocate(int(f.Fd()), 0, 0, int64(st.Bavail)*st.Bsize-rest), f.Close()); err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := os.Remove(path); err != nil {
			t.Error(err)
		}
	}
}

func capacity(t *testing.T, p *Pool) Capacity {
	t.Helper()
	c, err := p.Capacity(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestPromisesCountAtOnce(t *testing.T) {
	dir := tmpfs(t, 100*mebibyte)
	p := openPool(t, dir)
	empty := capacity(t, p)
	if empty.Total != 100*mebibyte || empty.Promised != 0 || empty.Available != empty.Free {
		t.Errorf("empty: %+v", empty)
	}
	v := mustCreate(t, p, "half", 50*mebibyte)
	half := capacity(t, p)
	if used := empty.Available - half.Available; used < 50*mebibyte || used > 51*mebibyte {
		t.Errorf("a volume of 50 MiB took %d bytes", used)
	}
	_, err := p.Create(t.Context(), Spec{Name: "too much", Size: SizeRange{Required: 50 * mebibyte}})
	wantClass(t, err, ErrNoSpace)
	_, err = p.Expand(t.Context(), v.ID, SizeRange{Required: 100 * mebibyte})
	wantClass(t, err, ErrNoSpace)

	// What a volume takes is no longer promised to it: writing changes nothing for the others.
	fill(t, p, v.ID, 1, 30*mebibyte)
	if now := capacity(t, p); half.Available-now.Available > 128<<10 || half.Available < now.Available {
		t.Errorf("available was %d, after writing %d", half.Available, now.Available)
	}
	// A restart forgets no promise.
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	p = openPool(t, dir)
	if now := capacity(t, p); half.Available-now.Available > 128<<10 || half.Available < now.Available {
		t.Errorf("available was %d, after a restart %d", half.Available, now.Available)
	}
	if _, err := p.Expand(t.Context(), v.ID, SizeRange{Required: 60 * mebibyte}); err != nil {
		t.Error(err)
	}
	largest, err := LargestVolume(capacity(t, p).Available, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = p.Create(t.Context(), Spec{Name: "rest", Size: SizeRange{Required: largest + 1}})
	wantClass(t, err, ErrNoSpace)
	mustCreate(t, p, "rest", largest)
	for _, id := range list(t, p) {
		if err := p.Delete(t.Context(), id); err != nil {
			t.Error(err)
		}
	}
	if now := capacity(t, p); empty.Available-now.Available > 128<<10 {
		t.Errorf("available was %d, when empty again %d", empty.Available, now.Available)
	}
}

func TestConcurrentCreatesShareWhatThereIs(t *testing.T) {
	p := openPool(t, tmpfs(t, 100*mebibyte))
	const fits = 4 // of 24 MiB and their tables
	results := make(chan error, 3*fits)
	for i := range cap(results) {
		go func() {
			_, err := p.Create(t.Context(), Spec{Name: fmt.Sprint("v", i), Size: SizeRange{Required: 24 * mebibyte}})
			results <- err
		}()
	}
	made := 0
	for range cap(results) {
		if err := <-results; err == nil {
			made++
		} else {
			wantClass(t, err, ErrNoSpace)
		}
	}
	if made != fits || len(list(t, p)) != fits {
		t.Errorf("%d volumes were made, %v are there, want %d", made, list(t, p), fits)
	}
	// The promises hold: all can be written in full.
	for _, id := range list(t, p) {
		fill(t, p, id, 1, 24*mebibyte)
	}
}

func TestFootprintIsTheWorstCase(t *testing.T) {
	p := newPool(t)
	for _, cluster := range []int{512, 4096, 65536, 2 << 20} {
		t.Run(fmt.Sprint(cluster), func(t *testing.T) {
			v, err := p.Create(t.Context(), Spec{
				Name: fmt.Sprint(cluster), Size: SizeRange{Required: 8 * mebibyte}, ClusterSize: cluster,
			})
			if err != nil {
				t.Fatal(err)
			}
			// Grown in steps, so that tables have been replaced.
			for size := int64(10 * mebibyte); size <= 16*mebibyte; size += 2 * mebibyte {
				if _, err := p.Expand(t.Context(), v.ID, SizeRange{Required: size}); err != nil {
					t.Fatal(err)
				}
			}
			fill(t, p, v.ID, 1, 16*mebibyte)
			taken := p.dir.allocated(p.volumes[v.ID].head())
			promised := p.volumes[v.ID].promised
			if taken > promised || promised > taken+taken/4+8*int64(cluster) {
				t.Errorf("promised %d bytes, taken %d", promised, taken)
			}
		})
	}
}

func TestLargestVolume(t *testing.T) {
	for _, cluster := range []int{0, 512, 2 << 20} {
		s := Spec{Name: "v", ClusterSize: cluster}
		if err := s.validate(); err != nil {
			t.Fatal(err)
		}
		for _, available := range []int64{0, 1, mebibyte, 5 * mebibyte, 1 << 30, 1 << 40} {
			size, err := LargestVolume(available, cluster)
			if err != nil || size%Granule != 0 {
				t.Fatal(size, err)
			}
			if size > 0 && footprint(size, s.geometry()) > available {
				t.Errorf("clusters of %d: %d bytes do not fit into %d", cluster, size, available)
			}
			if next := size + Granule; next <= maxSize(s.geometry()) && footprint(next, s.geometry()) <= available {
				t.Errorf("clusters of %d: %d bytes would fit into %d, not only %d", cluster, next, available, size)
			}
		}
	}
	_, err := LargestVolume(1, 3)
	wantClass(t, err, ErrInvalid)
}

func TestFullDisk(t *testing.T) {
	dir := tmpfs(t, 40*mebibyte)
	p := openPool(t, dir)
	v := mustCreate(t, p, "v", 20*mebibyte)
	h := mustAcquire(t, p, v.ID)
	pattern := bytes.Repeat([]byte{0xa5}, mebibyte)
	if _, err := h.Image().WriteAt(pattern, 0); err != nil {
		t.Fatal(err)
	}
	if err := h.Image().Flush(); err != nil {
		t.Fatal(err)
	}

	drop := ballast(t, dir, 0) // somebody else fills the filesystem
	_, err := p.Create(t.Context(), Spec{Name: "new", Size: SizeRange{Required: mebibyte}})
	wantClass(t, err, ErrNoSpace)
	_, err = p.Expand(t.Context(), v.ID, SizeRange{Required: 21 * mebibyte})
	wantClass(t, err, ErrNoSpace)
	wantClass(t, h.SetFormat(t.Context(), Format{State: RawBlock}), ErrNoSpace)
	var written int64 = mebibyte
	for {
		if _, err = h.Image().WriteAt(pattern, written); err != nil {
			break
		}
		written += mebibyte
	}
	wantClass(t, err, ErrNoSpace)
	wantClass(t, err, unix.ENOSPC)
	got := make([]byte, len(pattern))
	for off := int64(0); off < written; off += mebibyte {
		if _, err := h.Image().ReadAt(got, off); err != nil || !bytes.Equal(got, pattern) {
			t.Errorf("what was written at %d is lost: %v", off, err)
		}
	}
	// It goes on after a restart on the full disk ...
	if err := h.Release(); err != nil {
		t.Fatal(err)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	p = openPool(t, dir)
	h = mustAcquire(t, p, v.ID)
	if h.Volume().Format.State != NeverFormatted {
		t.Errorf("format is %+v", h.Volume().Format)
	}
	// ... and as if nothing had been when there is space again.
	drop()
	for off := int64(0); off < 20*mebibyte; off += mebibyte {
		if _, err := h.Image().WriteAt(pattern, off); err != nil {
			t.Fatal(err)
		}
	}
	if err := h.SetFormat(t.Context(), Format{State: RawBlock}); err != nil {
		t.Error(err)
	}
	if _, err := p.Expand(t.Context(), v.ID, SizeRange{Required: 21 * mebibyte}); err != nil {
		t.Error(err)
	}
	if err := h.Release(); err != nil {
		t.Fatal(err)
	}
	mustCreate(t, p, "new", mebibyte)
}

// TestDiskFillsUpInTheMiddle lets the filesystem run full between the promise and any step of a creation.
func TestDiskFillsUpInTheMiddle(t *testing.T) {
	dir := tmpfs(t, 20*mebibyte)
	p := openPool(t, dir)
	fails := 0
	for n := 1; ; n++ {
		countdown, drop := n, func() {}
		p.dir.step = func(string, string) error {
			if countdown--; countdown == 0 {
				drop = ballast(t, dir, 0)
			}
			return nil
		}
		v, err := p.Create(t.Context(), Spec{Name: "v", Size: SizeRange{Required: mebibyte}})
		p.dir.step = nil
		drop()
		if err == nil {
			if err := p.Delete(t.Context(), v.ID); err != nil {
				t.Fatal(err)
			}
			if countdown > 0 {
				break
			}
			continue
		}
		fails++
		wantClass(t, err, ErrNoSpace)
		if left := append(tree(t, filepath.Join(dir, tmpDir)), tree(t, filepath.Join(dir, volumesDir))...); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
	}
	if fails == 0 {
		t.Error("the disk was never full")
	}
	if c := capacity(t, p); c.Promised != 0 {
		t.Errorf("%+v", c)
	}
}

// TestConcurrency lets many callers do everything to a few volumes. Their errors are of the expected classes, and the
// directory ends up as the pool has it in memory.
func TestConcurrency(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	dir := t.TempDir()
	p := openPool(t, dir)
	var callers sync.WaitGroup
	for i := range 8 {
		callers.Go(func() {
			random := rand.New(rand.NewPCG(seed, uint64(i)))
			for range 40 {
				name := fmt.Sprint("v", random.IntN(3))
				v, err := p.Create(t.Context(), Spec{Name: name, Size: SizeRange{Required: mebibyte}})
				if err != nil {
					t.Errorf("create: %v", err)
					return
				}
				switch random.IntN(5) {
				case 0:
					err = p.Delete(t.Context(), v.ID)
				case 1:
					_, err = p.Expand(t.Context(), v.ID, SizeRange{Required: int64(random.IntN(8)) * mebibyte})
				case 2:
					_, err = p.Get(t.Context(), v.ID)
				case 3:
					_, err = p.Capacity(t.Context())
				default:
					err = use(t, p, v.ID)
				}
				if err != nil && !errors.Is(err, ErrBusy) && !errors.Is(err, ErrNotFound) {
					t.Errorf("%v", err)
				}
			}
		})
	}
	callers.Wait()
	ids := list(t, p)
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if again := list(t, openPool(t, dir)); !slices.Equal(ids, again) {
		t.Errorf("in memory %v, in the directory %v", ids, again)
	}
}

// use opens a volume, and sees to it that nobody else uses it meanwhile.
func use(t *testing.T, p *Pool, id string) error {
	h, err := p.Acquire(t.Context(), id, false)
	if err != nil {
		return err
	}
	if _, err := h.Image().WriteAt([]byte{1, 2, 3}, 0); err != nil {
		return err
	}
	if err := p.Delete(t.Context(), id); !errors.Is(err, ErrBusy) {
		t.Errorf("an open volume was deleted: %v", err)
	}
	if err := h.SetFormat(t.Context(), Format{State: RawBlock}); err != nil {
		return err
	}
	return h.Release()
}
