package mount

import (
	"context"
	"fmt"
)

// Format implements Mounter. The mkfs programs open the device exclusively and flush it before they end.
func (*Host) Format(ctx context.Context, device string, fs Filesystem, fresh bool) error {
	if err := fs.Validate(); err != nil {
		return fmt.Errorf("format %s: %w", device, err)
	}
	node, err := statDevice(device)
	if err != nil {
		return fmt.Errorf("format: %w", err)
	}
	size, err := node.size()
	if err != nil {
		return fmt.Errorf("format: %w", err)
	}
	if least := MinimumSize(fs.Type); size < least {
		return fmt.Errorf("format %s: %w: %s needs at least %d bytes, the device has %d",
			device, ErrInvalid, fs.Type, least, size)
	}
	if err := idle(device); err != nil {
		return fmt.Errorf("format: %w", err)
	}
	argv := mkfs(fs.Type, fresh)
	_, err = run(ctx, append(argv, device)...)
	if fresh && says(err, "assume_storage_prezeroed") { // e2fsprogs before 1.47.0 does not know it, and has done nothing
		_, err = run(ctx, append(mkfs(fs.Type, false), device)...)
	}
	if err != nil {
		return fmt.Errorf("format: %w", err)
	}
	return nil
}

// mkfs is the command line that makes a filesystem of the type, less the device.
//
// A fresh thin image has nothing to discard, and discarding its remains would gain little, so no mkfs discards. A
// fresh one has nothing to zero either: told so, mkfs.ext4 leaves out inode tables and journal (4 MiB of a 10 GiB
// image are allocated then, instead of 68 MiB and more as the kernel goes on in the background). Blocks of ext4 are 4
// KiB also on small volumes, which may be grown to large ones later, and none are reserved for root.
//
// mkfs.xfs and mkfs.btrfs refuse a device on which they find a filesystem, unless forced: only remains are forced.
func mkfs(fsType string, fresh bool) []string {
	var argv []string
	switch fsType {
	case "ext4":
		if fresh {
			return []string{"mkfs.ext4", "-q", "-b", "4096", "-m", "0", "-E", "nodiscard,assume_storage_prezeroed=1"}
		}
		return []string{"mkfs.ext4", "-q", "-F", "-b", "4096", "-m", "0", "-E", "nodiscard"}
	case "xfs":
		argv = []string{"mkfs.xfs", "-q", "-K"}
	case "btrfs":
		argv = []string{"mkfs.btrfs", "-q", "-K"}
	}
	if !fresh {
		argv = append(argv, "-f")
	}
	return argv
}
