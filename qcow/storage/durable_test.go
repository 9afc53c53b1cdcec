package storage

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/qcow-csi/qcow-csi/test/require"
)

// disk is a file system in a file, which can lose its power.
type disk struct {
	t                *testing.T
	backing, mounted string
}

// newDisk makes a file system with the command mkfs, and mounts it until the test ends.
func newDisk(t *testing.T, mkfs ...string) *disk {
	t.Helper()
	require.Root(t)
	require.Tool(t, mkfs[0], "mount", "umount")
	_, err := os.Stat("/dev/loop-control")
	require.Feature(t, err == nil, "needs loop devices")
	dir := t.TempDir()
	d := &disk{t: t, backing: filepath.Join(dir, "disk"), mounted: filepath.Join(dir, "mnt")}
	mustDo(t, os.WriteFile(d.backing, nil, 0o600), os.Truncate(d.backing, 320<<20), os.Mkdir(d.mounted, 0o700)) // xfs is never smaller than 300 MiB
	d.run(append(mkfs, d.backing)...)
	out, err := exec.Command("mount", "-o", "loop", d.backing, d.mounted).CombinedOutput()
	require.Feature(t, err == nil, "needs to mount loop devices: "+string(out))
	t.Cleanup(func() {
		if t.Failed() { // perhaps with files open
			d.run("umount", "--lazy", d.mounted)
			return
		}
		d.unmount()
	})
	return d
}

func (d *disk) run(command ...string) {
	d.t.Helper()
	if out, err := exec.Command(command[0], command[1:]...).CombinedOutput(); err != nil {
		d.t.Fatalf("%q: %v: %s", command, err, out)
	}
}

func (d *disk) mount()   { d.t.Helper(); d.run("mount", "-o", "loop", d.backing, d.mounted) }
func (d *disk) unmount() { d.t.Helper(); d.run("umount", d.mounted) }

// losePower stops the file system where it is. What it has not yet written is gone, its journal too; then it recovers.
func (d *disk) losePower() {
	d.t.Helper()
	const shutdown, withoutLog = 0x8004587d, 2 // FS_IOC_SHUTDOWN
	dir, err := os.Open(d.mounted)
	mustDo(d.t, err)
	how := uint32(withoutLog)
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, dir.Fd(), shutdown, uintptr(unsafe.Pointer(&how)))
	mustDo(d.t, dir.Close())
	if errno != 0 {
		d.t.Fatalf("shut the file system down: %v", errno)
	}
	if err := os.WriteFile(filepath.Join(d.mounted, "late"), nil, 0o600); !errors.Is(err, unix.EIO) {
		d.t.Fatalf("the file system still works: %v", err)
	}
	d.unmount()
	d.mount()
}

// create makes a file whose creation is durable.
func (d *disk) create(name string, o Options) *OSFile {
	d.t.Helper()
	o.Create = true
	f, err := OpenWith(filepath.Join(d.mounted, name), o)
	require.Feature(d.t, !errors.Is(err, ErrUnsupported), "needs loop devices with direct I/O")
	mustDo(d.t, err)
	dir, err := os.Open(d.mounted)
	mustDo(d.t, err, dir.Sync(), dir.Close(), f.Sync())
	return f
}

func (d *disk) expect(name string, want []byte) {
	d.t.Helper()
	f, err := Open(filepath.Join(d.mounted, name), ReadOnly)
	mustDo(d.t, err)
	defer closeFile(d.t, f)
	expectContent(d.t, f, want)
}

// What File promises to be durable is so, on file systems that keep as much as they can in memory.
func TestDurable(t *testing.T) {
	const n = 64 << 10
	for name, mkfs := range map[string][]string{
		"ext4": {"mkfs.ext4", "-q"},
		"xfs":  {"mkfs.xfs", "-q"},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDisk(t, mkfs...)
			for kind, o := range map[string]Options{"buffered": {}, "direct": {Direct: true}} {
				t.Run(kind, func(t *testing.T) {
					d := &disk{t: t, backing: d.backing, mounted: d.mounted}
					data := AlignedBuffer(n, 4096)
					copy(data, bytes.Repeat([]byte("0123456789abcdef"), n/16))
					write := func(f *OSFile, off int64, do func([]byte, int64) (int, error)) {
						t.Helper()
						if k, err := do(data, off); k != n || err != nil {
							t.Fatalf("write to %s: %d, %v", f.f.Name(), k, err)
						}
					}
					// Written synchronously: at the end, in allocated space, in a hole. The last one is changed in all ways and synced.
					grown, allocated, old, synced := d.create(kind+"1", o), d.create(kind+"2", o), d.create(kind+"3", o), d.create(kind+"4", o)
					mustDo(t, allocated.Allocate(0, 2*n))
					mustDo(t, old.Truncate(n), old.Sync())
					write(grown, n, grown.WriteAt)
					write(grown, 0, grown.WriteSync)
					write(allocated, n, allocated.WriteSync)
					write(old, 0, old.WriteSync)
					if k, err := old.WriteSync([]byte("end"), n); k != 3 || err != nil { // never direct
						t.Fatalf("%d, %v", k, err)
					}
					write(synced, 0, synced.WriteAt)
					write(synced, n, synced.WriteAt)
					mustDo(t, synced.PunchHole(0, n/2), synced.Truncate(n+n/2), synced.Allocate(n, n), synced.Sync())
					for _, f := range []*OSFile{grown, allocated, old, synced} {
						closeFile(t, f)
					}
					d.losePower()

					zeroes := make([]byte, n)
					d.expect(kind+"2", append(bytes.Clone(zeroes), data...))
					d.expect(kind+"3", append(bytes.Clone(data), "end"...))
					want := append(append(bytes.Clone(zeroes[:n/2]), data[n/2:]...), data[:n/2]...)
					d.expect(kind+"4", append(want, zeroes[:n/2]...))
					f, err := Open(filepath.Join(d.mounted, kind+"1"), ReadOnly)
					mustDo(t, err)
					defer closeFile(t, f)
					got := make([]byte, n)
					if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, data) {
						t.Errorf("a synchronous write that grew the file is lost: %v", err)
					}
				})
			}
		})
	}
}

// ext2 keeps no record of space that is reserved and not written.
func TestAllocateUnsupported(t *testing.T) {
	d := newDisk(t, "mkfs.ext2", "-q")
	f := d.create("file", Options{})
	defer closeFile(t, f)
	mustWrite(t, f, []byte("abc"), 0)
	if err := f.Allocate(0, 1<<20); !errors.Is(err, ErrUnsupported) || !errors.Is(err, unix.EOPNOTSUPP) {
		t.Errorf("%v; want ErrUnsupported", err)
	}
	expectContent(t, f, []byte("abc"))
	mustDo(t, f.Truncate(1<<20), f.PunchHole(1, 1<<19)) // it has holes
	if n, err := f.WriteSync([]byte("x"), 5); n != 1 || err != nil {
		t.Errorf("synchronous write: %d, %v", n, err)
	}
}
