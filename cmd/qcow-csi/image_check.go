package main

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/qcow-csi/qcow-csi/qcow/check"
	"github.com/qcow-csi/qcow-csi/qcow/repair"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// The exit status of a check that found something, as of qemu-img check.
const (
	exitCorrupt = 2
	exitLeaks   = 3
)

// checkup is a check of an image, with or without a repair before it.
type checkup struct {
	access
	repair   repairMode // "": none
	dryRun   bool
	memory   sizeValue
	output   *outputFormat
	progress *progressFlags
}

func newImageCheckCommand() *cobra.Command {
	c := checkup{memory: 1 << 30}
	cmd := &cobra.Command{
		Use:   "check IMAGE [-r leaks|all] [-U] [--output human|json] [--max-memory SIZE]",
		Short: "Check the consistency of an image",
		Long: `Check whether the tables of an image agree with each other, and print what is wrong. Nothing is changed; -r repairs first, as "image
repair" does. Backing files and data files are not looked at, and no passphrase is needed.

The exit status is 0 when the image is clean, 3 when it has leaked clusters, which waste space but harm nothing,
2 when it is corrupt, and 1 when it could not be checked. In JSON the names are those of qemu-img check; "findings" is an addition.`,
		Example: `  qcow-csi image check disk.qcow2
  qcow-csi image check --output json disk.qcow2 | jq .findings
  qcow-csi image check -r leaks disk.qcow2`,
		Args: cobra.ExactArgs(1),
	}
	c.output = addOutputFlag(cmd)
	c.progress = addProgressFlags(cmd)
	addShareFlag(cmd, &c.access)
	cmd.Flags().VarP(&c.repair, "repair", "r", "repair before the check")
	c.addMemoryFlag(cmd)
	cmd.MarkFlagsMutuallyExclusive("repair", "force-share")
	cmd.RunE = func(cmd *cobra.Command, args []string) error { return c.run(cmd, args[0]) }
	return cmd
}

func (c *checkup) addMemoryFlag(cmd *cobra.Command) {
	cmd.Flags().Var(&c.memory, "max-memory", "give up rather than use more memory for what is known of clusters; 1G suffices for 10 TiB of data in clusters of 64 KiB")
}

func (c *checkup) run(cmd *cobra.Command, path string) error {
	m, err := c.progress.meter(cmd, false)
	if err != nil {
		return err
	}
	defer m.stop()
	var changes *repair.Report
	var found *check.Report
	if c.repair == "" {
		found, err = c.checked(cmd.Context(), path)
	} else {
		changes, found, err = c.repaired(cmd.Context(), path, m)
	}
	if err != nil {
		return err
	}
	m.finish()
	if err := c.print(cmd, path, changes, found); err != nil {
		return err
	}
	return verdict(path, found)
}

func (c *checkup) print(cmd *cobra.Command, path string, changes *repair.Report, found *check.Report) error {
	if *c.output == outputJSON {
		result := newImageCheck(path, found)
		if changes != nil {
			result.Changes = describeChanges(changes)
			if !c.dryRun {
				result.LeaksFixed, result.CorruptionsFixed = changes.Leaks(), changes.Count()-changes.Leaks()-changes.Count(repair.LeakKept)
			}
		}
		return writeJSON(cmd.OutOrStdout(), result)
	}
	if quiet, err := cmd.Flags().GetBool("quiet"); err != nil || quiet {
		return err
	}
	if c.repair != "" {
		if err := printChanges(cmd.OutOrStdout(), changes, c.dryRun); err != nil {
			return err
		}
	}
	return printReport(cmd.OutOrStdout(), found)
}

func (c *checkup) checked(ctx context.Context, path string) (found *check.Report, err error) {
	err = c.withFile(path, true, func(f *storage.OSFile) (err error) {
		found, err = check.Check(ctx, f, check.Options{MaxMemory: int64(c.memory)})
		return err
	})
	return found, err
}

// verdict turns a report into the error that makes the exit status.
func verdict(path string, r *check.Report) error {
	switch {
	case r.Corruptions > 0:
		return &exitError{exitCorrupt, fmt.Errorf("%s is corrupt: %d errors, %d leaked clusters", path, r.Corruptions, r.Leaks)}
	case r.Leaks > 0:
		return &exitError{exitLeaks, fmt.Errorf("%s has %d leaked clusters", path, r.Leaks)}
	}
	return nil
}

// imageCheck is what qemu-img check --output=json prints.
type imageCheck struct {
	ImageEnd           int64          `json:"image-end-offset"`
	TotalClusters      int64          `json:"total-clusters"`
	CheckErrors        int            `json:"check-errors"`
	AllocatedClusters  int64          `json:"allocated-clusters,omitempty"`
	FragmentedClusters int64          `json:"fragmented-clusters,omitempty"`
	CompressedClusters int64          `json:"compressed-clusters,omitempty"`
	Corruptions        int            `json:"corruptions,omitempty"`
	Leaks              int            `json:"leaks,omitempty"`
	CorruptionsFixed   int            `json:"corruptions-fixed,omitempty"`
	LeaksFixed         int            `json:"leaks-fixed,omitempty"`
	Filename           string         `json:"filename"`
	Format             string         `json:"format"`
	Findings           []imageFinding `json:"findings,omitempty"`
	Changes            []imageChange  `json:"changes,omitempty"`
}

type imageFinding struct {
	Severity string `json:"severity"`
	Kind     string `json:"kind"`
	Table    string `json:"table"`
	Offset   uint64 `json:"offset"`
	Detail   string `json:"detail"`
}

func newImageCheck(path string, r *check.Report) imageCheck {
	c := imageCheck{
		ImageEnd:           r.ImageEnd,
		TotalClusters:      r.TotalClusters,
		AllocatedClusters:  r.AllocatedClusters,
		FragmentedClusters: r.FragmentedClusters,
		CompressedClusters: r.CompressedClusters,
		Corruptions:        r.Corruptions,
		Leaks:              r.Leaks,
		Filename:           path,
		Format:             formatQcow2,
	}
	for _, f := range r.Findings {
		c.Findings = append(c.Findings, imageFinding{f.Severity.String(), f.Kind.String(), f.Table.String(), uint64(f.Offset), f.Detail})
	}
	return c
}

func printReport(w io.Writer, r *check.Report) error {
	text := "No errors were found on the image.\n"
	if !r.Clean() {
		text = r.String() + "\n"
	}
	switch {
	case r.Corruptions > 0:
		text += "Data may be corrupted, or further writes to the image may corrupt it.\n"
	case r.Leaks > 0:
		text += "Leaked clusters waste disk space, but do no harm to data.\n"
	}
	if r.Dirty {
		text += "The image is marked dirty: its refcounts are rebuilt before it is written to.\n"
	}
	if r.MarkedCorrupt {
		text += "The image is marked corrupt.\n"
	}
	if r.TotalClusters > 0 && r.AllocatedClusters > 0 {
		percent := func(n, of int64) float64 { return 100 * float64(n) / float64(of) }
		text += fmt.Sprintf("%d/%d = %.2f%% allocated, %.2f%% fragmented, %.2f%% compressed clusters\n",
			r.AllocatedClusters, r.TotalClusters, percent(r.AllocatedClusters, r.TotalClusters),
			percent(r.FragmentedClusters, r.AllocatedClusters), percent(r.CompressedClusters, r.AllocatedClusters))
	}
	text += fmt.Sprintf("Image end offset: %d\n", r.ImageEnd)
	_, err := io.WriteString(w, text)
	return err
}
