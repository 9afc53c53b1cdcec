package main

import (
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/qcow-csi/qcow-csi/qcow/check"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// The exit status of a check that found something, as of qemu-img check.
const (
	exitCorrupt = 2
	exitLeaks   = 3
)

func newImageCheckCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "check IMAGE [--output human|json] [--max-memory SIZE]",
		Short: "Check the consistency of an image",
		Long: `Check whether the tables of an image agree with each other. Nothing is changed. Images with internal snapshots or
bitmaps can be checked too.

The exit status is 0 when the image is clean, 3 when it has leaked clusters, which waste space but harm nothing,
2 when it is corrupt, and 1 when it could not be checked. In JSON the names are those of qemu-img check; "findings" is an addition.`,
		Example: `  qcow-csi image check disk.qcow2
  qcow-csi image check --output json disk.qcow2 | jq .findings`,
		Args: cobra.ExactArgs(1),
	}
	output := addOutputFlag(cmd)
	memory := sizeValue(1 << 30)
	cmd.Flags().Var(&memory, "max-memory", "give up rather than use more memory for what is known of clusters; 1G suffices for 10 TiB of data in clusters of 64 KiB")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		report, err := checkFile(cmd, args[0], int64(memory))
		if err != nil {
			return err
		}
		if *output == outputJSON {
			err = writeJSON(cmd.OutOrStdout(), newImageCheck(args[0], report))
		} else {
			err = printReport(cmd.OutOrStdout(), report)
		}
		if err != nil {
			return err
		}
		return verdict(args[0], report)
	}
	return cmd
}

func checkFile(cmd *cobra.Command, path string, memory int64) (*check.Report, error) {
	f, err := openFile(path, storage.ReadOnly)
	if err != nil {
		return nil, err
	}
	report, err := check.Check(cmd.Context(), f, check.Options{MaxMemory: memory})
	if err := errors.Join(err, f.Close()); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return report, nil
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
	Filename           string         `json:"filename"`
	Format             string         `json:"format"`
	Findings           []imageFinding `json:"findings,omitempty"`
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
		Format:             "qcow2",
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
