// Command init is process 1 of a test guest: it mounts what a test binary expects of a Linux system, loads kernel
// modules, runs the binary, leaves its exit status in a file and powers the guest off. The host side is package vm.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/qcow-csi/qcow-csi/test/vm/handover"
)

func main() {
	dir := os.Getenv(handover.Variable)
	if os.Getpid() != 1 || dir == "" {
		fmt.Fprintln(os.Stderr, "init: this program mounts, and powers the machine off: it runs as process 1 of a test guest only")
		os.Exit(1)
	}
	if err := run(dir); err != nil {
		fmt.Println("init:", err)
	}
	unix.Sync()
	if err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF); err != nil {
		fmt.Println("init: power off:", err)
	}
}

func run(dir string) error {
	// The root is the host's, read-only. All that the guest can change of the host is below dir, which gets a mount
	// of its own, on top of a fresh /tmp.
	for _, m := range []struct{ fstype, target, data string }{
		{"proc", "/proc", ""},
		{"sysfs", "/sys", ""},
		{"devtmpfs", "/dev", ""},
		{"tmpfs", "/run", ""},
		{"tmpfs", "/tmp", ""},
		{"hostfs", dir, dir},
	} {
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			return err
		}
		// The kernel may have mounted /dev itself: EBUSY.
		if err := unix.Mount("none", m.target, m.fstype, 0, m.data); err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mount %s on %s: %w", m.fstype, m.target, err)
		}
	}
	raw, err := os.ReadFile(filepath.Join(dir, handover.OrderFile))
	if err != nil {
		return err
	}
	var order handover.Order
	if err := json.Unmarshal(raw, &order); err != nil {
		return err
	}
	for _, module := range order.Modules {
		if err := load(module); err != nil {
			return fmt.Errorf("load %s: %w", module, err)
		}
	}
	if order.Disk {
		if err := os.MkdirAll(handover.DiskDir, 0o755); err != nil {
			return err
		}
		if err := unix.Mount("/dev/ubda", handover.DiskDir, "ext4", 0, ""); err != nil {
			return fmt.Errorf("mount the disk: %w", err)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), order.Timeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, order.Binary, order.Args...)
	cmd.Env = append([]string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/tmp"}, order.Env...)
	cmd.Stdout, cmd.Stderr, cmd.Dir = os.Stdout, os.Stderr, "/tmp"
	cmd.WaitDelay = time.Second // processes that it leaves may hold the console
	err = cmd.Run()
	if _, exited := errors.AsType[*exec.ExitError](err); err != nil && !exited {
		return err
	}
	return os.WriteFile(filepath.Join(dir, handover.StatusFile), []byte(cmd.ProcessState.String()), 0o644)
}

func load(module string) error {
	f, err := os.Open(module)
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // opened for reading
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	return nil
}
