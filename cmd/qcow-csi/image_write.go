package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

func newImageWriteCommand() *cobra.Command {
	var from string
	cmd := &cobra.Command{
		Use:   "write IMAGE OFFSET [--from FILE]",
		Short: "Write bytes to the virtual disk",
		Long: `Write what comes from standard input, or is in a file, to the virtual disk from OFFSET on. It is durable when the command succeeds.
When it is interrupted, or reaches the end of the disk, what was written so far stays.`,
		Example: `  printf hello | qcow-csi image write disk.qcow2 4096
  qcow-csi image write disk.qcow2 1M --from piece`,
		Args: cobra.ExactArgs(2),
	}
	output := addOutputFlag(cmd)
	a := addAccessFlags(cmd, false)
	cmd.Flags().StringVar(&from, "from", "", "file to be read, instead of standard input")
	cmd.RunE = func(cmd *cobra.Command, args []string) (err error) {
		off, err := parseSize(args[1])
		if err != nil {
			return err
		}
		in := cmd.InOrStdin()
		if from != "" {
			f, err := os.Open(from)
			if err != nil {
				return err
			}
			defer f.Close() //nolint:errcheck // it was only read
			in = f
		}
		return a.withImage(cmd.Context(), args[0], qcow.Options{}, func(_ *storage.OSFile, img *qcow.Image) error {
			n, err := copyIn(cmd.Context(), img, off, in)
			if err := errors.Join(err, img.Flush()); err != nil {
				return fmt.Errorf("after %d bytes: %w", n, err)
			}
			return output.say(cmd, written{args[0], off, n}, "Wrote %d bytes to %s at %d", n, args[0], off)
		})
	}
	return cmd
}

// written is what write prints in JSON, in bytes.
type written struct {
	Filename string `json:"filename"`
	Offset   int64  `json:"offset"`
	Length   int64  `json:"length"`
}

// copyIn writes what it reads from r to the disk at off, and returns how many bytes.
func copyIn(ctx context.Context, img *qcow.Image, off int64, r io.Reader) (done int64, err error) {
	if size := img.Size(); off > size {
		return 0, fmt.Errorf("%d is behind the end of the virtual disk of %d bytes", off, size)
	}
	r = &interruptible{ctx: ctx, r: r}
	for b := make([]byte, pieceBytes); ; {
		n, err := io.ReadFull(r, b)
		end := errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
		if err != nil && !end {
			return done, err
		}
		left := img.Size() - off - done
		k, err := img.WriteAt(b[:min(int64(n), left)], off+done)
		done += int64(k)
		switch {
		case err != nil:
			return done, err
		case int64(n) > left:
			return done, fmt.Errorf("the rest does not fit into the virtual disk of %d bytes", img.Size())
		case end:
			return done, nil
		}
	}
}

// interruptible is a reader whose Read returns when ctx is done, although the one of r, from a terminal say, may still
// wait for something. Nothing reads after that.
type interruptible struct {
	ctx    context.Context
	r      io.Reader
	buffer []byte // a Read that was given up may still write into it
}

func (i *interruptible) Read(p []byte) (int, error) {
	if err := i.ctx.Err(); err != nil {
		return 0, err
	}
	if len(i.buffer) < len(p) {
		i.buffer = make([]byte, len(p))
	}
	type result struct {
		n   int
		err error
	}
	read := make(chan result, 1)
	go func() {
		n, err := i.r.Read(i.buffer[:len(p)])
		read <- result{n, err}
	}()
	select {
	case <-i.ctx.Done():
		return 0, i.ctx.Err()
	case r := <-read:
		return copy(p, i.buffer[:r.n]), r.err
	}
}
