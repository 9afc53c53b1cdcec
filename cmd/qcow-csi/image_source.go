package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"

	"github.com/spf13/cobra"

	"github.com/qcow-csi/qcow-csi/qcow"
)

// fileFormat is the format of a file, as a flag.
type fileFormat string

func (f *fileFormat) String() string { return string(*f) }
func (f *fileFormat) Type() string   { return "qcow2|raw" }

// Set implements pflag.Value.
func (f *fileFormat) Set(s string) error {
	switch s {
	case formatQcow2, formatRaw:
		*f = fileFormat(s)
		return nil
	}
	return errors.New(`must be "qcow2" or "raw"`)
}

// sourceFlags are how a command opens a disk that it reads.
type sourceFlags struct {
	*access
	format   fileFormat
	snapshot *string
}

func addSourceFlags(cmd *cobra.Command) *sourceFlags {
	s := &sourceFlags{access: addAccessFlags(cmd, true), format: formatQcow2, snapshot: addSnapshotFlag(cmd)}
	cmd.Flags().VarP(&s.format, "source-format", "f", "format of the file that is read; it is never guessed")
	return s
}

func addSnapshotFlag(cmd *cobra.Command) *string {
	return cmd.Flags().StringP("snapshot", "l", "", "read what an internal snapshot keeps, given by ID or name")
}

// with runs do on the disk that is in the file at path.
func (s *sourceFlags) with(ctx context.Context, path string, do func(disk *sourceDisk) error) (err error) {
	var disk *sourceDisk
	if s.format == formatQcow2 {
		_, img, err := s.openImage(ctx, path, qcow.Options{ReadOnly: true, Snapshot: *s.snapshot})
		if err != nil {
			return err
		}
		disk = &sourceDisk{Source: img, Closer: img, ctx: ctx, path: path, image: img}
	} else if disk, err = s.openRaw(ctx, path); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	defer func() { err = errors.Join(err, disk.named(disk.Close())) }()
	return do(disk)
}

func (s *sourceFlags) openRaw(ctx context.Context, path string) (*sourceDisk, error) {
	if *s.snapshot != "" || s.passphrase != "" {
		return nil, errors.New("a raw file has neither snapshots nor a passphrase")
	}
	f, err := openFile(path, s.mode(true))
	if err != nil {
		return nil, err
	}
	disk, err := qcow.Raw(f)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &sourceDisk{Source: disk, Closer: f, ctx: ctx, path: path}, nil
}

// sourceDisk is a disk that is read. Its errors name it: those of a copy may as well be its target's.
type sourceDisk struct {
	qcow.Source
	io.Closer
	ctx   context.Context // ends what Extents describes
	path  string
	image *qcow.Image // nil for a raw file
}

func (d *sourceDisk) named(err error) error {
	if err == nil || errors.Is(err, io.EOF) {
		return err
	}
	return fmt.Errorf("%s: %w", d.path, err)
}

// ReadAt implements io.ReaderAt.
func (d *sourceDisk) ReadAt(p []byte, off int64) (int, error) {
	n, err := d.Source.ReadAt(p, off)
	return n, d.named(err)
}

// Extents implements qcow.Source.
func (d *sourceDisk) Extents(off, n int64) iter.Seq2[qcow.Extent, error] {
	return func(yield func(qcow.Extent, error) bool) {
		for e, err := range interrupted(d.ctx, d.Source.Extents(off, n)) {
			if !yield(e, d.named(err)) {
				return
			}
		}
	}
}

// interrupted returns the extents up to the moment when ctx is done, and then its error.
func interrupted(ctx context.Context, extents iter.Seq2[qcow.Extent, error]) iter.Seq2[qcow.Extent, error] {
	return func(yield func(qcow.Extent, error) bool) {
		for e, err := range extents {
			if ctxErr := ctx.Err(); ctxErr != nil {
				yield(qcow.Extent{}, ctxErr)
				return
			}
			if !yield(e, err) {
				return
			}
		}
	}
}

// paddedDisk is a disk with zeroes behind its end, up to the size that it is given, which is no less than its own.
type paddedDisk struct {
	*sourceDisk
	size int64
}

// Size implements qcow.Source.
func (d paddedDisk) Size() int64 { return d.size }

// ReadAt implements io.ReaderAt, inside the disk.
func (d paddedDisk) ReadAt(p []byte, off int64) (int, error) {
	inside := int(min(int64(len(p)), max(d.sourceDisk.Size()-off, 0)))
	if n, err := d.sourceDisk.ReadAt(p[:inside], off); n < inside {
		return n, err
	}
	clear(p[inside:])
	return len(p), nil
}

// Extents implements qcow.Source.
func (d paddedDisk) Extents(off, n int64) iter.Seq2[qcow.Extent, error] {
	return func(yield func(qcow.Extent, error) bool) {
		inside := min(n, max(d.sourceDisk.Size()-off, 0))
		for e, err := range d.sourceDisk.Extents(off, inside) {
			if !yield(e, err) || err != nil {
				return
			}
		}
		if inside < n {
			yield(qcow.Extent{Offset: off + inside, Length: n - inside, Kind: qcow.ExtentZero}, nil)
		}
	}
}
