package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// conversion is a conversion of one disk into another.
type conversion struct {
	source *sourceFlags
	target *target
	*creation
	progress *progressFlags

	format     fileFormat // of the target
	passphrase passphraseFile
	compress   bool
	sparse     sizeValue
	existing   bool // the target is there
	isZero     bool // and reads as zeroes
	bitmaps    bool
}

func newImageConvertCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "convert SOURCE TARGET -O qcow2|raw [-f qcow2|raw] [-l SNAPSHOT] [-U] [-c] [-o NAME=VALUE,...]" +
			" [-B FILE -F qcow2|raw] [-S SIZE] [--bitmaps] [-n [--target-is-zero]] [--force] [-p] [--progress-fd N]",
		Short: "Copy a disk into a new file of this or another format",
		Long: `Copy what a disk reads as into a new file: from qcow2 or raw to qcow2 or raw. Holes, and zeroes wherever there are 4K of them at a
time, take no space in the target. The properties that -o sets are those of "image create".

The target is there when it is whole and durable, and not before; what fails or is interrupted leaves nothing behind. A file that
exists already is not overwritten without --force. With -n the target exists and is large enough, and is written to as it is.

With -B the target lies on a backing file and gets only what differs from that, whatever the backing file holds.`,
		Example: `  qcow-csi image convert -f raw -O qcow2 disk.raw disk.qcow2
  qcow-csi image convert -O qcow2 -c -o compression_type=zstd disk.qcow2 small.qcow2
  qcow-csi image convert -O raw -l before-upgrade disk.qcow2 old.raw
  qcow-csi image convert -O qcow2 -B base.qcow2 -F qcow2 disk.qcow2 overlay.qcow2`,
		Args: cobra.ExactArgs(2),
	}
	output := addOutputFlag(cmd)
	c := addConversionFlags(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := c.check(); err != nil {
			return err
		}
		m, err := c.progress.meter(cmd, true)
		if err != nil {
			return err
		}
		defer m.stop()
		if err := c.run(cmd.Context(), args[0], args[1], m.update); err != nil {
			return err
		}
		m.finish()
		return sayMade(cmd, output, "Converted "+args[0]+" to", args[1], string(c.format))
	}
	return cmd
}

// addConversionFlags adds the flags of a conversion, and returns the one that they ask for.
func addConversionFlags(cmd *cobra.Command) *conversion {
	c := &conversion{sparse: 4096}
	c.source = addSourceFlags(cmd)
	c.target = addTargetFlags(cmd)
	c.creation = addCreationFlags(cmd, "B", &c.passphrase)
	c.progress = addProgressFlags(cmd)
	flags := cmd.Flags()
	flags.VarP(&c.format, "target-format", "O", "format of the target")
	flags.Var(&c.passphrase, "target-passphrase-file", "file with the passphrase of the target")
	flags.BoolVarP(&c.compress, "compress", "c", false, "store data compressed")
	flags.VarP(&c.sparse, "sparse-size", "S", "how many bytes of zeroes are left out; 0 looks for none, and allocates the whole target")
	flags.BoolVarP(&c.existing, "no-create", "n", false, "write to a target that exists already")
	flags.BoolVar(&c.isZero, "target-is-zero", false, "with -n: the target reads as zeroes, which need not be written")
	flags.BoolVar(&c.bitmaps, "bitmaps", false, "copy the bitmaps too")
	return c
}

// check refuses flags that contradict each other.
func (c *conversion) check() error {
	backing, err := c.backingFile()
	switch {
	case err != nil:
		return err
	case c.format == "":
		return errors.New("which format is the target to have? -O says so")
	case c.format == formatRaw && (c.compress || c.bitmaps || c.passphrase != "" || backing.file != ""):
		return errors.New("a raw file has no compression, bitmaps, passphrase or backing file")
	case c.isZero && !c.existing:
		return errors.New("--target-is-zero without -n")
	case c.existing && (len(c.list) > 0 || backing.file != "" || c.target.force):
		return errors.New("with -n there is nothing to create, and so -o, -B and --force make no sense")
	case c.bitmaps && *c.source.snapshot != "":
		return errors.New("a snapshot has no bitmaps")
	case c.bitmaps && c.source.format == formatRaw:
		return errors.New("a raw file has no bitmaps")
	}
	return nil
}

func (c *conversion) run(ctx context.Context, from, to string, progress func(done, total int64)) error {
	return c.source.with(ctx, from, func(disk *sourceDisk) error {
		o := qcow.CopyOptions{Compress: c.compress, SparseSize: int(c.sparse), Progress: progress}
		if c.sparse == 0 {
			o.SparseSize = -1
		}
		switch {
		case c.existing:
			o.TargetIsZero = c.isZero
			return c.refill(ctx, to, disk, o)
		case c.format == formatRaw:
			return c.makeRaw(ctx, to, disk, o)
		}
		return c.makeImage(ctx, to, disk, o)
	})
}

// refill copies the disk into a target that exists.
func (c *conversion) refill(ctx context.Context, to string, disk *sourceDisk, o qcow.CopyOptions) error {
	a := access{passphrase: c.passphrase}
	if c.format == formatRaw {
		return a.withFile(to, false, func(f *storage.OSFile) error {
			raw, err := qcow.Raw(f)
			if err != nil {
				return err
			}
			return qcow.Copy(ctx, raw, disk, o)
		})
	}
	return a.withImage(ctx, to, qcow.Options{}, func(_ *storage.OSFile, img *qcow.Image) error {
		return c.copy(ctx, img, disk, o)
	})
}

// makeRaw makes a raw file.
func (c *conversion) makeRaw(ctx context.Context, to string, disk *sourceDisk, o qcow.CopyOptions) error {
	if err := c.list.mustBeOf([]string{"preallocation"}, nil); err != nil {
		return err
	}
	r, preallocation := optionReader{list: c.list}, qcow.PreallocationOff
	r.read("preallocation", func(value string) (err error) {
		if preallocation, err = qcow.ParsePreallocation(value); preallocation == qcow.PreallocationMetadata {
			err = errors.New("a raw file has no metadata")
		}
		return err
	})
	if r.err != nil {
		return r.err
	}
	if c.sparse == 0 && preallocation == qcow.PreallocationOff {
		preallocation = qcow.PreallocationFalloc
	}
	return c.target.create(to, func(f *storage.OSFile) error {
		if err := f.Truncate(disk.Size()); err != nil {
			return err
		}
		raw, err := qcow.Raw(f)
		if err != nil {
			return err
		}
		switch preallocation {
		case qcow.PreallocationFull:
			err = raw.WriteZeroes(0, raw.Size(), false)
		case qcow.PreallocationFalloc:
			err = f.Allocate(0, raw.Size())
		default:
		}
		if err != nil {
			return err
		}
		o.TargetIsZero = true
		return qcow.Copy(ctx, raw, disk, o)
	})
}

// makeImage makes an image.
func (c *conversion) makeImage(ctx context.Context, to string, disk *sourceDisk, copying qcow.CopyOptions) error {
	o, err := c.options(disk.Size())
	if err != nil {
		return err
	}
	if c.sparse == 0 && !c.compress && o.BackingFile == "" && o.Preallocation == qcow.PreallocationOff {
		o.Preallocation = qcow.PreallocationFalloc
	}
	return c.target.createImage(to, o.DataFileName, func(f, data *storage.OSFile) error {
		if data != nil {
			o.DataFile = data
		}
		if err := qcow.CreateContext(ctx, f, o); err != nil {
			return err
		}
		opening := qcow.Options{Gate: gateTo(to, data)}
		if o.Encryption != nil {
			opening.Passphrase = o.Encryption.Passphrase
		}
		img, err := qcow.OpenContext(ctx, f, opening)
		if err != nil {
			return err
		}
		copying.TargetIsZero = o.BackingFile == ""
		return errors.Join(c.copy(ctx, img, disk, copying), img.Close())
	})
}

// gateTo is the gate for an image that is going to be at path, and whose data file, if it has one, is open.
func gateTo(path string, data *storage.OSFile) qcow.Gate {
	return func(r qcow.Reference) (qcow.Opened, error) {
		if r.Role == qcow.DataFile {
			return qcow.Opened{File: data, Format: formatRaw}, nil
		}
		return qcow.Beside(path)(r)
	}
}

// copy copies the disk into an image.
func (c *conversion) copy(ctx context.Context, img *qcow.Image, disk *sourceDisk, o qcow.CopyOptions) error {
	var target qcow.Target = img
	if img.Info().BackingFile != "" && !c.existing {
		// The difference works in clusters, and looks for zeroes itself.
		target = &difference{img: img, compress: o.Compress, unit: img.Info().ClusterSize}
		o = qcow.CopyOptions{SparseSize: -1, Progress: o.Progress}
	}
	source := paddedDisk{disk, max(disk.Size(), img.Size())} // a difference works in whole clusters
	if err := qcow.Copy(ctx, target, source, o); err != nil || !c.bitmaps {
		return err
	}
	return copyBitmaps(ctx, img, disk.image)
}

// copyBitmaps gives img the bitmaps of source, but for those that say nothing.
func copyBitmaps(ctx context.Context, img, source *qcow.Image) error {
	list, err := source.Bitmaps()
	if err != nil {
		return err
	}
	for _, b := range list {
		if b.Inconsistent {
			continue
		}
		if err := img.AddBitmap(ctx, b.Name, qcow.BitmapOptions{Granularity: b.Granularity, Disabled: true}); err != nil {
			return err
		}
		if err := img.MergeExtents(ctx, b.Name, source.DirtyExtents(b.Name, 0, source.Size())); err != nil {
			return fmt.Errorf("bitmap %q: %w", b.Name, err)
		}
		if !b.Enabled {
			continue
		}
		if err := img.EnableBitmap(ctx, b.Name); err != nil {
			return err
		}
	}
	return nil
}
