package mount

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// Exit codes of blkid in low-level probing mode (-p).
const (
	blkidNothing   = 2 // nothing found, or nothing could be read: it does not say which
	blkidAmbiguous = 8 // more than one filesystem
)

// Probe implements Mounter.
func (*Host) Probe(ctx context.Context, device string) (Content, error) {
	node, err := statDevice(device)
	if err != nil {
		return Content{}, fmt.Errorf("probe: %w", err)
	}
	size, err := node.size()
	if err != nil {
		return Content{}, fmt.Errorf("probe: %w", err)
	}
	// Low-level probing looks at the device, not at a cache. Only the named values are printed, so that no label,
	// which is anyone's text, is parsed.
	output, err := run(ctx, "blkid", "-p", "-s", "TYPE", "-s", "PTTYPE", "-o", "export", device)
	switch exitCode(err) {
	case blkidNothing:
		return readBlank(ctx, device, size)
	case blkidAmbiguous:
		return Content{}, fmt.Errorf("probe: %w: more than one signature: %w", ErrUnreadable, err)
	}
	if err != nil {
		return Content{}, fmt.Errorf("probe: %w", err)
	}
	content := parseBlkid(output)
	if content.Type == "" {
		return Content{}, fmt.Errorf("probe %s: %w: blkid found something it has no type for", device, ErrUnreadable)
	}
	return content, nil
}

// parseBlkid reads the output of blkid -o export. A filesystem inside a partition table's sector counts as the
// filesystem.
func parseBlkid(output string) Content {
	values := map[string]string{}
	for line := range strings.Lines(output) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		values[name] = value
	}
	if table := values["PTTYPE"]; values["TYPE"] == "" && table != "" {
		return Content{Type: "partition-table:" + table}
	}
	return Content{Type: values["TYPE"]}
}

// readBlank reads the device where blkid found nothing.
func readBlank(ctx context.Context, device string, size int64) (_ Content, err error) {
	f, err := os.Open(device)
	if err != nil {
		return Content{}, fmt.Errorf("probe: %w: %w", ErrUnreadable, err)
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	// While anybody has the device open its pages stay in memory: read what is there now, not what was read before.
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		return Content{}, fmt.Errorf("probe %s: fadvise: %w", device, err)
	}
	blank, err := isBlank(ctx, f, size)
	if err != nil {
		return Content{}, fmt.Errorf("probe %s: %w", device, err)
	}
	return Content{Blank: blank}, nil
}
