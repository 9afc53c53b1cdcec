package judge

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
)

// view is everything that users of an image find in it.
type view struct {
	disk      *disk
	snapshots map[string]*disk
}

// unreadableError says that QEMU can't read what is in an image.
type unreadableError struct{ what string }

func (e *unreadableError) Error() string { return e.what }

// readView reads an image with QEMU's tools. It fails with an *unreadableError if that is the image's fault.
func readView(ctx context.Context, path string) (*view, error) {
	var info struct {
		Snapshots []struct {
			Name string `json:"name"`
		} `json:"snapshots"`
	}
	text, err := tool(ctx, "qemu-img", "info", "-f", "qcow2", "--output=json", path)
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(text, &info); err != nil {
		return nil, fmt.Errorf("qemu-img info: %w", err)
	}
	v := &view{snapshots: map[string]*disk{}}
	if v.disk, err = convert(ctx, path); err != nil {
		return nil, err
	}
	for _, s := range info.Snapshots {
		if v.snapshots[s.Name], err = convert(ctx, path, "-l", "snapshot.name="+s.Name); err != nil {
			return nil, err
		}
	}
	return v, nil
}

// convert reads the disk of an image.
func convert(ctx context.Context, path string, options ...string) (*disk, error) {
	raw := filepath.Join(filepath.Dir(path), "disk.raw")
	args := append([]string{"convert", "-f", "qcow2", "-O", "raw"}, options...)
	if _, err := tool(ctx, "qemu-img", append(args, path, raw)...); err != nil {
		return nil, err
	}
	return readRaw(raw)
}

// tool runs a tool of QEMU's and returns what it prints. It fails with an *unreadableError if the tool does.
func tool(ctx context.Context, name string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	out, err := cmd.Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) && ctx.Err() == nil {
		return nil, &unreadableError{fmt.Sprintf("%s %s: %s", name, args[0], exit.Stderr)}
	}
	return out, err
}
