package main

import (
	"github.com/spf13/cobra"
)

// newImageCommand returns the commands that work on image files at rest. Their output and exit status are those of
// qemu-img where it has the same command, and a letter means the same in both.
func newImageCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "image",
		Short: "Make, inspect, change and repair qcow2 images",
		Long: `Make, inspect, change and repair qcow2 images at rest.

An image that is in use, here or by QEMU, can't be opened in a way that conflicts: reading it excludes
writers, changing it excludes everybody. A command that is interrupted, by a signal or by a power cut, leaves a sound
image. Formats are never guessed: what is no qcow2 image must be called raw.

The backing files and the data file that an image names are opened as QEMU opens them, relative to the folder of
the image: think twice before you let a command read an image from somebody you don't trust.

Sizes are in bytes; the suffixes K, M, G, T, P and E stand for powers of 1024.`,
		Example: `  qcow-csi image create disk.qcow2 10G
  qcow-csi image info disk.qcow2
  qcow-csi image check --output json disk.qcow2
  qcow-csi image convert -f raw -O qcow2 -c disk.raw disk.qcow2
  qcow-csi image snapshot --create before-upgrade disk.qcow2`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.PersistentFlags().BoolP("quiet", "q", false, "print nothing but errors and what was asked for")
	cmd.AddCommand(
		newImageCreateCommand(), newImageInfoCommand(), newImageMapCommand(), newImageMeasureCommand(),
		newImageCheckCommand(), newImageRepairCommand(),
		newImageConvertCommand(), newImageResizeCommand(), newImageAmendCommand(),
		newImageSnapshotCommand(), newImageBitmapCommand(),
		newImageCommitCommand(), newImageRebaseCommand(), newImageStreamCommand(),
		newImageDiscardCommand(), newImageCompactCommand(),
		newImageReadCommand(), newImageWriteCommand(), newImageSHACommand(),
		newImageDehydrateCommand(), newImageRehydrateCommand(),
	)
	for _, sub := range cmd.Commands() {
		sub.DisableFlagsInUseLine = true
		sub.SilenceUsage = true // what fails once the arguments are understood is no matter of usage
	}
	return cmd
}
