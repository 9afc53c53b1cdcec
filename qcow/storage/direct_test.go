package storage

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/qcow-csi/qcow-csi/test/require"
)

// newDirectFile returns a new file open for direct I/O, which the test closes.
func newDirectFile(t *testing.T) (f *OSFile, path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "file")
	f, err := OpenWith(path, Options{Create: true, Direct: true})
	require.Feature(t, !errors.Is(err, ErrUnsupported), "needs a temporary directory with direct I/O")
	mustDo(t, err)
	return f, path
}

// needDisk skips the test on a file system in memory, which only plays direct I/O.
func needDisk(t *testing.T, f *OSFile) {
	t.Helper()
	var st unix.Statfs_t
	mustDo(t, control(f.f, func(fd int) error { return unix.Fstatfs(fd, &st) }))
	require.Feature(t, st.Type != unix.TMPFS_MAGIC, "needs a temporary directory on a disk")
}

// cachedPages returns how many pages of the first size bytes of the file at path are in the page cache.
func cachedPages(t *testing.T, path string, size int) (n int) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	mustDo(t, err)
	defer func() { mustDo(t, f.Close()) }()
	m, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ, unix.MAP_SHARED)
	mustDo(t, err)
	defer func() { mustDo(t, unix.Munmap(m)) }()
	pages := make([]byte, (size+os.Getpagesize()-1)/os.Getpagesize())
	if _, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&m[0])), uintptr(size), uintptr(unsafe.Pointer(&pages[0]))); errno != 0 {
		t.Fatal(errno)
	}
	for _, p := range pages {
		n += int(p & 1)
	}
	return n
}

func TestDirectPassesThePageCacheBy(t *testing.T) {
	const size = 1 << 20
	f, path := newDirectFile(t)
	defer closeFile(t, f)
	needDisk(t, f)
	a := f.DirectAlignment()
	if a <= 0 || a&(a-1) != 0 || size%a != 0 {
		t.Fatalf("alignment %d", a)
	}
	p := AlignedBuffer(size, a)
	for i := range p {
		p[i] = byte(i % 251)
	}
	mustWrite(t, f, p, 0)
	if n, err := f.WriteSync(p[:size/2], 0); n != size/2 || err != nil {
		t.Fatalf("synchronous write: %d, %v", n, err)
	}
	got := AlignedBuffer(size, a)
	if n, err := f.ReadAt(got, 0); n != size || err != nil || !bytes.Equal(got, p) {
		t.Fatalf("read: %d, %v", n, err)
	}
	if n := cachedPages(t, path, size); n != 0 {
		t.Errorf("%d pages are in the page cache", n)
	}
	if _, err := f.ReadAt(got[1:], 0); err != nil {
		t.Fatal(err)
	}
	if cachedPages(t, path, size) == 0 {
		t.Error("an unaligned read left nothing in the page cache: the test sees nothing")
	}
}

// The end of a file need not be aligned: a direct read of it returns what is there.
func TestDirectReadAtUnalignedEnd(t *testing.T) {
	f, _ := newDirectFile(t)
	defer closeFile(t, f)
	a := f.DirectAlignment()
	want := bytes.Repeat([]byte{7}, 2*a+100)
	mustWrite(t, f, want, 0)
	mustDo(t, f.Sync())
	got := AlignedBuffer(4*a, a)
	if n, err := f.ReadAt(got, 0); n != len(want) || err == nil || !bytes.Equal(got[:n], want) {
		t.Errorf("read across the end: %d, %v", n, err)
	}
	if n, err := f.ReadAt(got[:a], int64(2*a)); n != 100 || err == nil || !bytes.Equal(got[:n], want[:n]) {
		t.Errorf("read of the end: %d, %v", n, err)
	}
	if n, err := f.ReadAt(got, int64(4*a)); n != 0 || err == nil {
		t.Errorf("read behind the end: %d, %v", n, err)
	}
}

// Direct and buffered writes to neighbouring sectors of the same pages, at the same time, all arrive.
func TestDirectAndBufferedWritesMeet(t *testing.T) {
	f, _ := newDirectFile(t)
	defer closeFile(t, f)
	a := f.DirectAlignment()
	const blocks, rounds = 32, 20
	mustWrite(t, f, make([]byte, blocks*a), 0)
	for round := range rounds {
		var wg sync.WaitGroup
		for i := range blocks {
			wg.Go(func() {
				p := AlignedBuffer(a+1, a)
				if i%2 == 1 {
					p = p[1:] // through the page cache
				}
				p = p[:a]
				for k := range p {
					p[k] = byte(round + i)
				}
				if _, err := f.WriteAt(p, int64(i*a)); err != nil {
					t.Error(err)
				}
				// Another request reads the neighbours meanwhile, either way.
				if _, err := f.ReadAt(p, int64((i^1)*a)); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		var want []byte
		for i := range blocks {
			want = append(want, bytes.Repeat([]byte{byte(round + i)}, a)...)
		}
		expectContent(t, f, want)
		got := AlignedBuffer(blocks*a, a)
		if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("round %d: a direct read differs, %v", round, err)
		}
	}
}

// The locks are taken once, and the second descriptor neither has them nor ends them.
func TestDirectFileIsLocked(t *testing.T) {
	f, path := newDirectFile(t)
	if _, err := Open(path, ReadOnly); !errors.Is(err, ErrBusy) {
		t.Errorf("%v; want ErrBusy", err)
	}
	mustDo(t, f.direct.f.Close())
	if _, err := Open(path, ReadOnly); !errors.Is(err, ErrBusy) {
		t.Errorf("with the second descriptor closed: %v; want ErrBusy", err)
	}
	mustDo(t, f.f.Close())
	for _, mode := range []Mode{ReadOnly, ReadWrite, Shared} {
		f, err := OpenWith(path, Options{Mode: mode, Direct: true})
		mustDo(t, err)
		if f.DirectAlignment() == 0 {
			t.Error("not open for direct I/O")
		}
		closeFile(t, f)
	}
	f, err := Open(path, ReadWrite)
	mustDo(t, err)
	defer closeFile(t, f)
	if f.DirectAlignment() != 0 {
		t.Error("open for direct I/O without having been asked")
	}
}

// What trial and error find works, and asks for no less than the file system says.
func TestDirectAlignmentByTrial(t *testing.T) {
	f, _ := newDirectFile(t)
	defer closeFile(t, f)
	needDisk(t, f)
	if memory, offset, err := alignmentByTrial(f.direct.f); memory != largeAlignment || offset != largeAlignment || err != nil {
		t.Errorf("of an empty file: %d, %d, %v", memory, offset, err)
	}
	mustDo(t, f.Truncate(2*largeAlignment))
	memory, offset, err := alignmentByTrial(f.direct.f)
	mustDo(t, err)
	if memory < f.direct.memory || offset < f.direct.offset {
		t.Errorf("found %d, %d; the file system says %d, %d", memory, offset, f.direct.memory, f.direct.offset)
	}
	if _, _, err := alignmentByTrial(f.f); err != nil { // any alignment will do
		t.Error(err)
	}
	p := AlignedBuffer(2*memory, 2*memory)[memory:]
	if n, err := f.direct.f.WriteAt(p, int64(offset)); n != len(p) || err != nil {
		t.Errorf("direct write with the alignment found: %d, %v", n, err)
	}
}

// A request that the file system refuses to make directly all the same is made through the page cache.
func TestDirectFallsBack(t *testing.T) {
	f, _ := newDirectFile(t)
	defer closeFile(t, f)
	require.Feature(t, f.direct.offset > 1, "needs direct I/O that must be aligned")
	f.direct.offset, f.direct.memory = 1, 1 // as if the file system had not told the truth
	want := append([]byte{0}, bytes.Repeat([]byte("0123456789"), 1000)...)
	mustWrite(t, f, want[1:], 1)
	expectContent(t, f, want)
	if n, err := f.WriteSync([]byte("abc"), 5); n != 3 || err != nil {
		t.Fatalf("synchronous write: %d, %v", n, err)
	}
	copy(want[5:], "abc")
	expectContent(t, f, want)
}

// The files of proc have no direct I/O. They are regular ones to the eye.
func TestDirectRefused(t *testing.T) {
	_, err := OpenWith("/proc/version", Options{Direct: true})
	if !errors.Is(err, ErrUnsupported) || !errors.Is(err, syscall.EINVAL) {
		t.Errorf("%v; want ErrUnsupported", err)
	}
}

func TestDirectOfAReplacedFile(t *testing.T) {
	f, path := newOSFile(t)
	defer closeFile(t, f)
	mustDo(t, os.Rename(path, path+".old"), os.WriteFile(path, nil, 0o600))
	if err := f.openDirect(path, os.O_RDWR); err == nil || f.DirectAlignment() != 0 {
		t.Error("the second descriptor is of another file")
	}
}

func TestAlignedBuffer(t *testing.T) {
	for _, align := range []int{1, 2, 512, 4096, 1 << 16} {
		for _, n := range []int{0, 1, 511, 4096, 1 << 17} {
			b := AlignedBuffer(n, align)
			if len(b) != n || cap(b) != n || n > 0 && address(b)%uintptr(align) != 0 {
				t.Errorf("%d bytes aligned to %d: length %d, capacity %d, address %#x", n, align, len(b), cap(b), address(b))
			}
		}
	}
}
