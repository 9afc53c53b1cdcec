package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// pieceBytes is how much of a disk is read or written at once.
const pieceBytes = 4 << 20

func newImageReadCommand() *cobra.Command {
	var to string
	cmd := &cobra.Command{
		Use:   "read IMAGE OFFSET LENGTH [--to FILE [--force]] [-l SNAPSHOT] [-U]",
		Short: "Read bytes of the virtual disk",
		Long:  `Read LENGTH bytes of the virtual disk from OFFSET on, and write them to standard output or to a file.`,
		Example: `  qcow-csi image read disk.qcow2 0 512 | xxd
  qcow-csi image read disk.qcow2 1M 64K --to piece`,
		Args: cobra.ExactArgs(3),
	}
	a := addAccessFlags(cmd, true)
	snapshot := addSnapshotFlag(cmd)
	cmd.Flags().StringVar(&to, "to", "", "file to be made, instead of standard output")
	target := addTargetFlags(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		off, err := parseSize(args[1])
		if err != nil {
			return err
		}
		n, err := parseSize(args[2])
		if err != nil {
			return err
		}
		return a.withImage(cmd.Context(), args[0], qcow.Options{ReadOnly: true, Snapshot: *snapshot}, func(_ *storage.OSFile, img *qcow.Image) error {
			if size := img.Size(); off > size || n > size-off {
				return fmt.Errorf("%d bytes at %d are outside the virtual disk of %d", n, off, size)
			}
			if to == "" {
				return copyOut(cmd.Context(), cmd.OutOrStdout(), img, off, n)
			}
			return target.create(to, func(f *storage.OSFile) error {
				return errors.Join(copyOut(cmd.Context(), io.NewOffsetWriter(f, 0), img, off, n), f.Sync())
			})
		})
	}
	return cmd
}

// copyOut writes n bytes of the disk at off to w.
func copyOut(ctx context.Context, w io.Writer, img *qcow.Image, off, n int64) error {
	b := make([]byte, min(n, pieceBytes))
	for n > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		b = b[:min(n, int64(len(b)))]
		if _, err := img.ReadAt(b, off); err != nil {
			return err
		}
		if _, err := w.Write(b); err != nil {
			return err
		}
		off, n = off+int64(len(b)), n-int64(len(b))
	}
	return nil
}
