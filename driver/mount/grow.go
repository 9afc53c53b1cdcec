package mount

import (
	"context"
	"fmt"
)

// Grow implements Mounter. Each program finds by itself that there is nothing to do, under the kernel's own locks.
func (*Host) Grow(ctx context.Context, device, target string) error {
	if err := grow(ctx, device, target); err != nil {
		return fmt.Errorf("grow %s on %s: %w", device, target, err)
	}
	return nil
}

func grow(ctx context.Context, device, target string) error {
	node, err := statDevice(device)
	if err != nil {
		return err
	}
	top, err := topmost(target)
	if err != nil {
		return err
	}
	if top == nil {
		return ErrNotMounted
	}
	if mounted, ok := top.device(true); !ok || mounted != node {
		return fmt.Errorf("the device is %w there, but %s from %s", ErrNotMounted, top.fsType, top.source)
	}
	if top.readOnly() {
		return fmt.Errorf("the mount is %w", ErrReadOnly)
	}
	switch top.fsType {
	case "ext4":
		_, err = run(ctx, "resize2fs", device)
		if says(err, "Permission denied") {
			err = fmt.Errorf("the plugin lacks CAP_SYS_RESOURCE, or the filesystem has errors and wants e2fsck: %w", err)
		}
	case "xfs":
		_, err = run(ctx, "xfs_growfs", "-d", top.target)
	case "btrfs":
		_, err = run(ctx, "btrfs", "filesystem", "resize", "max", top.target)
	default:
		err = fmt.Errorf("filesystem type %q: %w: have ext4, xfs and btrfs", top.fsType, ErrInvalid)
	}
	return err
}
