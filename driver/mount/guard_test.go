package mount_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/qcow-csi/qcow-csi/driver/mount"
	"github.com/qcow-csi/qcow-csi/driver/mount/mountfake"
	"github.com/qcow-csi/qcow-csi/driver/mount/mounttest"
)

// volume is a mount.Guard in memory.
type volume struct {
	mu        sync.Mutex
	state     mount.FormatState
	allocated bool
	history   []mount.FormatState
	fail      func(step string) error
}

func (v *volume) step(name string) error {
	if v.fail == nil {
		return nil
	}
	return v.fail(name)
}

func (v *volume) Record(context.Context) (mount.FormatState, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.state, v.step("Record")
}

func (v *volume) SetRecord(_ context.Context, s mount.FormatState) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if err := v.step("SetRecord " + string(s.Phase)); err != nil {
		return err
	}
	v.state = s
	v.history = append(v.history, s)
	return nil
}

func (v *volume) EverAllocated(context.Context) (bool, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.allocated, v.step("EverAllocated")
}

// records are all records that a volume can have, for which ext4 is asked.
var records = []mount.FormatState{
	{},
	{Phase: mount.NeverFormatted},
	{Phase: mount.Formatting, Type: "ext4"},
	{Phase: mount.Formatting, Type: "xfs"},
	{Phase: mount.Formatted, Type: "ext4"},
	{Phase: mount.Formatted, Type: "xfs"},
	{Phase: mount.RawBlock},
}

func contentOf(t *testing.T, l *loop) [sha256.Size]byte {
	t.Helper()
	f, err := os.Open(l.backing)
	noError(t, err)
	hash := sha256.New()
	_, err = io.Copy(hash, f)
	noError(t, err)
	noError(t, f.Close())
	return [sha256.Size]byte(hash.Sum(nil))
}

func itoa(n uintptr) string { return strconv.FormatUint(uint64(n), 10) }

func fakeDevice() (*mountfake.Mounter, string) {
	fake := mountfake.New()
	fake.AddDevice("/dev/fake0", 1<<30)
	return fake, "/dev/fake0"
}

func TestEnsureFilesystemFormatsOnce(t *testing.T) {
	fake, device := fakeDevice()
	v := &volume{state: mount.FormatState{Phase: mount.NeverFormatted}}
	noError(t, mount.EnsureFilesystem(t.Context(), fake, device, ext4, v))
	v.allocated = true
	for range 2 {
		noError(t, mount.EnsureFilesystem(t.Context(), fake, device, ext4, v))
	}
	want := []mount.FormatState{{Phase: mount.Formatting, Type: "ext4"}, {Phase: mount.Formatted, Type: "ext4"}}
	if len(v.history) != 2 || v.history[0] != want[0] || v.history[1] != want[1] {
		t.Errorf("records %v, want %v", v.history, want)
	}
	if n := len(fake.Calls("Format")); n != 1 {
		t.Errorf("%d mkfs", n)
	}
}

// Whatever is recorded, a device that cannot be read is not written to, and the record stays.
func TestEnsureFilesystemOfUnreadableDevice(t *testing.T) {
	for _, record := range records {
		fake, device := fakeDevice()
		fake.SetUnreadable(device, true)
		v := &volume{state: record}
		if err := mount.EnsureFilesystem(t.Context(), fake, device, ext4, v); !errors.Is(err, mount.ErrUnreadable) {
			t.Errorf("%v: %v", record, err)
		}
		if len(fake.Calls("Format")) > 0 || len(v.history) > 0 {
			t.Errorf("%v: formatted or recorded: %v", record, v.history)
		}
	}
}

// Any step may fail, or the plugin be killed there. Nothing is formatted that may not be, and the next attempt gets
// through.
func TestEnsureFilesystemResumesAfterEveryStep(t *testing.T) {
	boom := errors.New("boom")
	for _, step := range []string{
		"Record", "EverAllocated", "Probe", "SetRecord formatting", "Format", "second Probe", "SetRecord formatted",
	} {
		t.Run(step, func(t *testing.T) {
			fake, device := fakeDevice()
			v := &volume{state: mount.FormatState{Phase: mount.NeverFormatted}}
			v.fail = func(name string) error {
				if name == step {
					return boom
				}
				return nil
			}
			fake.SetHook(func(c mountfake.Call) error {
				if c.Op == step || c.Op == "Probe" && step == "second Probe" && len(fake.Calls("Probe")) == 2 {
					return boom
				}
				return nil
			})
			if err := mount.EnsureFilesystem(t.Context(), fake, device, ext4, v); !errors.Is(err, boom) {
				t.Fatalf("error %v", err)
			}
			early := step == "Record" || step == "EverAllocated" || step == "Probe" || step == "SetRecord formatting"
			if formats := len(fake.Calls("Format")); early && formats > 0 {
				t.Errorf("%d mkfs", formats)
			}
			v.allocated = !early // mkfs wrote something
			v.fail = nil
			fake.SetHook(nil)
			noError(t, mount.EnsureFilesystem(t.Context(), fake, device, ext4, v))
			if want := (mount.FormatState{Phase: mount.Formatted, Type: "ext4"}); v.state != want {
				t.Errorf("record %v, want %v", v.state, want)
			}
			if content, err := fake.Probe(t.Context(), device); err != nil || content.Type != "ext4" {
				t.Errorf("content %v, %v", content, err)
			}
		})
	}
}

func TestEnsureFilesystemAdopts(t *testing.T) {
	fake, device := fakeDevice()
	fake.SetContent(device, mount.Content{Type: "ext4"})
	v := &volume{state: mount.FormatState{Phase: mount.NeverFormatted}, allocated: true}
	noError(t, mount.EnsureFilesystem(t.Context(), fake, device, ext4, v))
	if want := (mount.FormatState{Phase: mount.Formatted, Type: "ext4"}); v.state != want {
		t.Errorf("record %v, want %v", v.state, want)
	}
	// From now on a device that shows nothing is an accident.
	fake.SetContent(device, mount.Content{Blank: true})
	if err := mount.EnsureFilesystem(t.Context(), fake, device, ext4, v); !errors.Is(err, mount.ErrInconsistent) {
		t.Errorf("error %v", err)
	}
	if n := len(fake.Calls("Format")); n != 0 {
		t.Errorf("%d mkfs", n)
	}
}

func TestEnsureRawBlockForbidsMkfs(t *testing.T) {
	fake, device := fakeDevice()
	v := &volume{state: mount.FormatState{Phase: mount.NeverFormatted}}
	for range 2 {
		noError(t, mount.EnsureRawBlock(t.Context(), v))
	}
	if len(v.history) != 1 || v.state.Phase != mount.RawBlock {
		t.Errorf("records %v", v.history)
	}
	if err := mount.EnsureFilesystem(t.Context(), fake, device, ext4, v); !errors.Is(err, mount.ErrNotBlank) {
		t.Errorf("error %v", err)
	}
	// The pod made a filesystem: it may be mounted, and the volume stays what it is.
	fake.SetContent(device, mount.Content{Type: "ext4"})
	noError(t, mount.EnsureFilesystem(t.Context(), fake, device, ext4, v))
	if v.state.Phase != mount.RawBlock || len(fake.Calls("Format")) != 0 {
		t.Errorf("record %v", v.state)
	}
	boom := errors.New("boom")
	for _, step := range []string{"Record", "SetRecord raw-block"} {
		v := &volume{fail: func(name string) error {
			if name == step {
				return boom
			}
			return nil
		}}
		if err := mount.EnsureRawBlock(t.Context(), v); !errors.Is(err, boom) {
			t.Errorf("%s: %v", step, err)
		}
	}
}

func TestEnsureFilesystemRefusesUnknownTypes(t *testing.T) {
	fake, device := fakeDevice()
	v := &volume{state: mount.FormatState{Phase: mount.NeverFormatted}}
	for _, fsType := range []string{"", "ntfs", "ext3"} {
		err := mount.EnsureFilesystem(t.Context(), fake, device, mount.Filesystem{Type: fsType}, v)
		if !errors.Is(err, mount.ErrInvalid) {
			t.Errorf("type %q: %v", fsType, err)
		}
	}
	if len(v.history) > 0 || len(fake.Calls("")) > 0 {
		t.Errorf("records %v, calls %v", v.history, fake.Calls(""))
	}
}

// Real devices that cannot be read, in whole, in part, or in a single block that counts. blkid takes most of them for
// blank.
func TestUnreadableDevicesAreNotFormatted(t *testing.T) {
	requireHost(t)
	const size = 256 << 20
	disk := newFaultyDisk(t, size)
	for name, fail := range map[string]func(off, n int64) error{
		"all":                   failFrom(0),
		"second half":           failFrom(size / 2),
		"end":                   failFrom(size - 4096),
		"first block":           failBlock(0),
		"btrfs superblock":      failBlock(64 << 10),
		"16th MiB":              failBlock(15 << 20),
		"btrfs copy":            failBlock(64 << 20),
		"ext4 backup":           failBlock(128 << 20),
		"16th MiB from the end": failBlock(size - 15<<20),
	} {
		t.Run(name, func(t *testing.T) {
			disk.onRead(fail)
			v := &volume{state: mount.FormatState{Phase: mount.NeverFormatted}}
			err := mount.EnsureFilesystem(t.Context(), mount.New(), disk.path, ext4, v)
			if !errors.Is(err, mount.ErrUnreadable) || len(v.history) > 0 {
				t.Errorf("error %v, records %v", err, v.history)
			}
		})
	}
	if n := disk.written(); n != 0 {
		t.Errorf("%d bytes were written", n)
	}
	disk.onRead(nil)
	content, err := mount.New().Probe(t.Context(), disk.path)
	if err != nil || !content.Blank {
		t.Errorf("healed: %+v, %v", content, err)
	}
}

// failFrom fails what reaches beyond bytes of the device.
func failFrom(bytes int64) func(off, n int64) error {
	return func(off, n int64) error {
		if off+n > bytes {
			return syscall.EIO
		}
		return nil
	}
}

// failBlock fails what touches the 4 KiB at offset.
func failBlock(offset int64) func(off, n int64) error {
	return func(off, n int64) error {
		if off < offset+4096 && offset < off+n {
			return syscall.EIO
		}
		return nil
	}
}

// Every refusal leaves every byte of a real device as it was.
func TestRefusedDevicesStayIdentical(t *testing.T) {
	requireHost(t)
	host := mount.New()
	xfs := mount.Filesystem{Type: "xfs"}
	for name, prepare := range map[string]func(t *testing.T, l *loop){
		"ext4":    func(t *testing.T, l *loop) { noError(t, host.Format(t.Context(), l.path, ext4, true)) },
		"xfs":     func(t *testing.T, l *loop) { noError(t, host.Format(t.Context(), l.path, xfs, true)) },
		"unknown": func(t *testing.T, l *loop) { l.write(t, []byte("precious"), 5<<20) },
		"blank":   func(*testing.T, *loop) {},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLoop(t, mounttest.Sizes["xfs"])
			prepare(t, l)
			before := contentOf(t, l)
			for _, record := range records {
				if record.Phase == mount.Formatting {
					continue // may format
				}
				v := &volume{state: record, allocated: true}
				err := mount.EnsureFilesystem(t.Context(), host, l.path, ext4, v)
				t.Logf("%v: %v", record, err)
				fine := name == "ext4" && (record.Type == "" || record.Type == "ext4")
				if (err == nil) != fine {
					t.Errorf("%v: %v", record, err)
				}
			}
			if contentOf(t, l) != before {
				t.Error("the device was written to")
			}
		})
	}
}

// mkfs stands still in the middle, its context ends, and the device loses what was under way: what is left is
// anything but a filesystem. The volume then gets one all the same.
func TestInterruptedMkfs(t *testing.T) {
	requireHost(t)
	for fsType, size := range mounttest.Sizes {
		t.Run(fsType, func(t *testing.T) {
			disk := newFaultyDisk(t, size)
			v := &volume{state: mount.FormatState{Phase: mount.NeverFormatted}}
			filesystem := mount.Filesystem{Type: fsType}
			ctx, cancel := context.WithCancel(t.Context())
			writes := 0
			disk.onWrite(func(off, _ int64) error { // one at a time
				if writes++; writes <= 2 {
					return nil
				}
				cancel()
				return syscall.EIO
			})
			err := mount.EnsureFilesystem(ctx, mount.New(), disk.path, filesystem, v)
			if !errors.Is(err, context.Canceled) {
				t.Fatalf("error %v after %d writes", err, writes)
			}
			if want := (mount.FormatState{Phase: mount.Formatting, Type: fsType}); v.state != want {
				t.Errorf("record %v, want %v", v.state, want)
			}
			disk.onWrite(nil)
			v.allocated = true
			noError(t, mount.EnsureFilesystem(t.Context(), mount.New(), disk.path, filesystem, v))
			if want := (mount.FormatState{Phase: mount.Formatted, Type: fsType}); v.state != want {
				t.Errorf("record %v, want %v", v.state, want)
			}
			target := t.TempDir()
			unmountLater(t, target)
			noError(t, mount.New().Mount(t.Context(), disk.path, target, filesystem))
			noError(t, os.WriteFile(target+"/file", []byte("data"), 0o600))
		})
	}
}

// What an operator reads says what was found and what to do.
func TestRefusalsAreHelpful(t *testing.T) {
	fake, device := fakeDevice()
	fake.SetContent(device, mount.Content{Type: "xfs"})
	v := &volume{state: mount.FormatState{Phase: mount.NeverFormatted}, allocated: true}
	err := mount.EnsureFilesystem(t.Context(), fake, device, ext4, v)
	for _, part := range []string{device, "xfs", "ext4", "fsType"} {
		if err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("%q is missing in: %v", part, err)
		}
	}
}
