package fuse

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/qcow-csi/qcow-csi/driver/attach"
	"github.com/qcow-csi/qcow-csi/nbdexport"
)

const (
	// maxRequest is the longest read or write, in bytes: what the kernel does at most.
	maxRequest = 1 << 20
	// maxInFlight is the number of reads and writes that the kernel lets be under way at a time. A loop device has up to
	// 128 of its own.
	maxInFlight = 256

	rootNode = fuse.FUSE_ROOT_ID
	fileNode = rootNode + 1

	parallelDirectWrites = 1 << 6 // FOPEN_PARALLEL_DIRECT_WRITES, since Linux 6.0; older kernels ignore it
)

// export is a mounted backend: a root directory with one file. It implements fuse.RawFileSystem.
type export struct {
	fuse.RawFileSystem // answers ENOSYS to what is not below, to POLL too

	name     string // of the file
	backend  nbdexport.Backend
	size     atomic.Int64
	geometry attach.Geometry // its Size is what size began with
	logger   klog.Logger

	number uint32   // of the connection
	root   *os.File // of the mount, which lasts for as long as this is open or the loop device has the file
	server *fuse.Server
	ended  chan struct{} // closed when the server has returned, after which the backend is no longer used
}

// newExport mounts the backend. The caller closes the export, sooner or later.
func newExport(ctx context.Context, name string, backend nbdexport.Backend, g attach.Geometry) (*export, error) {
	e := &export{
		RawFileSystem: fuse.NewDefaultRawFileSystem(),
		name:          name,
		backend:       backend,
		geometry:      g,
		logger:        klog.FromContext(ctx),
		ended:         make(chan struct{}),
	}
	e.size.Store(g.Size)
	c, err := connect()
	if err != nil {
		return nil, err
	}
	e.number, e.root = c.number, c.root
	// A "mount point" of this form says that the mount exists, and which descriptor is the server's end: the server's
	// from now on.
	e.server, err = fuse.NewServer(e, "/dev/fd/"+strconv.Itoa(c.device), &fuse.MountOptions{
		MaxBackground:     maxInFlight,
		MaxWrite:          maxRequest,
		DisableXAttrs:     true,
		DisableSplice:     true, // the data is in memory already
		ExtraCapabilities: fuse.CAP_ASYNC_DIO,
		Logger:            log.New(logWriter{e.logger}, "", 0),
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start the FUSE server: %w", err), c.root.Close())
	}
	go func() {
		defer close(e.ended)
		e.server.Serve()
	}()
	return e, nil
}

// alive tells whether the export is being served. It is not when somebody else has aborted the connection.
func (e *export) alive() bool {
	select {
	case <-e.ended:
		return false
	default:
		return true
	}
}

// close lets go of the mount and returns nil when the backend is no longer used. The loop device has let go of the file
// before; should it still have it when ctx ends, it loses its server.
func (e *export) close(ctx context.Context) error {
	if err := e.root.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		return err
	}
	select {
	case <-e.ended:
		return nil
	case <-ctx.Done():
	}
	if err := abort(e.number); err != nil {
		return err
	}
	<-e.ended
	return nil
}

// status is the answer for a request that failed with err or, when err is nil, succeeded.
func (e *export) status(err error, operation string, off uint64, n int) fuse.Status {
	if err == nil {
		return fuse.OK
	}
	e.logger.Error(err, "I/O error", "file", e.name, "operation", operation, "offset", off, "length", n)
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fuse.Status(syscall.ENOSPC)
	}
	return fuse.EIO
}

// inside tells whether the file has n bytes at off.
func (e *export) inside(off, n uint64) bool {
	size := uint64(e.size.Load())
	return off <= size && n <= size-off
}

func (e *export) String() string { return "qcow-csi" }

func (e *export) attributes(node uint64, a *fuse.Attr) {
	a.Ino = node
	a.Nlink = 1
	if node == rootNode {
		a.Mode = unix.S_IFDIR | 0o500
		return
	}
	a.Mode = unix.S_IFREG | 0o600
	a.Size = uint64(e.size.Load())
	a.Blocks = a.Size / 512
	a.Blksize = uint32(e.geometry.BlockSize)
}

// Lookup finds the file.
func (e *export) Lookup(_ <-chan struct{}, _ *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	if name != e.name {
		return fuse.ENOENT
	}
	out.NodeId = fileNode
	e.attributes(fileNode, &out.Attr)
	return fuse.OK
}

// GetAttr describes the root or the file, for this moment.
func (e *export) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	e.attributes(in.NodeId, &out.Attr)
	return fuse.OK
}

// Open opens the file for I/O past the page cache, reads and writes side by side.
func (e *export) Open(_ <-chan struct{}, _ *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	out.OpenFlags = fuse.FOPEN_DIRECT_IO | parallelDirectWrites
	return fuse.OK
}

// Flush is a close of the file, which asks for nothing.
func (e *export) Flush(<-chan struct{}, *fuse.FlushIn) fuse.Status { return fuse.OK }

// Release ends an open.
func (e *export) Release(<-chan struct{}, *fuse.ReleaseIn) {}

// Read reads.
func (e *export) Read(_ <-chan struct{}, in *fuse.ReadIn, p []byte) (fuse.ReadResult, fuse.Status) {
	if !e.inside(in.Offset, uint64(len(p))) {
		return nil, fuse.EIO // the loop device ends where the file does
	}
	n, err := e.backend.ReadAt(p, int64(in.Offset))
	if n < len(p) { // io.ReaderAt may report io.EOF with the last byte
		return nil, e.status(err, "read", in.Offset, len(p)) // the library ignores the status next to a result
	}
	return fuse.ReadResultData(p), fuse.OK
}

// Write writes.
func (e *export) Write(_ <-chan struct{}, in *fuse.WriteIn, p []byte) (uint32, fuse.Status) {
	if !e.inside(in.Offset, uint64(len(p))) {
		return 0, fuse.EIO
	}
	_, err := e.backend.WriteAt(p, int64(in.Offset))
	return uint32(len(p)), e.status(err, "write", in.Offset, len(p))
}

// Fsync flushes the backend.
func (e *export) Fsync(<-chan struct{}, *fuse.FsyncIn) fuse.Status {
	return e.status(e.backend.Flush(), "flush", 0, 0)
}

// Fallocate makes zeroes: holes for discards and for most requests to write zeroes, which the loop driver does not
// tell apart; zeroes that keep their space for the rest of the latter.
func (e *export) Fallocate(_ <-chan struct{}, in *fuse.FallocateIn) fuse.Status {
	if !e.inside(in.Offset, in.Length) {
		return fuse.EIO
	}
	switch in.Mode &^ unix.FALLOC_FL_KEEP_SIZE {
	case unix.FALLOC_FL_PUNCH_HOLE:
		err := e.backend.WriteZeroes(int64(in.Offset), int64(in.Length), nbdexport.Zeroing{MayUnmap: true})
		return e.status(err, "discard", in.Offset, int(in.Length))
	case unix.FALLOC_FL_ZERO_RANGE:
		err := e.backend.WriteZeroes(int64(in.Offset), int64(in.Length), nbdexport.Zeroing{})
		return e.status(err, "write zeroes", in.Offset, int(in.Length))
	default:
		return fuse.Status(syscall.EOPNOTSUPP)
	}
}

// StatFs says how large a block is: the loop driver makes that the granularity of discards.
func (e *export) StatFs(_ <-chan struct{}, _ *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	out.Bsize = uint32(e.geometry.Granularity)
	out.Frsize = uint32(e.geometry.BlockSize)
	out.Blocks = uint64(e.size.Load()) / uint64(e.geometry.BlockSize)
	out.NameLen = uint32(len(e.name))
	return fuse.OK
}

// logWriter makes log lines of what the FUSE library prints.
type logWriter struct{ logger klog.Logger }

func (w logWriter) Write(line []byte) (int, error) {
	w.logger.V(2).Info("FUSE server", "message", strings.TrimSpace(string(line)))
	return len(line), nil
}
