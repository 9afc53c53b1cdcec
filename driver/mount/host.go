package mount

// Host is the Mounter of this machine. It needs root with CAP_SYS_ADMIN and, to grow an ext4, CAP_SYS_RESOURCE;
// util-linux (mount, umount, blkid); /proc, /sys and /dev; and for each type of filesystem its own programs:
// e2fsprogs, xfsprogs, btrfs-progs. It has no state.
type Host struct{}

// New returns the Mounter of this machine.
func New() *Host { return &Host{} }

var _ Mounter = (*Host)(nil)
