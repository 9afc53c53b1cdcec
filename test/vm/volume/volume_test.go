package volume_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"
	"k8s.io/klog/v2/ktesting"

	"github.com/qcow-csi/qcow-csi/driver/attach"
	"github.com/qcow-csi/qcow-csi/driver/attach/fuse"
	"github.com/qcow-csi/qcow-csi/driver/attach/nbd"
	"github.com/qcow-csi/qcow-csi/nbdexport"
	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/check"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/require"
)

var (
	attacherName = flag.String("attacher", attach.Auto, "attacher to test: auto, nbd or fuse")
	directory    = flag.String("directory", "", "directory for images; a temporary one by default")
)

const (
	mebibyte = 1 << 20
	small    = 384 * mebibyte // no filesystem here needs more
	large    = 768 * mebibyte
)

// filesystem is how to make one and make it grow.
type filesystem struct {
	name string
	mkfs []string // with the device as a further argument
	grow func(device, target string) []string
}

var filesystems = []filesystem{
	{"ext4", []string{"mkfs.ext4", "-q"}, func(device, _ string) []string { return []string{"resize2fs", device} }},
	{"xfs", []string{"mkfs.xfs", "-q"}, func(_, target string) []string { return []string{"xfs_growfs", target} }},
	{"btrfs", []string{"mkfs.btrfs", "-q"}, func(_, target string) []string { return []string{"btrfs", "filesystem", "resize", "max", target} }},
}

// volume is one under test: an image and, while it is staged, a device and a mount.
type volume struct {
	*testing.T
	ctx      context.Context
	attacher attach.Attacher
	random   *rand.Rand
	path     string // of the image
	target   string // of the mount
	image    *qcow.Image
	device   attach.Device
}

func newVolume(t *testing.T) *volume {
	require.Root(t)
	require.Tool(t, "qemu-img")
	ctx := klog.NewContext(t.Context(), ktesting.NewLogger(t, ktesting.DefaultConfig))
	owner := fmt.Sprintf("volume_test-%d", os.Getpid()) // not the one of other runs on this node
	attacher, reason, err := attach.Select(ctx, *attacherName, nbd.New(nbd.Options{Owner: owner}), fuse.New(fuse.Options{Owner: owner}))
	require.Feature(t, err == nil, fmt.Sprintf("needs a kernel with NBD, or with FUSE and loop devices: %v", err))
	seed := uint64(time.Now().UnixNano())
	t.Logf("attacher %s: %s; seed %d", attacher.Name(), reason, seed)
	dir := *directory
	if dir == "" {
		dir = t.TempDir()
	}
	v := &volume{
		T: t, ctx: ctx, attacher: attacher, random: rand.New(rand.NewPCG(seed, 0)),
		path: filepath.Join(dir, "volume.qcow2"), target: t.TempDir(),
	}
	t.Cleanup(v.cleanUp)
	f, err := storage.Create(v.path)
	v.must(err)
	v.must(qcow.Create(f, qcow.CreateOptions{Size: small}))
	v.must(f.Close())
	return v
}

// cleanUp takes away what a failed test left.
func (v *volume) cleanUp() {
	ctx := context.WithoutCancel(v.ctx)
	if v.image != nil {
		_ = unix.Unmount(v.target, unix.MNT_DETACH)
		if err := v.attacher.Detach(ctx, "v"); err != nil {
			v.Error(err)
		}
		if err := v.image.Close(); err != nil {
			v.Error(err)
		}
	}
	if left, err := v.attacher.List(ctx); len(left) > 0 || err != nil {
		v.Errorf("left: %+v, %v", left, err)
	}
	if err := errors.Join(v.attacher.Close(), os.Remove(v.path)); err != nil {
		v.Error(err)
	}
}

func (v *volume) must(err error) {
	v.Helper()
	if err != nil {
		v.Fatal(err)
	}
}

func (v *volume) run(argv ...string) {
	v.Helper()
	if out, err := exec.CommandContext(v.ctx, argv[0], argv[1:]...).CombinedOutput(); err != nil {
		v.Fatalf("%v: %v\n%s", argv, err, out)
	}
}

// attach opens the image and makes a device of it.
func (v *volume) attach() {
	v.Helper()
	f, err := storage.Open(v.path, storage.ReadWrite)
	v.must(err)
	image, err := qcow.Open(f, qcow.Options{})
	if err != nil {
		v.must(errors.Join(err, f.Close()))
	}
	v.image = image
	v.device, err = v.attacher.Attach(v.ctx, attach.Request{VolumeID: "v", Backend: nbdexport.NewImageBackend(image, nbdexport.ImageOptions{})})
	v.must(err)
}

// detach removes the device and closes the image, which is then clean for everybody.
func (v *volume) detach() {
	v.Helper()
	v.must(v.attacher.Detach(v.ctx, "v"))
	v.must(v.image.Close())
	v.image = nil
	v.run("qemu-img", "check", "-q", v.path)
	f, err := storage.Open(v.path, storage.ReadOnly)
	v.must(err)
	report, err := check.Check(v.ctx, f, check.Options{})
	v.must(errors.Join(err, f.Close()))
	if !report.Clean() {
		v.Errorf("the image is not clean: %+v", report.Findings)
	}
}

func (v *volume) mount(fs string) {
	v.Helper()
	v.must(unix.Mount(v.device.Path, v.target, fs, unix.MS_NOATIME, ""))
}

func (v *volume) unmount() {
	v.Helper()
	v.must(unix.Unmount(v.target, 0))
}

// write fills a file with random bytes, and returns their checksum.
func (v *volume) write(name string, size int64) (sum [sha256.Size]byte, err error) {
	f, err := os.Create(filepath.Join(v.target, name))
	if err != nil {
		return sum, err
	}
	var seed [32]byte
	for i := range seed {
		seed[i] = byte(v.random.Uint32())
	}
	hash := sha256.New()
	_, err = io.CopyN(io.MultiWriter(f, hash), rand.NewChaCha8(seed), size)
	return [sha256.Size]byte(hash.Sum(nil)), errors.Join(err, f.Sync(), f.Close())
}

// fill is write where it must work.
func (v *volume) fill(name string, size int64) [sha256.Size]byte {
	v.Helper()
	sum, err := v.write(name, size)
	v.must(err)
	return sum
}

func (v *volume) verify(name string, want [sha256.Size]byte) {
	v.Helper()
	f, err := os.Open(filepath.Join(v.target, name))
	v.must(err)
	hash := sha256.New()
	_, err = io.Copy(hash, f)
	v.must(errors.Join(err, f.Close()))
	if !bytes.Equal(hash.Sum(nil), want[:]) {
		v.Errorf("%s has changed", name)
	}
}

// capacity is the size of the mounted filesystem in bytes.
func (v *volume) capacity() int64 {
	v.Helper()
	var st unix.Statfs_t
	v.must(unix.Statfs(v.target, &st))
	return int64(st.Blocks) * st.Bsize
}

// stored is what the image takes of its filesystem, in bytes.
func (v *volume) stored() int64 {
	v.Helper()
	st, err := os.Stat(v.path)
	v.must(err)
	return st.Sys().(*syscall.Stat_t).Blocks * 512
}

// grow makes image, device and filesystem larger, while a file is being written.
func (v *volume) grow(fs filesystem) {
	v.Helper()
	const name = "while growing"
	var (
		group sync.WaitGroup
		sum   [sha256.Size]byte
		err   error
	)
	group.Go(func() { sum, err = v.write(name, 48*mebibyte) })
	defer group.Wait()
	before := v.capacity()
	v.must(v.image.Resize(v.ctx, large))
	v.must(v.attacher.Resize(v.ctx, "v", large))
	if fs.name == "ext4" && !v.mayGrowExt4() {
		v.Log("no CAP_SYS_RESOURCE: ext4 is not grown here")
	} else {
		v.run(fs.grow(v.device.Path, v.target)...)
		if gained := v.capacity() - before; gained < (large-small)*9/10 {
			v.Errorf("the filesystem has grown by %d bytes, the volume by %d", gained, large-small)
		}
	}
	group.Wait()
	v.must(err)
	v.verify(name, sum)
	v.must(os.Remove(filepath.Join(v.target, name)))
}

// mayGrowExt4 tells whether this process has the one right that growing takes beyond what mounting does.
func (v *volume) mayGrowExt4() bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var have [2]unix.CapUserData
	v.must(unix.Capget(&header, &have[0]))
	return have[0].Effective&(1<<unix.CAP_SYS_RESOURCE) != 0
}

// TestLife takes a volume through its life: it is made, formatted, filled, grown while it is written, trimmed, and put
// away; and then taken out again.
func TestLife(t *testing.T) {
	for _, fs := range filesystems {
		t.Run(fs.name, func(t *testing.T) {
			require.Tool(t, fs.mkfs[0], fs.grow("", "")[0], "fstrim")
			v := newVolume(t)
			v.attach()
			v.run(append(fs.mkfs, v.device.Path)...)
			v.mount(fs.name)
			first := v.fill("first", 8*mebibyte)
			v.grow(fs)
			v.verify("first", first)
			second := v.fill("second", 4*mebibyte)
			v.trim(fs)
			v.verify("second", second)
			v.unmount()
			v.detach()

			v.attach()
			if v.device.Size != large {
				t.Errorf("the device is %d bytes long, want %d", v.device.Size, large)
			}
			v.mount(fs.name)
			v.verify("first", first)
			v.verify("second", second)
			v.unmount()
			v.detach()
		})
	}
}

// trim deletes a file and has the filesystem say which blocks it does not need. The image gives their space back.
func (v *volume) trim(fs filesystem) {
	v.Helper()
	const size = 64 * mebibyte
	v.fill("big", size)
	v.must(os.Remove(filepath.Join(v.target, "big")))
	// What a file had becomes free in the background; unmounting waits for that.
	v.unmount()
	v.mount(fs.name)
	before := v.stored()
	v.run("fstrim", v.target)
	// The engine gives clusters back once it is durable that nothing refers to them.
	v.must(v.image.Flush())
	v.Logf("the image takes %d MiB, after trimming %d MiB", before/mebibyte, v.stored()/mebibyte)
	if gained := before - v.stored(); gained < size*3/4 {
		v.Errorf("trimming %d bytes gave %d back", size, gained)
	}
}

// TestVerifiedLoad has fio write a device at random, with flushes in between, from many sides, and read it again.
func TestVerifiedLoad(t *testing.T) {
	require.Tool(t, "fio")
	v := newVolume(t)
	v.attach()
	v.run("fio", "--name=load", "--filename="+v.device.Path, "--size=24M", "--rw=randwrite", "--bsrange=512-64k", "--blockalign=512",
		"--ioengine=libaio", "--iodepth=16", "--direct=1", "--fsync=64", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0",
		fmt.Sprintf("--randseed=%d", v.random.Uint32()))
	v.detach()
}
