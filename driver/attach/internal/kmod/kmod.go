// Package kmod loads kernel modules.
package kmod

import (
	"context"
	"fmt"
	"os/exec"
	"strings"
	"time"
)

// Load loads the module name with parameters of the form "key=value", unless it is loaded or built in. In a container
// this takes the host's /lib/modules and the right to load modules.
func Load(ctx context.Context, name string, parameters ...string) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, "modprobe", append([]string{"--", name}, parameters...)...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("modprobe %s: %w: %s", name, err, strings.TrimSpace(string(out)))
	}
	return nil
}
