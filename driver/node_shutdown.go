package driver

import (
	"context"
	"fmt"
	"os/exec"

	"k8s.io/klog/v2"
)

// Shutdown prepares an orderly end, after Serve has returned. What pods have written so far, and the kernel has not
// passed on yet, is brought into the images of the staged volumes. Their devices lose their server when the attacher is
// closed.
func (d *Driver) Shutdown(ctx context.Context) {
	d.node.mu.Lock()
	defer d.node.mu.Unlock()
	for handle, v := range d.node.staged {
		logger := klog.FromContext(ctx).WithValues("volume", handle, "device", v.device.Path)
		argv := []string{"sync", "-f", v.path} // the filesystem mounted there
		if isBlock(v.capability) {
			argv = []string{"sync", v.device.Path}
		}
		logger.Info("the volume is in use; its device ends with this process", "published", len(v.published))
		if err := d.node.run(ctx, argv...); err != nil {
			logger.Error(err, "what is not written yet is lost")
		}
	}
}

// runProgram runs a program. It is one, and no system call, so that a device that does not answer cannot hold this
// process, which is the one that has to answer for it.
func runProgram(ctx context.Context, argv ...string) error {
	done := make(chan error, 1)
	go func() {
		out, err := exec.CommandContext(ctx, argv[0], argv[1:]...).CombinedOutput()
		if err != nil {
			err = fmt.Errorf("%s: %w: %s", argv[0], err, out)
		}
		done <- err
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}
