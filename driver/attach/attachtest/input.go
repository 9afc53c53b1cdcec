package attachtest

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"sync"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/qcow-csi/qcow-csi/driver/attach"
	"github.com/qcow-csi/qcow-csi/nbdexport"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// input is the tests that read from devices and write to them.
var input = map[string]func(*rig){
	"what is written arrives":                    arrives,
	"long requests":                              longRequests,
	"concurrent requests":                        concurrentRequests,
	"fsync flushes the backend":                  fsyncFlushes,
	"detach takes along what was not synced":     detachSyncs,
	"a failed flush keeps the device attached":   failedFlush,
	"discard and write zeroes":                   discards,
	"a read-only device":                         readOnly,
	"the backend's block size is the device's":   blockSize,
	"backend errors reach the caller":            backendErrors,
	"resize while the device is being written":   resizeUnderLoad,
	"a claimed device is busy":                   claimedIsBusy,
	"a mounted device is busy":                   mountedIsBusy,
	"a device that was left is claimed: busy":    leftAndClaimed,
	"data of one device stays off the other's":   noMixing,
	"a device outlives the context of attach":    outlivesContext,
	"a killed process leaves a device to detach": killedProcess,
	"a process is killed while it detaches":      killedMidway,
	"a device is gone for those who ask anew":    gone,
	"concurrent detaches: the device goes once":  detachRace,
}

// open opens a device. Everything here goes by plain descriptors, with a thread for each waiting call.
func (r *rig) open(path string, flags int) int {
	r.Helper()
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
	if err != nil {
		r.Fatalf("open %s: %v", path, err)
	}
	return fd
}

func (r *rig) close(fd int) {
	r.Helper()
	if err := unix.Close(fd); err != nil {
		r.Errorf("close: %v", err)
	}
}

func (r *rig) pwrite(fd int, p []byte, off int64) {
	r.Helper()
	if n, err := unix.Pwrite(fd, p, off); n != len(p) || err != nil {
		r.Fatalf("wrote %d of %d bytes at %d: %v", n, len(p), off, err)
	}
}

func (r *rig) pread(fd, n int, off int64) []byte {
	r.Helper()
	p := Aligned(n)
	if got, err := unix.Pread(fd, p, off); got != n || err != nil {
		r.Fatalf("read %d of %d bytes at %d: %v", got, n, off, err)
	}
	return p
}

// direct returns n random bytes where O_DIRECT can take them.
func (r *rig) direct(n int) []byte {
	p := Aligned(n)
	copy(p, r.bytes(n))
	return p
}

// Aligned returns n bytes that begin on a page, for O_DIRECT.
func Aligned(n int) []byte {
	const page = 4096
	p := make([]byte, n+page)
	skip := -int(uintptr(unsafe.Pointer(unsafe.SliceData(p)))) & (page - 1)
	return p[skip : skip+n]
}

// ioctlRange calls an ioctl whose argument is two numbers, a range of bytes.
func ioctlRange(fd int, request uint, off, n uint64) error {
	arg := [2]uint64{off, n}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(request), uintptr(unsafe.Pointer(&arg))); errno != 0 {
		return errno
	}
	return nil
}

func (r *rig) same(got, want []byte, what string) {
	r.Helper()
	if !bytes.Equal(got, want) {
		r.Errorf("%s differs", what)
	}
}

func arrives(r *rig) {
	b := NewBackend(r, deviceSize)
	d := r.attach("v", b)
	fd := r.open(d.Path, unix.O_RDWR|unix.O_DIRECT)
	for _, off := range []int64{0, 512, 1 << 16, mebibyte - 512, deviceSize - 4096} {
		p := r.direct(4096)
		r.pwrite(fd, p, off)
		r.same(b.Bytes(off, 4096), p, "the backend")
		r.same(r.pread(fd, 4096, off), p, "the device")
	}
	p := r.direct(512)
	r.pwrite(fd, p, deviceSize-512)
	r.same(b.Bytes(deviceSize-512, 512), p, "the last sector of the backend")
	if n, err := unix.Pwrite(fd, p, deviceSize); err == nil && n > 0 {
		r.Errorf("wrote %d bytes past the end", n)
	}
	r.close(fd)
	r.detach("v", b)
}

func longRequests(r *rig) {
	b := NewBackend(r, deviceSize)
	d := r.attach("v", b)
	fd := r.open(d.Path, unix.O_RDWR|unix.O_DIRECT)
	p := r.direct(deviceSize)
	r.pwrite(fd, p, 0)
	r.same(b.Bytes(0, deviceSize), p, "the backend")
	r.same(r.pread(fd, deviceSize, 0), p, "the device")
	r.close(fd)
	r.detach("v", b)
}

func concurrentRequests(r *rig) {
	const (
		writers = 8
		slice   = deviceSize / writers
		block   = 16 << 10
	)
	b := NewBackend(r, deviceSize)
	d := r.attach("v", b)
	fd := r.open(d.Path, unix.O_RDWR|unix.O_DIRECT)
	p := r.direct(deviceSize)
	var group sync.WaitGroup
	for w := range writers {
		group.Go(func() {
			for off := w * slice; off < (w+1)*slice; off += block {
				if _, err := unix.Pwrite(fd, p[off:off+block], int64(off)); err != nil {
					r.Errorf("write at %d: %v", off, err)
				}
			}
			got := Aligned(slice)
			if _, err := unix.Pread(fd, got, int64(w*slice)); err != nil || !bytes.Equal(got, p[w*slice:(w+1)*slice]) {
				r.Errorf("slice %d differs (%v)", w, err)
			}
		})
	}
	group.Wait()
	r.same(b.Bytes(0, deviceSize), p, "the backend")
	r.close(fd)
	r.detach("v", b)
}

func fsyncFlushes(r *rig) {
	b := NewBackend(r, deviceSize)
	d := r.attach("v", b)
	fd := r.open(d.Path, unix.O_RDWR)
	p := r.bytes(64 << 10)
	r.pwrite(fd, p, 8192)
	var atFlush []byte
	b.Fail(func(op Op, _ int64) error {
		if op == Flush {
			atFlush = bytes.Clone(b.data[8192 : 8192+len(p)])
		}
		return nil
	})
	if err := unix.Fsync(fd); err != nil {
		r.Fatalf("fsync: %v", err)
	}
	b.Fail(nil)
	if b.Calls(Flush) == 0 {
		r.Error("fsync did not flush the backend")
	}
	r.same(atFlush, p, "what the backend had when it was flushed")
	r.close(fd)
	r.detach("v", b)
}

func detachSyncs(r *rig) {
	b := NewBackend(r, deviceSize)
	d := r.attach("v", b)
	p := r.bytes(2 * mebibyte)
	fd := r.open(d.Path, unix.O_RDWR)
	r.pwrite(fd, p, 4096)
	r.close(fd)
	r.detach("v", b)
	r.same(b.Bytes(4096, int64(len(p))), p, "the backend")
	if b.Calls(Flush) == 0 {
		r.Error("the backend was not flushed")
	}
}

func failedFlush(r *rig) {
	b := NewBackend(r, deviceSize)
	d := r.attach("v", b)
	fd := r.open(d.Path, unix.O_RDWR)
	r.pwrite(fd, r.bytes(4096), 0)
	r.close(fd)
	b.Fail(func(op Op, _ int64) error {
		if op == Flush {
			return errors.New("injected")
		}
		return nil
	})
	if err := r.a.Detach(r.Context(), "v"); err == nil {
		r.Error("detach succeeded although the flush failed")
	}
	b.Fail(nil)
	if got := r.list(r.Context(), r.a); got["v"] != d {
		r.Errorf("listed %+v, want %+v", got, d)
	}
	r.detach("v", b)
}

func discards(r *rig) {
	b := NewBackend(r, deviceSize)
	b.Describe(nbdexport.Info{PreferredBlock: 64 << 10})
	d := r.attach("v", b)
	fd := r.open(d.Path, unix.O_RDWR|unix.O_DIRECT)
	want := r.direct(deviceSize)
	r.pwrite(fd, want, 0)

	if err := ioctlRange(fd, unix.BLKDISCARD, mebibyte, 2*mebibyte); err != nil {
		r.Errorf("discard: %v", err)
	}
	clear(want[mebibyte : 3*mebibyte])
	if b.Calls(Discard)+b.Calls(WriteZeroes) == 0 {
		r.Error("the backend was not told of the discard")
	}
	r.same(b.Bytes(0, deviceSize), want, "the backend after a discard")

	// To the last byte, whatever the cluster size is.
	if err := ioctlRange(fd, unix.BLKZEROOUT, 4*mebibyte+512, 3*512); err != nil {
		r.Errorf("write zeroes: %v", err)
	}
	clear(want[4*mebibyte+512 : 4*mebibyte+4*512])
	if err := ioctlRange(fd, unix.BLKZEROOUT, 5*mebibyte, mebibyte); err != nil {
		r.Errorf("write zeroes: %v", err)
	}
	clear(want[5*mebibyte : 6*mebibyte])
	r.same(b.Bytes(0, deviceSize), want, "the backend after writing zeroes")
	r.same(r.pread(fd, deviceSize, 0), want, "the device")
	r.close(fd)
	r.detach("v", b)
}

func readOnly(r *rig) {
	for name, byRequest := range map[string]bool{"by request": true, "by the backend": false} {
		b := NewBackend(r, deviceSize)
		p := r.direct(4096)
		if _, err := b.WriteAt(p, 0); err != nil {
			r.Fatal(err)
		}
		if !byRequest {
			b.Describe(nbdexport.Info{ReadOnly: true})
		}
		d, err := r.a.Attach(r.Context(), attach.Request{VolumeID: "v", Backend: b, ReadOnly: byRequest})
		if err != nil {
			r.Fatalf("attach: %v", err)
		}
		writes := b.Calls(Write)
		fd := r.open(d.Path, unix.O_RDONLY|unix.O_DIRECT)
		r.same(r.pread(fd, 4096, 0), p, "the device")
		if ro, err := unix.IoctlGetInt(fd, unix.BLKROGET); err != nil || ro == 0 {
			r.Errorf("%s: the device says read-only: %d (%v)", name, ro, err)
		}
		r.close(fd)
		if fd, err := unix.Open(d.Path, unix.O_RDWR|unix.O_CLOEXEC, 0); err == nil {
			if _, err := unix.Pwrite(fd, p, 0); err == nil && unix.Fsync(fd) == nil {
				r.Errorf("%s: wrote to a read-only device", name)
			}
			r.close(fd)
		}
		if b.Calls(Write) != writes {
			r.Errorf("%s: the backend was written", name)
		}
		r.detach("v", b)
	}
}

func blockSize(r *rig) {
	for minimum, want := range map[uint32]int{0: 512, 1: 512, 512: 512, 4096: 4096} {
		b := NewBackend(r, deviceSize)
		b.Describe(nbdexport.Info{MinimumBlock: minimum})
		d := r.attach("v", b)
		fd := r.open(d.Path, unix.O_RDONLY)
		if got, err := unix.IoctlGetInt(fd, unix.BLKSSZGET); got != want || err != nil {
			r.Errorf("backend with blocks of %d: the device has blocks of %d (%v), want %d", minimum, got, err, want)
		}
		r.close(fd)
		r.detach("v", b)
	}
}

func backendErrors(r *rig) {
	b := NewBackend(r, deviceSize)
	d := r.attach("v", b)
	fd := r.open(d.Path, unix.O_RDWR|unix.O_DIRECT)
	p := r.direct(4096)
	r.pwrite(fd, p, 0)
	var injected atomic.Value
	b.Fail(func(op Op, _ int64) error {
		if err := injected.Load().(syscall.Errno); err != 0 && op != Flush {
			return err
		}
		return nil
	})
	for _, errno := range []syscall.Errno{syscall.EIO, syscall.ENOSPC, syscall.EINVAL, syscall.EPERM, syscall.EOPNOTSUPP} {
		injected.Store(errno)
		if _, err := unix.Pwrite(fd, p, 8192); !errors.Is(err, syscall.EIO) && !errors.Is(err, syscall.ENOSPC) {
			r.Errorf("a write that failed with %v: %v, want an I/O error", errno, err)
		}
		if _, err := unix.Pread(fd, Aligned(4096), 0); !errors.Is(err, syscall.EIO) && !errors.Is(err, syscall.ENOSPC) {
			r.Errorf("a read that failed with %v: %v, want an I/O error", errno, err)
		}
	}
	injected.Store(syscall.Errno(0))
	r.same(r.pread(fd, 4096, 0), p, "the device after errors")
	r.close(fd)
	r.detach("v", b)
}

func resizeUnderLoad(r *rig) {
	b := NewBackend(r, deviceSize)
	d := r.attach("v", b)
	fd := r.open(d.Path, unix.O_RDWR|unix.O_DIRECT)
	const writers = 4
	var (
		group sync.WaitGroup
		stop  atomic.Bool
	)
	for w := range writers {
		p := r.direct(4096)
		group.Go(func() {
			for i := 0; !stop.Load(); i++ {
				off := int64(w)*mebibyte + int64(i%256)*4096
				if _, err := unix.Pwrite(fd, p, off); err != nil {
					r.Errorf("write at %d during a resize: %v", off, err)
					return
				}
			}
		})
	}
	size := int64(deviceSize)
	for range 8 {
		size += mebibyte
		b.Grow(size)
		if err := r.a.Resize(r.Context(), "v", size); err != nil {
			r.Errorf("resize to %d: %v", size, err)
			break
		}
		p := r.direct(4096)
		if _, err := unix.Pwrite(fd, p, size-4096); err != nil {
			r.Errorf("write to what was gained: %v", err)
			break
		}
		r.same(b.Bytes(size-4096, 4096), p, "the end of the backend")
	}
	stop.Store(true)
	group.Wait()
	r.close(fd)
	r.detach("v", b)
}

// busy takes it that the device cannot be detached, and works on.
func (r *rig) busy(d attach.Device, b *Backend) {
	r.Helper()
	if err := r.a.Detach(r.Context(), d.VolumeID); !errors.Is(err, attach.ErrBusy) {
		r.Errorf("detach: %v, want %v", err, attach.ErrBusy)
	}
	if got := r.list(r.Context(), r.a)[d.VolumeID]; got != d {
		r.Errorf("listed %+v, want %+v", got, d)
	}
	fd := r.open(d.Path, unix.O_RDWR|unix.O_DIRECT)
	p := r.direct(4096)
	r.pwrite(fd, p, mebibyte)
	r.same(b.Bytes(mebibyte, 4096), p, "the backend of the busy device")
	r.close(fd)
}

func claimedIsBusy(r *rig) {
	b := NewBackend(r, deviceSize)
	d := r.attach("v", b)
	fd := r.open(d.Path, unix.O_RDONLY|unix.O_EXCL)
	r.busy(d, b)
	r.close(fd)
	r.detach("v", b)
}

func openIsBusy(r *rig) {
	b := NewBackend(r, deviceSize)
	d := r.attach("v", b)
	fd := r.open(d.Path, unix.O_RDONLY)
	r.busy(d, b)
	r.close(fd)
	r.detach("v", b)
}

// mount makes a filesystem on the device and mounts it.
func (r *rig) mount(d attach.Device) (dir string) {
	r.Helper()
	require.Tool(r.T, "mkfs.ext4")
	if out, err := exec.CommandContext(r.Context(), "mkfs.ext4", "-q", d.Path).CombinedOutput(); err != nil {
		r.Fatalf("mkfs.ext4: %v: %s", err, out)
	}
	dir = r.TempDir()
	if err := unix.Mount(d.Path, dir, "ext4", 0, ""); err != nil {
		r.Fatalf("mount: %v", err)
	}
	return dir
}

func mountedIsBusy(r *rig) {
	b := NewBackend(r, deviceSize)
	d := r.attach("v", b)
	dir := r.mount(d)
	if err := r.a.Detach(r.Context(), "v"); !errors.Is(err, attach.ErrBusy) {
		r.Errorf("detach: %v, want %v", err, attach.ErrBusy)
	}
	if err := os.WriteFile(dir+"/file", r.bytes(mebibyte), 0o600); err != nil {
		r.Errorf("write to the busy filesystem: %v", err)
	}
	if err := unix.Unmount(dir, 0); err != nil {
		r.Errorf("unmount: %v", err)
	}
	r.detach("v", b)
}

func leftAndClaimed(r *rig) {
	b := NewBackend(r, deviceSize)
	dir := r.mount(r.attach("v", b))
	if err := r.a.Close(); err != nil {
		r.Fatalf("close: %v", err)
	}
	b.Retire()
	r.a = r.start(owner)
	if err := r.a.Detach(r.Context(), "v"); !errors.Is(err, attach.ErrBusy) {
		r.Errorf("detach: %v, want %v", err, attach.ErrBusy)
	}
	if got := r.list(r.Context(), r.a)["v"]; got.VolumeID == "" || got.Served {
		r.Errorf("listed %+v, want a device that is not served", got)
	}
	// The filesystem has lost its device for good: only a lazy unmount does not wait for it.
	if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
		r.Errorf("unmount: %v", err)
	}
	if err := r.a.Detach(r.Context(), "v"); err != nil {
		r.Errorf("detach: %v", err)
	}
}

func noMixing(r *rig) {
	const volumes = 4
	var backends [volumes]*Backend
	var written [volumes][]byte
	for i := range volumes {
		backends[i] = NewBackend(r, deviceSize)
		d := r.attach(string(rune('a'+i)), backends[i])
		written[i] = r.direct(mebibyte)
		fd := r.open(d.Path, unix.O_RDWR|unix.O_DIRECT)
		r.pwrite(fd, written[i], 0)
		r.close(fd)
	}
	for i := range volumes {
		r.detach(string(rune('a'+i)), backends[i])
		r.same(backends[i].Bytes(0, mebibyte), written[i], "backend "+string(rune('a'+i)))
	}
}

func outlivesContext(r *rig) {
	ctx, cancel := context.WithCancel(r.Context())
	b := NewBackend(r, deviceSize)
	d, err := r.a.Attach(ctx, attach.Request{VolumeID: "v", Backend: b})
	cancel()
	if err != nil {
		r.Fatalf("attach: %v", err)
	}
	fd := r.open(d.Path, unix.O_RDWR|unix.O_DIRECT)
	p := r.direct(4096)
	r.pwrite(fd, p, 0)
	r.same(b.Bytes(0, 4096), p, "the backend")
	r.close(fd)
	r.detach("v", b)
}

func gone(r *rig) {
	b := NewBackend(r, deviceSize)
	d := r.attach("v", b)
	fd := r.open(d.Path, unix.O_RDWR)
	secret, got := r.bytes(4096), make([]byte, 4096)
	r.pwrite(fd, secret, 0)
	r.close(fd)
	r.detach("v", b)
	fd, err := unix.Open(d.Path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return // no such device any more
	}
	// It has no data any more, or others have made it theirs.
	if n, err := unix.Pread(fd, got, 0); bytes.Equal(got, secret) {
		r.Errorf("read %d bytes (%v) of the volume from its detached device", n, err)
	}
	r.close(fd)
}

func detachRace(r *rig) {
	b := NewBackend(r, deviceSize)
	r.attach("v", b)
	var (
		group     sync.WaitGroup
		succeeded atomic.Int32
	)
	for range 8 {
		group.Go(func() {
			switch err := r.a.Detach(r.Context(), "v"); {
			case err == nil:
				succeeded.Add(1)
			case !errors.Is(err, attach.ErrBusy):
				r.Errorf("detach: %v", err)
			}
		})
	}
	group.Wait()
	if succeeded.Load() == 0 {
		r.Error("no detach succeeded")
	}
	b.Retire()
	if got := r.list(r.Context(), r.a); len(got) != 0 {
		r.Errorf("listed %+v", got)
	}
}
