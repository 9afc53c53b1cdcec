package mount_test

import (
	"context"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/qcow-csi/qcow-csi/test/require"
)

// faultyDisk is a loop device whose reads and writes pass through this process, which may fail them: the loop device
// lies over the only file of a FUSE mount, and that over a sparse file.
type faultyDisk struct {
	fs.Inode
	path string // of the loop device
	data *os.File
	size int64

	mu          sync.Mutex
	read, write func(off, n int64) error
	writeBytes  int64
}

var (
	_ fs.NodeOpener    = (*faultyDisk)(nil)
	_ fs.NodeGetattrer = (*faultyDisk)(nil)
	_ fs.NodeReader    = (*faultyDisk)(nil)
	_ fs.NodeWriter    = (*faultyDisk)(nil)
	_ fs.NodeFsyncer   = (*faultyDisk)(nil)
)

func newFaultyDisk(t *testing.T, size int64) *faultyDisk {
	t.Helper()
	require.Root(t)
	data, err := os.Create(filepath.Join(t.TempDir(), "data"))
	noError(t, err)
	noError(t, data.Truncate(size))
	d := &faultyDisk{data: data, size: size}
	root := &fs.Inode{}
	dir := t.TempDir()
	server, err := fs.Mount(dir, root, &fs.Options{
		MountOptions: fuse.MountOptions{DirectMount: true, FsName: "faulty", MaxWrite: 128 << 10},
		OnAdd: func(ctx context.Context) {
			root.AddChild("disk", root.NewPersistentInode(ctx, d, fs.StableAttr{Mode: fuse.S_IFREG}), true)
		},
	})
	require.Feature(t, err == nil, "needs FUSE")
	t.Cleanup(func() {
		if err := server.Unmount(); err != nil {
			t.Error(err)
		}
		noError(t, data.Close())
	})
	d.path = attachLoop(t, filepath.Join(dir, "disk"), 0).path
	return d
}

// onRead has f called before every read, one at a time; an error fails the read. nil removes it.
func (d *faultyDisk) onRead(f func(off, n int64) error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.read = f
}

// onWrite is onRead for writes.
func (d *faultyDisk) onWrite(f func(off, n int64) error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.write = f
}

func (d *faultyDisk) written() int64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.writeBytes
}

func (d *faultyDisk) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	return nil, fuse.FOPEN_DIRECT_IO, fs.OK
}

func (d *faultyDisk) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Mode, out.Size = fuse.S_IFREG|0o600, uint64(d.size)
	return fs.OK
}

func (d *faultyDisk) Read(_ context.Context, _ fs.FileHandle, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.read != nil {
		if err := d.read(off, int64(len(dest))); err != nil {
			return nil, fs.ToErrno(err)
		}
	}
	n, err := d.data.ReadAt(dest, off)
	if n == 0 && err != nil {
		return nil, fs.ToErrno(err)
	}
	return fuse.ReadResultData(dest[:n]), fs.OK
}

func (d *faultyDisk) Write(_ context.Context, _ fs.FileHandle, data []byte, off int64) (uint32, syscall.Errno) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.write != nil {
		if err := d.write(off, int64(len(data))); err != nil {
			return 0, fs.ToErrno(err)
		}
	}
	n, err := d.data.WriteAt(data, off)
	d.writeBytes += int64(n)
	return uint32(n), fs.ToErrno(err)
}

func (d *faultyDisk) Fsync(context.Context, fs.FileHandle, uint32) syscall.Errno {
	return fs.ToErrno(d.data.Sync())
}
