package main

import (
	"github.com/spf13/cobra"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

func newImageCompactCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "compact IMAGE [-p] [--progress-fd N] [--output human|json]",
		Short: "Move data to the front of the file and cut off its end",
		Long: `Move data from the end of the file to free places at its front, and cut the end off. What the disk and its snapshots read as does
not change. What is not free is not made so: "image discard" comes first where zeroes are stored.

An interruption leaves a sound image, and the next time goes on from there.`,
		Example: `  qcow-csi image discard disk.qcow2
  qcow-csi image compact disk.qcow2`,
		Args: cobra.ExactArgs(1),
	}
	output := addOutputFlag(cmd)
	a := addAccessFlags(cmd, false)
	progress := addProgressFlags(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		m, err := progress.meter(cmd, true)
		if err != nil {
			return err
		}
		defer m.stop()
		return a.withImage(cmd.Context(), args[0], qcow.Options{}, func(_ *storage.OSFile, img *qcow.Image) error {
			c, err := img.Compact(cmd.Context(), m.update)
			if err != nil {
				return err
			}
			m.finish()
			return output.say(cmd, compacted{args[0], c.Moved, c.Before, c.After}, "Compacted %s: %s moved, the file is %s long, it was %s",
				args[0], humanSize(c.Moved), humanSize(c.After), humanSize(c.Before))
		})
	}
	return cmd
}

// compacted is what compact prints in JSON, in bytes.
type compacted struct {
	Filename string `json:"filename"`
	Moved    int64  `json:"moved"`
	Before   int64  `json:"before"`
	After    int64  `json:"after"`
}
