package main

import (
	"context"
	"errors"
	"fmt"
	"iter"

	"github.com/spf13/cobra"

	"github.com/qcow-csi/qcow-csi/qcow"
)

func newImageMeasureCommand() *cobra.Command {
	m := &measurement{format: formatQcow2, size: -1}
	cmd := &cobra.Command{
		Use:   "measure [SOURCE | --size SIZE] [-O qcow2|raw] [-f qcow2|raw] [-l SNAPSHOT] [-U] [-o NAME=VALUE,...] [--output human|json]",
		Short: "Say how large a file a conversion or a new image needs",
		Long: `Say how many bytes a file needs that a disk is converted into, or a new image of SIZE: with what the disk has now, and when every
cluster has been written to. The properties that -o sets are those of "image create". Compression is not taken into account.`,
		Example: `  qcow-csi image measure --size 1T
  qcow-csi image measure -f raw -o cluster_size=1M disk.raw
  qcow-csi image measure -O raw --output json disk.qcow2`,
		Args: cobra.MaximumNArgs(1),
	}
	output := addOutputFlag(cmd)
	m.source = addSourceFlags(cmd)
	m.creation = &creation{list: optionList{}}
	cmd.Flags().VarP(m.list, "options", "o", "properties of the planned image")
	cmd.Flags().VarP(&m.format, "target-format", "O", "format of the planned file")
	cmd.Flags().Var(&m.size, "size", "size of a new disk")
	cmd.Flags().Lookup("size").DefValue = ""
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		r, err := m.run(cmd.Context(), args)
		if err != nil {
			return err
		}
		if *output == outputJSON {
			return writeJSON(cmd.OutOrStdout(), r)
		}
		text := fmt.Sprintf("required size: %d\nfully allocated size: %d\n", r.Required, r.FullyAllocated)
		if r.Bitmaps != nil {
			text += fmt.Sprintf("bitmaps size: %d\n", *r.Bitmaps)
		}
		_, err = fmt.Fprint(cmd.OutOrStdout(), text)
		return err
	}
	return cmd
}

// measurement is what measure is asked.
type measurement struct {
	source *sourceFlags
	*creation
	format fileFormat
	size   sizeValue // -1: that of the source
}

// imageMeasure is what qemu-img measure --output=json prints, in bytes.
type imageMeasure struct {
	Required       int64  `json:"required"`
	FullyAllocated int64  `json:"fully-allocated"`
	Bitmaps        *int64 `json:"bitmaps,omitempty"` // what the bitmaps of the source take; nil where there can't be any
}

func (m *measurement) run(ctx context.Context, args []string) (r imageMeasure, err error) {
	switch {
	case len(args) == 0 && m.size < 0, len(args) == 1 && m.size >= 0:
		return r, errors.New("either an image or --size says how large the disk is")
	case len(args) == 0:
		return m.of(int64(m.size), nil)
	}
	err = m.source.with(ctx, args[0], func(disk *sourceDisk) (err error) {
		r, err = m.of(disk.Size(), disk)
		return err
	})
	return r, err
}

// of measures a disk of this size, with the content of the source if that is not nil.
func (m *measurement) of(size int64, disk *sourceDisk) (r imageMeasure, err error) {
	if m.format == formatRaw {
		return imageMeasure{Required: size, FullyAllocated: size}, m.list.mustBeOf(nil, nil)
	}
	o, err := m.planned(size)
	if err != nil {
		return r, err
	}
	var source iter.Seq2[qcow.Extent, error]
	if disk != nil {
		source = disk.Extents(0, size)
		if disk.image != nil && disk.image.Info().Version >= 3 && o.Version != 2 {
			if r.Bitmaps, err = bitmapBytes(disk.image, int64(max(o.ClusterSize, 0))); err != nil {
				return r, err
			}
		}
	}
	x, err := qcow.Measure(o, source)
	r.Required, r.FullyAllocated = x.Required, x.FullyAllocated
	return r, err
}

// planned returns what -o says of the planned image, for which no passphrase is needed.
func (m *measurement) planned(size int64) (qcow.CreateOptions, error) {
	var none passphraseFile
	m.passphrase = &none
	o, err := m.options(size)
	if errors.Is(err, errNoPassphrase) {
		err = nil
	}
	return o, err
}

// bitmapBytes returns how much the bitmaps of an image take in one with clusters of this size; 0 is the default size.
func bitmapBytes(img *qcow.Image, cluster int64) (*int64, error) {
	if cluster == 0 {
		cluster = 64 << 10
	}
	list, err := img.Bitmaps()
	if err != nil {
		return nil, err
	}
	up := func(n, unit int64) int64 { return (n + unit - 1) / unit * unit }
	var sum, directory int64
	for _, b := range list {
		if b.Inconsistent {
			continue
		}
		bits := (img.Size() + b.Granularity - 1) / b.Granularity
		clusters := ((bits+7)/8 + cluster - 1) / cluster
		sum += clusters*cluster + up(8*clusters, cluster)
		directory += up(24+int64(len(b.Name)), 8)
	}
	sum += up(directory, cluster)
	return &sum, nil
}
