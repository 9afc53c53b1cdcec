package main

import (
	"errors"
	"fmt"
	"math"
	"regexp"
	"strings"

	"github.com/spf13/cobra"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// negativeSize is an argument that would be taken for letters of flags.
var negativeSize = regexp.MustCompile(`^-[0-9]`)

func newImageResizeCommand() *cobra.Command {
	var shrink bool
	preallocation := "off"
	cmd := &cobra.Command{
		Use:   "resize IMAGE [+|-]SIZE [--shrink] [--preallocation off|metadata|falloc|full] [-p] [--progress-fd N] [--output human|json]",
		Short: "Grow or shrink the virtual disk of an image",
		Long: `Make the virtual disk of an image SIZE bytes long, or longer or shorter by SIZE with a sign, rounded up to whole sectors of
512 bytes. What is gained reads as zeroes. What is cut off is lost, so --shrink must say that this is meant; internal
snapshots keep it. Partitions and filesystems on the disk are not adapted.`,
		Example: `  qcow-csi image resize disk.qcow2 20G
  qcow-csi image resize disk.qcow2 +512M
  qcow-csi image resize --shrink disk.qcow2 -5G`,
		DisableFlagParsing: true, // see parseSigned
	}
	output := addOutputFlag(cmd)
	a := addAccessFlags(cmd, false)
	cmd.Flags().BoolVar(&shrink, "shrink", false, "let the disk become smaller, which loses what is behind its new end")
	cmd.Flags().StringVar(&preallocation, "preallocation", preallocation, "what of the gain is allocated at once: off, metadata, falloc or full")
	progress := addProgressFlags(cmd)
	var operands []string
	cmd.Args = func(cmd *cobra.Command, args []string) (err error) {
		operands, err = parseSigned(cmd, args)
		return err
	}
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if operands == nil {
			return cmd.Help()
		}
		path := operands[0]
		p, err := qcow.ParsePreallocation(preallocation)
		if err != nil {
			return err
		}
		m, err := progress.meter(cmd, true)
		if err != nil {
			return err
		}
		defer m.stop()
		return a.withImage(cmd.Context(), path, qcow.Options{}, func(_ *storage.OSFile, img *qcow.Image) error {
			old := img.Size()
			size, err := newSize(old, operands[1])
			if err != nil {
				return err
			}
			if size < old && !shrink {
				return fmt.Errorf("a disk of %d bytes loses data when it becomes %d long; --shrink does it nevertheless", old, size)
			}
			if err := img.ResizeWith(cmd.Context(), size, qcow.ResizeOptions{Preallocation: p, Progress: m.update}); err != nil {
				return err
			}
			m.finish()
			return output.say(cmd, resized{path, old, size}, "Resized %s from %d to %s (%d bytes)", path, old, humanSize(size), size)
		})
	}
	return cmd
}

// resized is what resize prints in JSON.
type resized struct {
	Filename string `json:"filename"`
	Before   int64  `json:"before"`
	After    int64  `json:"after"`
}

// parseSigned parses the flags, but takes what looks like a negative number for an argument. It returns nil where help is asked for.
func parseSigned(cmd *cobra.Command, args []string) ([]string, error) {
	var flags, sizes []string
	for _, arg := range args {
		if negativeSize.MatchString(arg) {
			sizes = append(sizes, arg)
		} else {
			flags = append(flags, arg)
		}
	}
	cmd.DisableFlagParsing = false
	defer func() { cmd.DisableFlagParsing = true }()
	if err := cmd.ParseFlags(flags); err != nil {
		return nil, err
	}
	if help, err := cmd.Flags().GetBool("help"); err != nil || help {
		return nil, err
	}
	operands := append(cmd.Flags().Args(), sizes...)
	return operands, cobra.ExactArgs(2)(cmd, operands)
}

// newSize returns the size in bytes that the argument asks for.
func newSize(old int64, arg string) (int64, error) {
	by, plus := strings.CutPrefix(arg, "+")
	by, minus := strings.CutPrefix(by, "-")
	size, err := parseSize(by)
	switch {
	case err != nil:
		return 0, err
	case plus && minus:
		return 0, fmt.Errorf("size %q has two signs", arg)
	case plus && size > math.MaxInt64-old:
		return 0, fmt.Errorf("%d bytes more than %d are too large", size, old)
	case plus:
		size += old
	case minus && size > old:
		return 0, fmt.Errorf("a disk of %d bytes can't become %d shorter", old, size)
	case minus:
		size = old - size
	}
	if size = roundUp(size); size < 0 {
		return 0, errors.New("the size is too large")
	}
	return size, nil
}
