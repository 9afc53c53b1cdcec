package main

import (
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

func newImageCreateCommand() *cobra.Command {
	clusterSize, refcountBits := sizeValue(1<<format.DefaultClusterBits), 1<<format.DefaultRefcountOrder
	cmd := &cobra.Command{
		Use:   "create IMAGE SIZE [--cluster-size SIZE] [--refcount-bits N]",
		Short: "Create an empty image",
		Long: `Create an empty image with a virtual disk of SIZE, which is rounded up to whole sectors of 512 bytes.
A file that exists already is never overwritten.`,
		Example: `  qcow-csi image create disk.qcow2 10G
  qcow-csi image create disk.qcow2 1.5T --cluster-size 1M --refcount-bits 1`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			size, err := parseSize(args[1])
			if err != nil {
				return err
			}
			o := qcow.CreateOptions{Size: roundUp(size), ClusterSize: int(clusterSize), RefcountBits: refcountBits}
			if o.ClusterSize == 0 || o.RefcountBits == 0 { // which ask the engine for its defaults
				return errors.New("--cluster-size and --refcount-bits can't be 0")
			}
			if err := createImage(args[0], o); err != nil {
				return err
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "Created %s: %s (%d bytes), clusters of %s, refcounts of %d bits\n",
				args[0], humanSize(o.Size), o.Size, humanSize(int64(o.ClusterSize)), o.RefcountBits)
			return err
		},
	}
	cmd.Flags().Var(&clusterSize, "cluster-size", "unit of allocation, a power of two from 512 to 2M")
	cmd.Flags().IntVar(&refcountBits, "refcount-bits", refcountBits, "width of a refcount: 1, 2, 4, 8, 16, 32 or 64")
	return cmd
}

// roundUp rounds n up to whole sectors, and leaves sizes that no image can have to the engine to refuse.
func roundUp(n int64) int64 {
	if n > math.MaxInt64-format.SectorSize {
		return n
	}
	return (n + format.SectorSize - 1) / format.SectorSize * format.SectorSize
}

// createImage makes an image at path that is there, whole, after a power loss too, or none.
func createImage(path string, o qcow.CreateOptions) (err error) {
	f, err := storage.Create(path)
	if err != nil {
		return err
	}
	err = errors.Join(qcow.Create(f, o), f.Close())
	if err == nil {
		err = syncDirectory(filepath.Dir(path))
	}
	if err != nil {
		return fmt.Errorf("%s: %w", path, errors.Join(err, os.Remove(path)))
	}
	return nil
}

func syncDirectory(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
