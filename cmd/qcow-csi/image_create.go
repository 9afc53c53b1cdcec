package main

import (
	"errors"
	"fmt"
	"math"
	"os"

	"github.com/spf13/cobra"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

func newImageCreateCommand() *cobra.Command {
	var passphrase passphraseFile
	var unsafe bool
	cmd := &cobra.Command{
		Use:   "create IMAGE [SIZE] [-o NAME=VALUE,...] [-b FILE -F qcow2|raw [-u]] [--passphrase-file FILE] [--force]",
		Short: "Make an empty image, or one on top of another",
		Long: `Make an image with a virtual disk of SIZE, which is rounded up to whole sectors of 512 bytes. It is empty, or reads as the backing
file does, whose size is the default then. The backing file is relative to the folder of the image, and so is
a data file, which is made along with the image.

What was interrupted leaves no image. A file that exists already is not overwritten without --force.

Properties, with their defaults:
  cluster_size=64K         unit of allocation, a power of two from 512 to 2M
  refcount_bits=16         width of a refcount: 1, 2, 4, 8, 16, 32 or 64
  compat=1.1               version 3 of the format; 0.10 is version 2, which has none of what follows but encrypt.* and preallocation
  compression_type=zlib    of compressed clusters; or zstd
  extended_l2=off          subclusters: 32 to a cluster, of at least 16K
  lazy_refcounts=off       writers may update refcounts late; those of this program never do
  data_file=FILE           file for the data of the disk, in place of the image
  data_file_raw=off        the data file is at any time a raw image of the disk
  preallocation=off        metadata, falloc or full: what is allocated in advance
  encrypt.format=luks      encrypt the disk, with the passphrase in --passphrase-file
  encrypt.cipher-alg=aes-256, encrypt.cipher-mode=xts, encrypt.ivgen-alg=plain64, encrypt.ivgen-hash-alg, encrypt.hash-alg=sha256
  encrypt.iter-time=2000   milliseconds that it takes to try a passphrase`,
		Example: `  qcow-csi image create disk.qcow2 10G
  qcow-csi image create -o cluster_size=1M,compression_type=zstd disk.qcow2 1.5T
  qcow-csi image create -b base.qcow2 -F qcow2 overlay.qcow2
  qcow-csi image create -o encrypt.format=luks --passphrase-file secret disk.qcow2 10G`,
		Args: cobra.RangeArgs(1, 2),
	}
	output := addOutputFlag(cmd)
	c := addCreationFlags(cmd, "b", &passphrase)
	t := addTargetFlags(cmd)
	progress := addProgressFlags(cmd)
	cmd.Flags().BoolVarP(&unsafe, "unsafe", "u", false, "don't look whether the backing file is there")
	cmd.Flags().Var(&passphrase, "passphrase-file", "file with the passphrase of an encrypted image; one newline at its end is dropped")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		size, err := c.size(args, unsafe)
		if err != nil {
			return err
		}
		o, err := c.options(size)
		if err != nil {
			return err
		}
		m, err := progress.meter(cmd, true)
		if err != nil {
			return err
		}
		defer m.stop()
		if o.Preallocation > qcow.PreallocationMetadata {
			o.Progress = m.update
		}
		err = t.createImage(args[0], o.DataFileName, func(f, data *storage.OSFile) error {
			if data != nil {
				o.DataFile = data
			}
			return qcow.CreateContext(cmd.Context(), f, o)
		})
		if err != nil {
			return err
		}
		m.finish()
		return sayMade(cmd, output, "Created", args[0], formatQcow2)
	}
	return cmd
}

// size returns the size that is asked for, or that of the backing file, which must be there unless that is unsafe.
func (c *creation) size(args []string, unsafe bool) (int64, error) {
	if err := c.list.mustBeOf(creationOptions, creationHints); err != nil {
		return 0, err
	}
	b, err := c.backingFile()
	if err != nil {
		return 0, err
	}
	size := int64(-1)
	if b.file != "" && !unsafe {
		l, _, err := readBacking(qcow.Beside(args[0]), &layer{path: args[0], headers: b.header()})
		if err != nil {
			return 0, err
		}
		size = l.size
	}
	if len(args) == 2 {
		return parseSize(args[1])
	}
	if size < 0 {
		return 0, errors.New("which size? No backing file is read that it could be taken from")
	}
	return size, nil
}

// header returns a header that names the backing file.
func (b *backingFlags) header() *headers {
	h := &headers{Header: &format.Header{BackingFile: b.file}}
	h.SetExtension(format.ExtBackingFormat, []byte(b.format))
	return h
}

// sayMade says what has become of the file at path, in JSON as "image info" does.
func sayMade(cmd *cobra.Command, output *outputFormat, verb, path, fileFormat string) error {
	var l *layer
	err := (&access{shared: true}).withFile(path, true, func(f *storage.OSFile) (err error) {
		l, err = readLayer(f, path, fileFormat)
		return err
	})
	if err != nil {
		return err
	}
	i, err := l.info()
	if err != nil {
		return err
	}
	detail := ""
	if l.headers != nil {
		detail = fmt.Sprintf(", clusters of %s, refcounts of %d bits", humanSize(int64(i.ClusterSize)), i.Specific.Data.RefcountBits)
	}
	return output.say(cmd, i, "%s %s: %s (%d bytes)%s", verb, path, humanSize(i.VirtualSize), i.VirtualSize, detail)
}

// roundUp rounds n up to whole sectors, and leaves sizes that no image can have to the engine to refuse.
func roundUp(n int64) int64 {
	if n > math.MaxInt64-format.SectorSize {
		return n
	}
	return (n + format.SectorSize - 1) / format.SectorSize * format.SectorSize
}

// createImage makes the image at path and the data file that it names, if it does. Both are there in the end, or none: fill is given
// the latter too.
func (t target) createImage(path, dataName string, fill func(f, data *storage.OSFile) error) error {
	if dataName == "" {
		return t.create(path, func(f *storage.OSFile) error { return fill(f, nil) })
	}
	dataPath, made := beside(path, dataName), false
	err := t.create(path, func(f *storage.OSFile) error {
		err := t.create(dataPath, func(data *storage.OSFile) error { return fill(f, data) })
		made = err == nil
		return err
	})
	if err != nil && made {
		err = errors.Join(err, os.Remove(dataPath))
	}
	return err
}
