package main

import (
	"errors"

	"github.com/spf13/cobra"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

func newImageRebaseCommand() *cobra.Command {
	var b backingFlags
	var unsafe bool
	cmd := &cobra.Command{
		Use:   "rebase IMAGE -b FILE -F qcow2|raw [-u] [-p] [--progress-fd N] [--output human|json]",
		Short: "Give an image another backing file",
		Long: `Give an image another backing file, or none with -b "". The disk reads as before: what the two backing files do not have in common is
copied into the image first. FILE is relative to the folder of the image.

With --unsafe nothing is read and nothing copied, only the name is changed: for a backing file that was moved or renamed, or
whose content is known to be the same. Otherwise the disk is damaged by it.`,
		Example: `  qcow-csi image rebase -b new-base.qcow2 -F qcow2 overlay.qcow2
  qcow-csi image rebase -b "" overlay.qcow2
  qcow-csi image rebase -u -b ../moved/base.qcow2 -F qcow2 overlay.qcow2`,
		Args: cobra.ExactArgs(1),
	}
	output := addOutputFlag(cmd)
	a := addAccessFlags(cmd, false)
	progress := addProgressFlags(cmd)
	b.add(cmd, "b")
	cmd.Flags().BoolVarP(&unsafe, "unsafe", "u", false, "change the name only, and trust that the new backing file fits")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if !cmd.Flags().Changed("backing") {
			return errors.New(`which backing file? -b names one, -b "" means none`)
		}
		if err := b.check(); err != nil {
			return err
		}
		m, err := progress.meter(cmd, true)
		if err != nil {
			return err
		}
		defer m.stop()
		if unsafe {
			err = a.withFile(args[0], false, func(f *storage.OSFile) error { return qcow.RebaseUnsafe(f, b.file, string(b.format)) })
		} else {
			err = a.withImage(cmd.Context(), args[0], qcow.Options{}, func(_ *storage.OSFile, img *qcow.Image) error {
				passphrase, err := a.passphrase.read()
				if err != nil {
					return err
				}
				return img.Rebase(cmd.Context(), qcow.RebaseOptions{
					BackingFile: b.file, BackingFormat: string(b.format), Gate: qcow.Beside(args[0]), Passphrase: passphrase, Progress: m.update,
				})
			})
		}
		if err != nil {
			return err
		}
		m.finish()
		text := "Rebased %s to %s"
		if b.file == "" {
			text = "%s has no backing file%s"
		}
		return output.say(cmd, rebased{args[0], b.file, string(b.format)}, text, args[0], b.file)
	}
	return cmd
}

// rebased is what rebase and stream print in JSON.
type rebased struct {
	Filename      string `json:"filename"`
	Backing       string `json:"backing-filename,omitempty"`
	BackingFormat string `json:"backing-filename-format,omitempty"`
}

// backingFlags name a backing file.
type backingFlags struct {
	file   string
	format fileFormat
}

// add adds the flags; the letter of the first differs.
func (b *backingFlags) add(cmd *cobra.Command, letter string) {
	cmd.Flags().StringVarP(&b.file, "backing", letter, "", "backing file, relative to the folder of the image")
	cmd.Flags().VarP(&b.format, "backing-format", "F", "format of the backing file; it is never guessed")
}

func (b *backingFlags) check() error {
	switch {
	case b.file != "" && b.format == "":
		return errors.New("which format does the backing file have? -F says so")
	case b.file == "" && b.format != "":
		return errors.New("a format without a backing file")
	}
	return nil
}
