package main

import (
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

func newImageStreamCommand() *cobra.Command {
	var base string
	cmd := &cobra.Command{
		Use:   "stream IMAGE [-b FILE] [-p] [--progress-fd N] [--output human|json]",
		Short: "Copy what backing files hold into an image, and do without them",
		Long: `Copy what the backing files of an image hold into it, as far as it shows through, and take them out of its chain: all of them, or those
before the one that --base names, which becomes the image's backing file. The disk reads as before. The backing files do
not change.

When it is interrupted what was copied stays, and the next time goes on from there.`,
		Example: `  qcow-csi image stream overlay.qcow2
  qcow-csi image stream -b base.qcow2 overlay.qcow2`,
		Args: cobra.ExactArgs(1),
	}
	output := addOutputFlag(cmd)
	a := addAccessFlags(cmd, false)
	progress := addProgressFlags(cmd)
	cmd.Flags().StringVarP(&base, "base", "b", "", "the backing file to keep, as the image above it calls it, or as a path")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		o := qcow.StreamOptions{}
		if base != "" {
			chain, err := a.readChain(args[0], true)
			if err != nil {
				return err
			}
			if o.Base, err = depthOf(chain, base); err != nil {
				return err
			}
			if o.BaseName, err = seenFrom(args[0], chain[o.Base-1]); err != nil {
				return err
			}
		}
		m, err := progress.meter(cmd, true)
		if err != nil {
			return err
		}
		defer m.stop()
		o.Progress = m.update
		return a.withImage(cmd.Context(), args[0], qcow.Options{}, func(_ *storage.OSFile, img *qcow.Image) error {
			if err := img.Stream(cmd.Context(), o); err != nil {
				return err
			}
			m.finish()
			i := img.Info()
			text := "Streamed into %s, whose backing file is %s"
			if i.BackingFile == "" {
				text = "Streamed into %s, which has no backing file%s"
			}
			return output.say(cmd, rebased{args[0], i.BackingFile, i.BackingFormat}, text, args[0], i.BackingFile)
		})
	}
	return cmd
}

// seenFrom returns what the image at path is to call the backing file of another image of its chain, which may lie in another folder.
func seenFrom(path string, other *layer) (string, error) {
	name := other.headers.BackingFile
	if filepath.IsAbs(name) || filepath.Dir(other.path) == filepath.Dir(path) {
		return name, nil
	}
	return filepath.Rel(filepath.Dir(path), other.backing())
}
