package mount

import (
	"context"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Usage implements Mounter.
func (*Host) Usage(_ context.Context, target string) (Usage, error) {
	usage, err := measure(target)
	if err != nil {
		return Usage{}, fmt.Errorf("usage of %s: %w", target, err)
	}
	return usage, nil
}

func measure(target string) (Usage, error) {
	top, err := topmost(target)
	if err != nil {
		return Usage{}, err
	}
	if top == nil { // else it would be the directory's filesystem that is measured
		return Usage{}, ErrNotMounted
	}
	info, err := os.Stat(top.target)
	if err != nil {
		return Usage{}, err
	}
	if device, ok := deviceOf(info); ok {
		size, err := device.size()
		return Usage{TotalBytes: size}, err
	}
	var stat unix.Statfs_t
	if err := unix.Statfs(top.target, &stat); err != nil {
		return Usage{}, &os.PathError{Op: "statfs", Path: top.target, Err: err}
	}
	return Usage{
		TotalBytes:     int64(stat.Blocks) * stat.Frsize,
		UsedBytes:      int64(stat.Blocks-stat.Bfree) * stat.Frsize,
		AvailableBytes: int64(stat.Bavail) * stat.Frsize,
		TotalInodes:    int64(stat.Files),
		UsedInodes:     int64(stat.Files - stat.Ffree),
		FreeInodes:     int64(stat.Ffree),
	}, nil
}
