package mount_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/qcow-csi/qcow-csi/driver/mount"
	"github.com/qcow-csi/qcow-csi/driver/mount/mounttest"
	"github.com/qcow-csi/qcow-csi/test/require"
)

var ext4 = mount.Filesystem{Type: "ext4"}

// requireHost skips the test where Host cannot work.
func requireHost(t *testing.T) {
	t.Helper()
	require.Root(t)
	require.Tool(t, "mount", "umount", "blkid", "mkfs.ext4", "resize2fs", "mkfs.xfs", "xfs_growfs", "mkfs.btrfs", "btrfs")
}

func TestConformance(t *testing.T) {
	requireHost(t)
	mounttest.Run(t, func(t *testing.T) mounttest.Env {
		loops := map[string]*loop{}
		return mounttest.Env{
			Mounter: mount.New(),
			NewDevice: func(t *testing.T, size int64) string {
				l := newLoop(t, size)
				loops[l.path] = l
				return l.path
			},
			GrowDevice: func(t *testing.T, device string, size int64) { loops[device].resize(t, size) },
			Scribble:   func(t *testing.T, device string) { loops[device].write(t, []byte("scribble"), 4096) },
			NewBrokenDevice: func(t *testing.T, size int64) string {
				d := newFaultyDisk(t, size)
				d.onRead(failFrom(0))
				return d.path
			},
			CannotGrow: cannotGrow(t),
		}
	})
}

// cannotGrow is ext4 where this process lacks the capability, as root in a container may. TestInGuest makes up for it.
func cannotGrow(t *testing.T) []string {
	t.Helper()
	have := make([]unix.CapUserData, 2)
	noError(t, unix.Capget(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &have[0]))
	if have[0].Effective&(1<<unix.CAP_SYS_RESOURCE) == 0 {
		t.Log("no CAP_SYS_RESOURCE: ext4 is not grown here")
		return []string{"ext4"}
	}
	return nil
}

// mounted returns a device with a filesystem, mounted.
func mounted(t *testing.T, fsType string) (l *loop, target string) {
	t.Helper()
	requireHost(t)
	filesystem := mount.Filesystem{Type: fsType}
	l = newLoop(t, mounttest.Sizes[fsType])
	target = filepath.Join(t.TempDir(), "staged")
	noError(t, mount.New().Format(t.Context(), l.path, filesystem, true))
	noError(t, mount.New().Mount(t.Context(), l.path, target, filesystem))
	unmountLater(t, target)
	return l, target
}

func unmountLater(t *testing.T, target string) {
	t.Cleanup(func() {
		if err := mount.New().Unmount(context.Background(), target); err != nil {
			t.Errorf("cleanup: %v", err)
		}
	})
}

func noError(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestReadOnlyBindRefusesWrites(t *testing.T) {
	_, staged := mounted(t, "ext4")
	host := mount.New()
	file := filepath.Join(staged, "file")
	noError(t, os.WriteFile(file, []byte("before"), 0o600))

	// Flags of the source are kept.
	nosuid := filepath.Join(t.TempDir(), "nosuid")
	noError(t, host.Bind(t.Context(), staged, nosuid, false))
	unmountLater(t, nosuid)
	noError(t, unix.Mount("", nosuid, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOATIME, ""))

	published := filepath.Join(t.TempDir(), "published")
	noError(t, host.Bind(t.Context(), nosuid, published, true))
	unmountLater(t, published)
	err := os.WriteFile(filepath.Join(published, "file"), []byte("after"), 0o600)
	if !errors.Is(err, syscall.EROFS) {
		t.Errorf("write: %v", err)
	}
	if err := os.Remove(filepath.Join(published, "file")); !errors.Is(err, syscall.EROFS) {
		t.Errorf("remove: %v", err)
	}
	mounts, err := host.Mounts(t.Context(), published)
	noError(t, err)
	options := strings.Join(mounts[0].Options, ",")
	for _, option := range []string{"ro", "nosuid", "nodev", "noatime"} {
		if !strings.Contains(options, option) {
			t.Errorf("option %s is lost: %s", option, options)
		}
	}

	// The other mounts of the filesystem stay as they are.
	noError(t, os.WriteFile(file, []byte("written"), 0o600))
	text, err := os.ReadFile(filepath.Join(published, "file"))
	if err != nil || string(text) != "written" {
		t.Errorf("read through the read-only mount: %q, %v", text, err)
	}
}

func TestUnmountStack(t *testing.T) {
	_, staged := mounted(t, "ext4")
	target := filepath.Join(t.TempDir(), "published")
	noError(t, mount.New().Bind(t.Context(), staged, target, false))
	unmountLater(t, target)
	for range 3 {
		noError(t, unix.Mount(staged, target, "", unix.MS_BIND, ""))
	}
	noError(t, unix.Mount("", target, "tmpfs", 0, "")) // without a source, too
	mounts, err := mount.New().Mounts(t.Context(), target)
	noError(t, err)
	if len(mounts) != 5 || mounts[4].Type != "tmpfs" || mounts[0].Type != "ext4" {
		t.Fatalf("mounts: %+v", mounts)
	}
	noError(t, mount.New().Unmount(t.Context(), target))
	if _, err := os.Lstat(target); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("target: %v", err)
	}
}

// A FUSE mount whose server is gone answers ENOTCONN to everything.
func TestUnmountOfDeadMount(t *testing.T) {
	require.Root(t)
	target := t.TempDir()
	device, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	require.Feature(t, err == nil, "needs FUSE")
	noError(t, unix.Mount("dead", target, "fuse", 0, "fd="+itoa(device.Fd())+",rootmode=40000,user_id=0,group_id=0"))
	noError(t, device.Close())
	host := mount.New()
	unmountLater(t, target)
	if _, err := os.Stat(target); !errors.Is(err, syscall.ENOTCONN) {
		t.Fatalf("the mount is not dead: %v", err)
	}

	mounts, err := host.Mounts(t.Context(), target)
	if err != nil || len(mounts) != 1 {
		t.Errorf("mounts: %+v, %v", mounts, err)
	}
	err = host.Bind(t.Context(), t.TempDir(), target, false)
	if !errors.Is(err, mount.ErrBusy) || !errors.Is(err, syscall.ENOTCONN) {
		t.Errorf("Bind: %v", err)
	}
	noError(t, host.Unmount(t.Context(), target))
	if _, err := os.Lstat(target); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("target: %v", err)
	}
}

func TestUnmountOfBusyMount(t *testing.T) {
	_, staged := mounted(t, "ext4")
	file, err := os.Create(filepath.Join(staged, "file"))
	noError(t, err)
	if err := mount.New().Unmount(t.Context(), staged); !errors.Is(err, mount.ErrBusy) {
		t.Errorf("with an open file: %v", err)
	}
	noError(t, file.Close())
	noError(t, mount.New().Unmount(t.Context(), staged))
}

// mount(8) would fall back to read-only, with exit code 0.
func TestMountOfProtectedDevice(t *testing.T) {
	requireHost(t)
	l := newLoop(t, 32<<20)
	host := mount.New()
	noError(t, host.Format(t.Context(), l.path, ext4, true))
	protected := attachLoop(t, l.backing, unix.LO_FLAGS_READ_ONLY)
	target := filepath.Join(t.TempDir(), "staged")
	unmountLater(t, target)
	if err := host.Mount(t.Context(), protected.path, target, ext4); err == nil {
		t.Error("mounted a device that refuses writes writable")
	}
	if _, err := os.Lstat(target); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a target is left behind: %v", err)
	}
	noError(t, host.Mount(t.Context(), protected.path, target, mount.Filesystem{Type: "ext4", Options: []string{"ro"}}))
}

func TestGrowKeepsData(t *testing.T) {
	requireHost(t)
	check := map[string]string{"ext4": "e2fsck -fn", "xfs": "xfs_repair -n", "btrfs": "btrfs check"}
	for fsType, size := range mounttest.Sizes {
		if slices.Contains(cannotGrow(t), fsType) {
			continue
		}
		t.Run(fsType, func(t *testing.T) {
			l, staged := mounted(t, fsType)
			data := bytes.Repeat([]byte("qcow-csi"), 1<<19)
			noError(t, os.WriteFile(filepath.Join(staged, "file"), data, 0o600))
			l.resize(t, 2*size)
			noError(t, mount.New().Grow(t.Context(), l.path, staged))
			noError(t, mount.New().Unmount(t.Context(), staged))
			argv := strings.Fields(check[fsType] + " " + l.path)
			if out, err := exec.CommandContext(t.Context(), argv[0], argv[1:]...).CombinedOutput(); err != nil {
				t.Errorf("%q: %v\n%s", argv, err, out)
			}
			noError(t, mount.New().Mount(t.Context(), l.path, staged, mount.Filesystem{Type: fsType}))
			got, err := os.ReadFile(filepath.Join(staged, "file"))
			if err != nil || !bytes.Equal(got, data) {
				t.Errorf("%d bytes, equal %t, %v", len(got), bytes.Equal(got, data), err)
			}
		})
	}
}

// A fresh ext4 costs a thin image its metadata, not inode tables and journal full of zeroes.
func TestFreshFormatIsThin(t *testing.T) {
	requireHost(t)
	for _, fresh := range []bool{true, false} {
		l := newLoop(t, 4<<30)
		noError(t, mount.New().Format(t.Context(), l.path, ext4, fresh))
		var stat unix.Stat_t
		noError(t, unix.Stat(l.backing, &stat))
		allocated := stat.Blocks * 512
		t.Logf("4 GiB ext4, fresh %t: %d KiB allocated", fresh, allocated>>10)
		if fresh && allocated > 8<<20 {
			t.Errorf("%d bytes allocated", allocated)
		}
	}
}

// e2fsprogs before 1.47.0 refuses the option that says that the device is zeroed.
func TestFormatWithOldMke2fs(t *testing.T) {
	requireHost(t)
	l := newLoop(t, 16<<20)
	program, err := exec.LookPath("mkfs.ext4")
	noError(t, err)
	bin := t.TempDir()
	script := "#!/bin/sh\n" +
		"case \"$*\" in *prezeroed*) echo 'Bad option(s) specified: assume_storage_prezeroed' >&2; exit 1;; esac\n" +
		"exec " + program + " \"$@\"\n"
	noError(t, os.WriteFile(filepath.Join(bin, "mkfs.ext4"), []byte(script), 0o700))
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	noError(t, mount.New().Format(t.Context(), l.path, ext4, true))
	content, err := mount.New().Probe(t.Context(), l.path)
	if err != nil || content.Type != "ext4" {
		t.Errorf("content %+v, %v", content, err)
	}
}

// As long as another program holds the device, an mkfs that a plugin before this one started, say, nothing is written.
func TestFormatOfHeldDevice(t *testing.T) {
	requireHost(t)
	l := newLoop(t, mounttest.Sizes["xfs"])
	before := contentOf(t, l)
	held, err := os.OpenFile(l.path, os.O_RDWR|unix.O_EXCL, 0)
	noError(t, err)
	for fsType := range mounttest.Sizes {
		for _, fresh := range []bool{true, false} {
			err := mount.New().Format(t.Context(), l.path, mount.Filesystem{Type: fsType}, fresh)
			if !errors.Is(err, mount.ErrBusy) {
				t.Errorf("%s, fresh %t: %v", fsType, fresh, err)
			}
		}
	}
	// The programs would have refused as well, which closes the gap between the look and the start.
	for _, argv := range [][]string{{"mkfs.ext4", "-F", l.path}, {"mkfs.xfs", "-f", l.path}, {"mkfs.btrfs", "-f", l.path}} {
		if out, err := exec.CommandContext(t.Context(), argv[0], argv[1:]...).CombinedOutput(); err == nil {
			t.Errorf("%q succeeded: %s", argv, out)
		}
	}
	if contentOf(t, l) != before {
		t.Error("the device was written to")
	}
	noError(t, held.Close())
	noError(t, mount.New().Format(t.Context(), l.path, ext4, true))
}

func TestProbeContents(t *testing.T) {
	requireHost(t)
	host := mount.New()

	t.Run("partition table", func(t *testing.T) {
		l := newLoop(t, 16<<20)
		sector := make([]byte, 512)
		copy(sector[446:], []byte{0, 0, 2, 0, 0x83, 1, 1, 1, 0, 8, 0, 0, 0, 0x40, 0, 0}) // one partition
		copy(sector[510:], []byte{0x55, 0xaa})
		l.write(t, sector, 0)
		content, err := host.Probe(t.Context(), l.path)
		if want := (mount.Content{Type: "partition-table:dos"}); err != nil || content != want {
			t.Errorf("content %+v, %v", content, err)
		}
	})
	t.Run("two filesystems", func(t *testing.T) {
		first := newLoop(t, mounttest.Sizes["btrfs"])
		noError(t, host.Format(t.Context(), first.path, mount.Filesystem{Type: "btrfs"}, true))
		superblock := make([]byte, 4096)
		_, err := first.f.ReadAt(superblock, 64<<10)
		noError(t, err)
		second := newLoop(t, mounttest.Sizes["btrfs"])
		noError(t, host.Format(t.Context(), second.path, ext4, true))
		second.write(t, superblock, 64<<10)
		content, err := host.Probe(t.Context(), second.path)
		if !errors.Is(err, mount.ErrUnreadable) || content != (mount.Content{}) {
			t.Errorf("content %+v, %v", content, err)
		}
	})
	t.Run("label like output", func(t *testing.T) {
		l := newLoop(t, 16<<20)
		noError(t, exec.CommandContext(t.Context(), "mkfs.ext4", "-q", "-L", "x\nTYPE=xfs\n", l.path).Run())
		content, err := host.Probe(t.Context(), l.path)
		if want := (mount.Content{Type: "ext4"}); err != nil || content != want {
			t.Errorf("content %+v, %v", content, err)
		}
	})
	t.Run("only a backup superblock left", func(t *testing.T) {
		l := newLoop(t, 256<<20)
		noError(t, host.Format(t.Context(), l.path, ext4, true))
		for off := int64(0); off < 128<<20; off += 1 << 20 {
			l.write(t, make([]byte, 1<<20), off)
		}
		content, err := host.Probe(t.Context(), l.path)
		if err != nil || content != (mount.Content{}) {
			t.Errorf("content %+v, %v", content, err)
		}
	})
	t.Run("not a block device", func(t *testing.T) {
		for _, path := range []string{"/dev/null", t.TempDir(), "relative"} {
			if content, err := host.Probe(t.Context(), path); !errors.Is(err, mount.ErrInvalid) {
				t.Errorf("%s: %+v, %v", path, content, err)
			}
		}
	})
	t.Run("nothing attached", func(t *testing.T) {
		l := newLoop(t, 0)
		if content, err := host.Probe(t.Context(), l.path); !errors.Is(err, mount.ErrUnreadable) {
			t.Errorf("%+v, %v", content, err)
		}
	})
}
