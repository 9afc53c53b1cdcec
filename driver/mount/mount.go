package mount

import "context"

// Mounter makes, mounts and measures filesystems. Targets are absolute paths. It is safe for concurrent use on
// different devices and targets; calls for the same one must not overlap.
type Mounter interface {
	// Probe says what a block device holds, reading it and nothing else. A device that cannot be read, or that shows
	// contradictory signatures, is ErrUnreadable, never blank.
	Probe(ctx context.Context, device string) (Content, error)
	// Format makes a filesystem, durably. It does not ask whether it may: EnsureFilesystem does, and is the only
	// caller. With fresh the whole device is known to read as zeroes, and mkfs spares itself writing them; without,
	// remains of an earlier mkfs are overwritten. A device that is mounted or otherwise held is ErrBusy, one below
	// MinimumSize ErrInvalid.
	Format(ctx context.Context, device string, fs Filesystem, fresh bool) error
	// Mount mounts the filesystem of device on the directory target, which it creates, with its parents. Already
	// mounted from the same device: nil. Another mount on target: ErrBusy.
	Mount(ctx context.Context, device, target string, fs Filesystem) error
	// Bind mounts source, a directory or a device node, on target, which it creates as a directory or a file. Already
	// bound from the same source: nil. Another mount on target, or a read-only one where a writable one is asked for:
	// ErrBusy.
	//
	// With readOnly a directory refuses writes. A device node does not, the kernel does not look at the mount for
	// those: kubelet's device cgroup does, and a device that is attached read-only.
	Bind(ctx context.Context, source, target string, readOnly bool) error
	// Unmount unmounts target, however many mounts are stacked there, and removes it. Absent: nil. A mount that no
	// longer answers is unmounted like any other; one with open files is ErrBusy. What is not empty when nothing is
	// mounted on it is not removed and an error.
	Unmount(ctx context.Context, target string) error
	// Grow makes the mounted filesystem fill its device, whose new size the kernel knows already. Already that large:
	// nil. Nothing, or another device, mounted on target: ErrNotMounted; mounted read-only: ErrReadOnly.
	Grow(ctx context.Context, device, target string) error
	// Usage measures the filesystem mounted on target, or the block device bound to it. Nothing mounted: ErrNotMounted.
	Usage(ctx context.Context, target string) (Usage, error)
	// Mounts returns what is mounted on target, topmost last; empty when nothing is.
	Mounts(ctx context.Context, target string) ([]Mount, error)
}

// Content is what a device holds.
type Content struct {
	Blank bool   // nothing known, and every place where a signature could stand reads as zeroes
	Type  string // filesystem type as blkid names it, or "partition-table:gpt" and the like; "" when Blank or unknown
}

// Mount is one entry of the mount table. Of a bound device node, Device, Major and Minor are that node's own while it
// is the topmost mount; below another mount it cannot be looked at, and they are those of the filesystem that holds
// the node.
type Mount struct {
	Device   string // source, such as /dev/nbd0
	Major    int    // of the block device under the filesystem, also where the filesystem has a number of its own (btrfs)
	Minor    int
	Type     string
	ReadOnly bool // by the mount or by the filesystem
	Options  []string
}

// Usage is what a filesystem or a device holds. Of a device only TotalBytes is known. Inodes are 0 for a device and
// where the filesystem has no fixed number.
type Usage struct {
	TotalBytes, UsedBytes, AvailableBytes int64
	TotalInodes, UsedInodes, FreeInodes   int64
}
