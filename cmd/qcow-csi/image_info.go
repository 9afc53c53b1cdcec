package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

func newImageInfoCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "info IMAGE [--output human|json]",
		Short: "Show the properties of an image",
		Long: `Show the properties of an image. The disk size is the space that the file takes on its file system. In JSON the names are those
of qemu-img info.`,
		Example: `  qcow-csi image info disk.qcow2
  qcow-csi image info --output json disk.qcow2 | jq '."virtual-size"'`,
		Args: cobra.ExactArgs(1),
	}
	output := addOutputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return withImage(args[0], storage.ReadOnly, func(f *storage.OSFile, img *qcow.Image) error {
			actual, err := f.AllocatedBytes()
			if err != nil {
				return err
			}
			info := describe(args[0], img.Info(), actual)
			if *output == outputJSON {
				return writeJSON(cmd.OutOrStdout(), info)
			}
			return info.print(cmd.OutOrStdout())
		})
	}
	return cmd
}

// imageInfo is what qemu-img info --output=json prints.
type imageInfo struct {
	VirtualSize int64          `json:"virtual-size"`
	Filename    string         `json:"filename"`
	ClusterSize int            `json:"cluster-size"`
	Format      string         `json:"format"`
	ActualSize  int64          `json:"actual-size"`
	Specific    formatSpecific `json:"format-specific"`
	Dirty       bool           `json:"dirty-flag"`
}

type formatSpecific struct {
	Type string    `json:"type"`
	Data qcow2Info `json:"data"`
}

type qcow2Info struct {
	Compat          string `json:"compat"`
	CompressionType string `json:"compression-type"`
	LazyRefcounts   bool   `json:"lazy-refcounts"`
	RefcountBits    int    `json:"refcount-bits"`
	Corrupt         bool   `json:"corrupt"`
	ExtendedL2      bool   `json:"extended-l2"`
}

func describe(path string, i qcow.Info, actual int64) imageInfo {
	return imageInfo{
		VirtualSize: i.VirtualSize,
		Filename:    path,
		ClusterSize: i.ClusterSize,
		Format:      "qcow2",
		ActualSize:  actual,
		Specific: formatSpecific{Type: "qcow2", Data: qcow2Info{
			Compat: "1.1", CompressionType: "zlib", // the engine opens no others
			LazyRefcounts: i.LazyRefcounts, RefcountBits: i.RefcountBits, Corrupt: i.Corrupt,
		}},
		Dirty: i.Dirty,
	}
}

func (i imageInfo) print(w io.Writer) error {
	_, err := fmt.Fprintf(w, `image: %s
file format: %s
virtual size: %s (%d bytes)
disk size: %s
cluster_size: %d
refcount bits: %d
lazy refcounts: %t
dirty: %t
corrupt: %t
`, i.Filename, i.Format, humanSize(i.VirtualSize), i.VirtualSize, humanSize(i.ActualSize), i.ClusterSize,
		i.Specific.Data.RefcountBits, i.Specific.Data.LazyRefcounts, i.Dirty, i.Specific.Data.Corrupt)
	return err
}
