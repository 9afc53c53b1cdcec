package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// bitmapAction is one of the things to do to a bitmap.
type bitmapAction struct {
	verb   string
	source string // of "merge"
}

// bitmapActions are the actions in the order in which the command line names them.
type bitmapActions []bitmapAction

// bitmapFlag is a flag that adds an action.
type bitmapFlag struct {
	actions *bitmapActions
	verb    string
}

func (f bitmapFlag) String() string { return "" }

func (f bitmapFlag) Type() string {
	if f.verb == "merge" {
		return "source"
	}
	return "bool"
}

// Set implements pflag.Value.
func (f bitmapFlag) Set(s string) error {
	if f.verb != "merge" && s != "true" {
		return fmt.Errorf("--%s takes no value", f.verb)
	}
	*f.actions = append(*f.actions, bitmapAction{f.verb, s})
	return nil
}

func newImageBitmapCommand() *cobra.Command {
	var b bitmapCommand
	granularity := sizeValue(0)
	cmd := &cobra.Command{
		Use: "bitmap IMAGE [NAME (--add [-g SIZE] | --remove | --clear | --enable | --disable | --merge SOURCE [-b FILE])...]" +
			" [--output human|json]",
		Short: "List and change the bitmaps that say what of a disk was changed",
		Long: `List the dirty bitmaps of an image, with how many bytes they say were changed, or change one of them. What is to be done to it is done in
the order in which it is given; each takes effect as a whole.

--merge adds what another bitmap says was changed: one of the same image, or of the one that -b names.`,
		Example: `  qcow-csi image bitmap disk.qcow2
  qcow-csi image bitmap disk.qcow2 monday --add -g 64K
  qcow-csi image bitmap disk.qcow2 week --add --disable --merge monday --merge tuesday
  qcow-csi image bitmap disk.qcow2 monday --remove`,
		Args: cobra.RangeArgs(1, 2),
	}
	b.output = addOutputFlag(cmd)
	b.access = addAccessFlags(cmd, false)
	flags := cmd.Flags()
	for _, f := range []struct{ verb, usage string }{
		{"add", "make the bitmap; it records from then on what changes"},
		{"remove", "remove the bitmap"},
		{"clear", "let it say that nothing was changed"},
		{"enable", "let it record what changes"},
		{"disable", "let it record nothing"},
	} {
		flags.Var(bitmapFlag{&b.actions, f.verb}, f.verb, f.usage)
		flags.Lookup(f.verb).NoOptDefVal = "true"
	}
	flags.Var(bitmapFlag{&b.actions, "merge"}, "merge", "add what another bitmap says was changed")
	flags.VarP(&granularity, "granularity", "g", "bytes of the disk that a bit of the new bitmap stands for; 0 is the size of a cluster, within 4K and 64K")
	flags.StringVarP(&b.sourceFile, "source-file", "b", "", "image that has the bitmaps to merge")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		b.granularity = int64(granularity)
		switch {
		case len(args) == 1 && len(b.actions) > 0:
			return errors.New("which bitmap? Its name comes after the image")
		case len(args) == 1:
			return b.list(cmd, args[0])
		case len(b.actions) == 0:
			return errors.New("what is to be done? --add, --remove, --clear, --enable, --disable and --merge say so")
		}
		return b.change(cmd, args[0], args[1])
	}
	return cmd
}

// bitmapCommand is what the bitmap command is asked.
type bitmapCommand struct {
	*access
	output      *outputFormat
	actions     bitmapActions
	granularity int64
	sourceFile  string
}

// listedBitmap is what the command prints of a bitmap in JSON.
type listedBitmap struct {
	Name         string `json:"name"`
	Granularity  int64  `json:"granularity"` // bytes
	Enabled      bool   `json:"enabled"`
	Inconsistent bool   `json:"inconsistent"`
	Dirty        int64  `json:"dirty"` // bytes
}

func (b *bitmapCommand) list(cmd *cobra.Command, path string) error {
	return b.withImage(cmd.Context(), path, qcow.Options{ReadOnly: true, WithoutBacking: true}, func(_ *storage.OSFile, img *qcow.Image) error {
		bitmaps, err := img.Bitmaps()
		if err != nil {
			return err
		}
		list := []listedBitmap{}
		var text strings.Builder
		fmt.Fprintf(&text, "%-24s %12s %12s %s\n", "Name", "Granularity", "Dirty", "State")
		for _, x := range bitmaps {
			list = append(list, listedBitmap{x.Name, x.Granularity, x.Enabled, x.Inconsistent, x.Count})
			state := "disabled"
			switch {
			case x.Inconsistent:
				state = "inconsistent"
			case x.Enabled:
				state = "enabled"
			}
			fmt.Fprintf(&text, "%-24s %12s %12s %s\n", printable(x.Name), humanSize(x.Granularity), humanSize(x.Count), state)
		}
		if *b.output == outputJSON {
			return writeJSON(cmd.OutOrStdout(), list)
		}
		if len(list) > 0 {
			_, err = fmt.Fprint(cmd.OutOrStdout(), text.String())
		}
		return err
	})
}

func (b *bitmapCommand) change(cmd *cobra.Command, path, name string) error {
	var verbs []string
	for _, a := range b.actions {
		verbs = append(verbs, a.verb)
	}
	err := b.withImage(cmd.Context(), path, qcow.Options{}, func(_ *storage.OSFile, img *qcow.Image) error {
		for _, a := range b.actions {
			if err := b.apply(cmd.Context(), img, name, a); err != nil {
				return fmt.Errorf("--%s: %w", a.verb, err)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return b.output.say(cmd, changedBitmap{path, name, verbs}, "Bitmap %s of %s: %s", name, path, strings.Join(verbs, ", "))
}

// changedBitmap is what the command prints of its changes in JSON.
type changedBitmap struct {
	Filename string   `json:"filename"`
	Name     string   `json:"name"`
	Actions  []string `json:"actions"`
}

func (b *bitmapCommand) apply(ctx context.Context, img *qcow.Image, name string, a bitmapAction) error {
	switch a.verb {
	case "add":
		return img.AddBitmap(ctx, name, qcow.BitmapOptions{Granularity: b.granularity})
	case "remove":
		return img.RemoveBitmap(ctx, name)
	case "clear":
		return img.ClearBitmap(ctx, name)
	case "enable":
		return img.EnableBitmap(ctx, name)
	case "disable":
		return img.DisableBitmap(ctx, name)
	}
	if b.sourceFile == "" {
		return img.MergeBitmap(ctx, name, a.source)
	}
	return b.withImage(ctx, b.sourceFile, qcow.Options{ReadOnly: true}, func(_ *storage.OSFile, source *qcow.Image) error {
		return img.MergeExtents(ctx, name, source.DirtyExtents(a.source, 0, source.Size()))
	})
}
