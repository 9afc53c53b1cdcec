package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/check"
	"github.com/qcow-csi/qcow-csi/qcow/repair"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// repairMode is how much is to be repaired, as a flag; "" is nothing.
type repairMode string

const (
	repairLeaks repairMode = "leaks"
	repairAll   repairMode = "all"
)

func (m *repairMode) String() string { return string(*m) }
func (m *repairMode) Type() string   { return "leaks|all" }

// Set implements pflag.Value.
func (m *repairMode) Set(s string) error {
	switch r := repairMode(s); r {
	case repairLeaks, repairAll:
		*m = r
		return nil
	}
	return errors.New(`must be "leaks" or "all"`)
}

// engine returns the mode as the engine calls it.
func (m repairMode) engine() repair.Mode {
	if m == repairLeaks {
		return repair.Leaks
	}
	return repair.All
}

func newImageRepairCommand() *cobra.Command {
	c := checkup{repair: repairAll, memory: 1 << 30}
	cmd := &cobra.Command{
		Use:   "repair IMAGE [--mode leaks|all] [--dry-run] [-p] [--progress-fd N] [--output human|json] [--max-memory SIZE]",
		Short: "Repair the tables of an image",
		Long: `Repair the tables of an image, print what was changed, and check it again. New tables are made beside the old ones and take effect at
once: a crash leaves the image as it was or repaired. Make a copy first nevertheless if the image is corrupt: what no table
refers to any more is not found again.

The mode "leaks" gives back clusters that nothing uses, and touches nothing else. "all" is everything. With --dry-run nothing
is changed. The exit status is that of "image check" for the image as it is afterwards; in JSON "changes" is an addition to it.`,
		Example: `  qcow-csi image repair disk.qcow2
  qcow-csi image repair --mode leaks disk.qcow2
  qcow-csi image repair --dry-run disk.qcow2`,
		Args: cobra.ExactArgs(1),
	}
	c.output = addOutputFlag(cmd)
	c.progress = addProgressFlags(cmd)
	cmd.Flags().Var(&c.repair, "mode", "what to repair")
	cmd.Flags().BoolVar(&c.dryRun, "dry-run", false, "only print what would be changed")
	c.addMemoryFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error { return c.run(cmd, args[0]) }
	return cmd
}

// repaired opens the image, repairs it, and checks what has become of it. changes is nil where too much is wrong for a repair of leaks:
// then the check says what.
func (c *checkup) repaired(ctx context.Context, path string, m *meter) (changes *repair.Report, found *check.Report, err error) {
	err = c.withFile(path, c.dryRun, func(f *storage.OSFile) (err error) {
		changes, err = repair.Run(ctx, f, repair.Options{Mode: c.repair.engine(), DryRun: c.dryRun, MaxMemory: int64(c.memory), Progress: m.update})
		if err != nil && !(c.repair == repairLeaks && errors.Is(err, qcow.ErrCorrupt)) {
			return err
		}
		found, err = check.Check(ctx, f, check.Options{MaxMemory: int64(c.memory)})
		return err
	})
	return changes, found, err
}

// imageChange is one thing that was repaired, in JSON.
type imageChange struct {
	Kind   string `json:"kind"`
	Table  string `json:"table"`
	Offset uint64 `json:"offset"`
	Old    uint64 `json:"old"`
	New    uint64 `json:"new"`
	Detail string `json:"detail,omitempty"`
}

func describeChanges(r *repair.Report) []imageChange {
	var list []imageChange
	for _, c := range r.Changes {
		list = append(list, imageChange{c.Kind.String(), c.Table.String(), uint64(c.Offset), c.Old, c.New, c.Detail})
	}
	return list
}

func printChanges(w io.Writer, r *repair.Report, dryRun bool) error {
	text := "Nothing had to be repaired.\n"
	switch {
	case r == nil:
		text = "Nothing was repaired: this takes a repair of all errors.\n"
	case !r.Clean() && dryRun:
		text = "A repair would make " + r.String() + "\n"
	case !r.Clean():
		text = "The repair made " + r.String() + "\n"
	}
	if r != nil && r.Freed > 0 {
		text += fmt.Sprintf("%s came free.\n", humanSize(r.Freed))
	}
	_, err := io.WriteString(w, text)
	return err
}
