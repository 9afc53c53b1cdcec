package main

import (
	"fmt"
	"math"
	"strings"

	"github.com/spf13/cobra"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

func newImageResizeCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "resize IMAGE [+]SIZE",
		Short: "Grow the virtual disk of an image",
		Long: `Grow the virtual disk of an image to SIZE, or by SIZE with a plus sign, rounded up to whole sectors of 512 bytes. The new
part reads as zeroes. An image can't be made smaller.`,
		Example: `  qcow-csi image resize disk.qcow2 20G
  qcow-csi image resize disk.qcow2 +512M`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			by, relative := strings.CutPrefix(args[1], "+")
			size, err := parseSize(by)
			if err != nil {
				return err
			}
			return withImage(args[0], storage.ReadWrite, func(_ *storage.OSFile, img *qcow.Image) error {
				old := img.Size()
				if relative {
					if size > math.MaxInt64-old {
						return fmt.Errorf("%d bytes more than %d are too large", size, old)
					}
					size += old
				}
				size = roundUp(size)
				if err := img.Resize(cmd.Context(), size); err != nil {
					return err
				}
				_, err := fmt.Fprintf(cmd.OutOrStdout(), "Resized %s from %d to %s (%d bytes)\n", args[0], old, humanSize(size), size)
				return err
			})
		},
	}
}
