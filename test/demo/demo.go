package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
)

const (
	mebibyte = int64(1) << 20
	gibibyte = int64(1) << 30
)

// demo is what the parts of the demonstration share.
type demo struct {
	dir      string // everything is below it
	program  string
	attacher string

	*server
	topology *csi.Topology
	volumes  []*volume
}

func newDemo(_ context.Context, program, attacher string) (*demo, error) {
	program, err := filepath.Abs(program)
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "qcow-csi-demo-")
	if err != nil {
		return nil, err
	}
	d := &demo{dir: dir, program: program, attacher: attacher, server: &server{}}
	return d, os.Mkdir(d.storage(), 0o700)
}

func (d *demo) storage() string { return filepath.Join(d.dir, "storage") }

// start starts the program and asks it who it is.
func (d *demo) start(ctx context.Context) error {
	if err := d.step("start the driver on an empty directory", func() (string, error) {
		return "", d.server.start(ctx, d.program, filepath.Join(d.dir, "csi.sock"), d.storage(), d.attacher)
	}); err != nil {
		return err
	}
	return d.step("ask who it is and whether it is well", func() (string, error) {
		info, err := d.GetPluginInfo(ctx, &csi.GetPluginInfoRequest{})
		if err != nil {
			return "", err
		}
		if _, err := d.Probe(ctx, &csi.ProbeRequest{}); err != nil {
			return "", err
		}
		node, err := d.NodeGetInfo(ctx, &csi.NodeGetInfoRequest{})
		if err != nil {
			return "", err
		}
		d.topology = node.GetAccessibleTopology()
		return info.GetName(), nil
	})
}

// filesystem takes a mounted volume through its life.
func (d *demo) filesystem(ctx context.Context) error {
	fs, err := growable()
	if err != nil {
		return err
	}
	v := d.newVolume("mounted", &csi.VolumeCapability{
		AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: fs}},
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER},
	})
	var early, late files
	for _, s := range []struct {
		name string
		do   func() (string, error)
	}{
		{"create a volume of 1 GiB", func() (string, error) { return "", v.create(ctx, gibibyte) }},
		{"stage it: image, device, new " + fs, func() (string, error) { return "", v.stage(ctx) }},
		{"publish it to a pod", func() (string, error) { return "", v.publish(ctx, false) }},
		{"write 96 MiB of files", func() (says string, err error) {
			early, err = writeFiles(ctx, filepath.Join(v.target, "early"), 48, 2*mebibyte)
			return "checksum " + early.sum(), err
		}},
		{"grow it to 2 GiB while files are written", func() (says string, err error) {
			late, says, err = d.growUnderLoad(ctx, v)
			return says, err
		}},
		{"ask for its statistics", func() (string, error) { return v.stats(ctx) }},
		{"unpublish it", func() (string, error) { return "", v.unpublish(ctx) }},
		{"unstage it", func() (string, error) { return "", v.unstage(ctx) }},
		{"stage it again", func() (string, error) { return "", v.stage(ctx) }},
		{"publish it read-only", func() (string, error) { return "", v.publish(ctx, true) }},
		{"verify every file", func() (string, error) {
			if err := errors.Join(early.verify(), late.verify()); err != nil {
				return "", err
			}
			return "checksum " + early.sum(), refusesWrites(v.target)
		}},
		{"unpublish and unstage it", func() (string, error) { return "", errors.Join(v.unpublish(ctx), v.unstage(ctx)) }},
	} {
		if err := d.step(s.name, s.do); err != nil {
			return err
		}
	}
	return nil
}

// growUnderLoad doubles a volume while something writes to it, and checks that the filesystem has grown and that the
// writer has not noticed.
func (d *demo) growUnderLoad(ctx context.Context, v *volume) (written files, says string, err error) {
	before, err := filesystemSize(v.target)
	if err != nil {
		return nil, "", err
	}
	type result struct {
		files files
		err   error
	}
	writing, stop, done := make(chan struct{}), make(chan struct{}), make(chan result, 1)
	go func() {
		var r result
		for i := 0; r.err == nil; i++ {
			var more files
			more, r.err = writeFiles(ctx, filepath.Join(v.target, fmt.Sprint("late-", i)), 4, mebibyte)
			r.files = append(r.files, more...)
			if i == 0 {
				close(writing)
			}
			select {
			case <-stop:
				done <- r
				return
			default:
			}
		}
		done <- r
	}()
	<-writing
	growErr := v.grow(ctx, 2*gibibyte)
	close(stop)
	r := <-done
	if err := errors.Join(growErr, r.err); err != nil {
		return nil, "", err
	}
	after, err := filesystemSize(v.target)
	if err != nil {
		return nil, "", err
	}
	if after < before+gibibyte*9/10 {
		return nil, "", fmt.Errorf("the filesystem had %d bytes and has %d", before, after)
	}
	return r.files, fmt.Sprintf("%d MiB -> %d MiB", before/mebibyte, after/mebibyte), nil
}

// growable returns a filesystem that this process may grow.
func growable() (string, error) {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var have [2]unix.CapUserData
	if err := unix.Capget(&header, &have[0]); err != nil {
		return "", fmt.Errorf("capget: %w", err)
	}
	if have[0].Effective&(1<<unix.CAP_SYS_RESOURCE) != 0 {
		return "ext4", nil
	}
	fmt.Println("there is no CAP_SYS_RESOURCE here, so the kernel grows no mounted ext4: xfs it is")
	return "xfs", nil
}

func filesystemSize(path string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return 0, fmt.Errorf("statfs %s: %w", path, err)
	}
	return int64(st.Blocks) * st.Frsize, nil
}

// refusesWrites returns nil when nothing can be written to a directory.
func refusesWrites(dir string) error {
	err := os.WriteFile(filepath.Join(dir, "forbidden"), nil, 0o600)
	switch {
	case err == nil:
		return errors.New("a read-only publication takes a write")
	case errors.Is(err, unix.EROFS):
		return nil
	}
	return fmt.Errorf("a write to a read-only publication: %w", err)
}

// block takes a raw block volume through its life.
func (d *demo) block(ctx context.Context) error {
	v := d.newVolume("block", &csi.VolumeCapability{
		AccessType: &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}},
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER},
	})
	content := make([]byte, 8*mebibyte)
	if _, err := rand.Read(content); err != nil {
		return err
	}
	return errors.Join(
		d.step("a raw block volume: create, stage, publish", func() (string, error) {
			if err := v.create(ctx, 64*mebibyte); err != nil {
				return "", err
			}
			if err := v.stage(ctx); err != nil {
				return "", err
			}
			return "", v.publish(ctx, false)
		}),
		d.step("write, grow to 128 MiB, write at the new end, read back", func() (string, error) {
			if err := writeDevice(v.target, content, 0); err != nil {
				return "", err
			}
			if err := v.grow(ctx, 128*mebibyte); err != nil {
				return "", err
			}
			end := 128*mebibyte - int64(len(content))
			if err := writeDevice(v.target, content, end); err != nil {
				return "", err
			}
			return "", errors.Join(verifyDevice(v.target, content, 0), verifyDevice(v.target, content, end))
		}),
		d.step("unpublish, unstage", func() (string, error) { return "", errors.Join(v.unpublish(ctx), v.unstage(ctx)) }),
	)
}

// judge has QEMU check the images.
func (d *demo) judge(ctx context.Context) error {
	tool, err := exec.LookPath("qemu-img")
	if err != nil {
		fmt.Println("qemu-img is not installed, so QEMU has no say in this")
		return nil //nolint:nilerr // nothing of ours needs it
	}
	for _, v := range d.volumes {
		if err := d.step("qemu-img check of the "+v.name+" volume", func() (string, error) {
			out, err := exec.CommandContext(ctx, tool, "check", "-f", "qcow2", v.image()).CombinedOutput()
			if err != nil {
				return "", fmt.Errorf("%w: %s", err, out)
			}
			first, _, _ := strings.Cut(string(out), "\n")
			return strings.ToLower(strings.TrimSuffix(first, ".")), nil
		}); err != nil {
			return err
		}
	}
	return nil
}

// end deletes the volumes and stops the driver.
func (d *demo) end(ctx context.Context) error {
	if err := d.step("delete both volumes", func() (string, error) {
		for _, v := range d.volumes {
			if err := v.delete(ctx); err != nil {
				return "", err
			}
			if _, err := os.Stat(v.image()); !errors.Is(err, os.ErrNotExist) {
				return "", fmt.Errorf("%s is still there: %w", v.image(), err)
			}
		}
		return "", nil
	}); err != nil {
		return err
	}
	return d.step("stop the driver", func() (string, error) { return "", d.server.stop() })
}

// cleanUp takes down what a failure has left.
func (d *demo) cleanUp() error {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	var errs []error
	for _, v := range d.volumes {
		errs = append(errs, v.takeDown(ctx))
	}
	errs = append(errs, d.server.stop())
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("%s is left as it is: %w", d.dir, err)
	}
	return os.RemoveAll(d.dir)
}

// readDevice returns n bytes of a device at off, not from the cache that the writer has filled.
func readDevice(path string, off, n int64) (_ []byte, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		return nil, err
	}
	return io.ReadAll(io.NewSectionReader(f, off, n))
}
