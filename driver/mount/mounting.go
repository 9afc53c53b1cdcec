package mount

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"
	mountutils "k8s.io/mount-utils"
)

// Mount implements Mounter.
func (*Host) Mount(ctx context.Context, device, target string, fs Filesystem) error {
	if err := mountDevice(ctx, device, target, fs); err != nil {
		return fmt.Errorf("mount %s on %s: %w", device, target, err)
	}
	return nil
}

func mountDevice(ctx context.Context, device, target string, fs Filesystem) error {
	if err := fs.Validate(); err != nil {
		return err
	}
	node, err := statDevice(device)
	if err != nil {
		return err
	}
	mounted, err := carries(target, node, fs.Type)
	if mounted || err != nil {
		return err
	}
	path, made, err := makeTarget(target, true)
	if err != nil {
		return err
	}
	var flags []string
	if !fs.ReadOnly() {
		flags = []string{"-w"} // else mount falls back to read-only on a device that refuses writes, and calls it success
	}
	argv, _ := mountutils.MakeMountArgsSensitiveWithMountFlags(device, path, fs.Type, fs.Options, nil, flags)
	if _, err := run(ctx, append([]string{"mount"}, argv...)...); err != nil {
		return unmake(path, made, err)
	}
	// What mount says and what is mounted need not be the same.
	mounted, err = carries(target, node, fs.Type)
	if err == nil && !mounted {
		err = fmt.Errorf("mount succeeded, but the mount table does not show it: %w", ErrNotMounted)
	}
	return err
}

// carries says whether the topmost mount on target is the filesystem of device; another one is ErrBusy.
func carries(target string, device blockDevice, fsType string) (bool, error) {
	top, err := topmost(target)
	if top == nil || err != nil {
		return false, err
	}
	if mounted, ok := top.device(true); !ok || mounted != device || top.fsType != fsType || top.root != "/" {
		return false, fmt.Errorf("target %w: %s from %s is mounted there", ErrBusy, top.fsType, top.source)
	}
	return true, nil
}

// unmake removes a target that was made for a mount that failed. A mount that was interrupted may have succeeded all
// the same; then the target stays, and the next attempt finds the mount.
func unmake(path string, made bool, cause error) error {
	if !made {
		return cause
	}
	if err := removeTarget(path); err != nil && !errors.Is(err, unix.EBUSY) {
		return errors.Join(cause, err)
	}
	return cause
}

// Bind implements Mounter. The kernel binds first and makes read-only second; a plugin that is killed in between
// leaves a writable mount, which the next Bind makes read-only.
func (*Host) Bind(ctx context.Context, source, target string, readOnly bool) error {
	if err := bind(ctx, source, target, readOnly); err != nil {
		return fmt.Errorf("bind %s on %s: %w", source, target, err)
	}
	return nil
}

func bind(ctx context.Context, source, target string, readOnly bool) error {
	if !filepath.IsAbs(source) {
		return fmt.Errorf("source %q: %w: not an absolute path", source, ErrInvalid)
	}
	info, err := os.Stat(source)
	if err != nil {
		return err
	}
	if _, isDevice := deviceOf(info); !info.IsDir() && !isDevice {
		return fmt.Errorf("%w: the source is neither a directory nor a block device", ErrInvalid)
	}
	top, err := topmost(target)
	if err != nil {
		return err
	}
	if top == nil {
		top, err = bindNew(ctx, source, target, info.IsDir())
	} else {
		err = boundFrom(info, top)
	}
	if err != nil {
		return err
	}
	switch isReadOnly := slices.Contains(top.options, "ro"); {
	case readOnly && !isReadOnly:
		// Flags that are not repeated would be dropped.
		keep := slices.DeleteFunc(slices.Clone(top.options), func(option string) bool { return option == "rw" })
		argv := mountutils.MakeMountArgs(source, top.target, "", append([]string{"remount", "bind", "ro"}, keep...))
		_, err = run(ctx, append([]string{"mount"}, argv...)...)
		return err
	case !readOnly && isReadOnly:
		return inheritsReadOnly(source)
	}
	return nil
}

// bindNew binds source on target, where nothing is mounted, and returns the mount.
func bindNew(ctx context.Context, source, target string, directory bool) (*entry, error) {
	path, made, err := makeTarget(target, directory)
	if err != nil {
		return nil, err
	}
	if _, err := run(ctx, "mount", "--bind", source, path); err != nil {
		return nil, unmake(path, made, err)
	}
	top, err := topmost(target)
	if top == nil && err == nil {
		err = fmt.Errorf("mount succeeded, but the mount table does not show it: %w", ErrNotMounted)
	}
	return top, err
}

// inheritsReadOnly returns nil when a bind mount is read-only because source is, and ErrBusy when it was made so.
func inheritsReadOnly(source string) error {
	var stat unix.Statfs_t
	if err := unix.Statfs(source, &stat); err != nil {
		return &os.PathError{Op: "statfs", Path: source, Err: err}
	}
	if stat.Flags&unix.ST_RDONLY == 0 {
		return fmt.Errorf("target %w: it is bound read-only, and asked for writable", ErrBusy)
	}
	return nil
}

// boundFrom returns nil when top is a mount of the source that info describes, else ErrBusy.
func boundFrom(info os.FileInfo, top *entry) error {
	there, err := os.Stat(top.target)
	if mountutils.IsCorruptedMnt(err) {
		return fmt.Errorf("target %w: the mount there no longer answers, unmount it first: %w", ErrBusy, err)
	}
	if err != nil {
		return err
	}
	device, isDevice := deviceOf(info)
	thereDevice, thereIsDevice := deviceOf(there)
	if isDevice && thereIsDevice && device == thereDevice || !isDevice && os.SameFile(info, there) {
		return nil
	}
	return fmt.Errorf("target %w: %s from %s is mounted there", ErrBusy, top.fsType, top.source)
}

// Unmount implements Mounter.
func (*Host) Unmount(ctx context.Context, target string) error {
	if err := unmount(ctx, target); err != nil {
		return fmt.Errorf("unmount %s: %w", target, err)
	}
	return nil
}

func unmount(ctx context.Context, target string) error {
	entries, err := mountsOn(target)
	if err != nil {
		return err
	}
	for left := len(entries); left > 0; left = len(entries) {
		// Neither a helper program nor a look at the path itself, for a mount that no longer answers.
		if _, err := run(ctx, "umount", "--internal-only", "--no-canonicalize", entries[0].target); err != nil {
			if says(err, "busy") {
				return fmt.Errorf("%w: files on it are open, or something is mounted below: %w", ErrBusy, err)
			}
			return err
		}
		if entries, err = mountsOn(target); err != nil {
			return err
		}
		if len(entries) >= left {
			return fmt.Errorf("umount succeeded, but %d mounts are left: %w", len(entries), ErrBusy)
		}
		klog.FromContext(ctx).V(4).Info("Unmounted", "target", target, "left", len(entries))
	}
	path, err := resolve(target)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return removeTarget(path)
}
