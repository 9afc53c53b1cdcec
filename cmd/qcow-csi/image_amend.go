package main

import (
	"errors"
	"strings"

	"github.com/spf13/cobra"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/luks"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// amendOptions are the options of an image that can be changed.
var amendOptions = []string{"compat", "data_file", "data_file_raw", "encrypt.iter-time", "lazy_refcounts", "refcount_bits"}

var amendHints = map[string]string{ //nolint:gosec // names of options, no credentials
	"size":               `"image resize" changes it`,
	"backing_file":       `"image rebase" changes it`,
	"backing_fmt":        `"image rebase" changes it`,
	"encrypt.new-secret": "--add-passphrase-file adds a passphrase",
	"encrypt.old-secret": "--remove-passphrase-file removes a passphrase",
	"encrypt.keyslot":    "--remove-key-slot removes one",
	"encrypt.state":      "--add-passphrase-file adds a passphrase, --remove-passphrase-file removes one",
}

func newImageAmendCommand() *cobra.Command {
	var passphrase, added, removed passphraseFile
	var slots []int
	list := optionList{}
	cmd := &cobra.Command{
		Use: "amend IMAGE [-o NAME=VALUE,...] [--passphrase-file FILE [--add-passphrase-file FILE]] [--remove-passphrase-file FILE]" +
			" [--remove-key-slot N]... [-p] [--progress-fd N] [--output human|json]",
		Short: "Change the properties of an image",
		Long: `Change properties of an image; what the disk and its snapshots read as does not change:

  compat=1.1|0.10      version 3 or 2 of the format
  refcount_bits=N      width of a refcount
  lazy_refcounts=on|off
  data_file=NAME       how the image calls its data file, which is neither moved nor looked at
  data_file_raw=off    the data file is no raw image of the disk any more
  encrypt.iter-time=N  milliseconds that it takes to try the passphrase that is added

An encrypted image can have several passphrases. One that is removed opens the image no more, but for old copies of it; the
last one stays.

An interruption leaves a sound image, with a part of that done.`,
		Example: `  qcow-csi image amend -o compat=1.1 old.qcow2
  qcow-csi image amend -o refcount_bits=64 disk.qcow2
  qcow-csi image amend --passphrase-file old --add-passphrase-file new --remove-passphrase-file old disk.qcow2`,
		Args: cobra.ExactArgs(1),
	}
	output := addOutputFlag(cmd)
	progress := addProgressFlags(cmd)
	flags := cmd.Flags()
	flags.VarP(list, "options", "o", "properties to change: "+strings.Join(amendOptions, ", "))
	flags.Var(&passphrase, "passphrase-file", "file with a passphrase that opens the image; one newline at its end is dropped")
	flags.Var(&added, "add-passphrase-file", "file with a passphrase that is to open the image too")
	flags.Var(&removed, "remove-passphrase-file", "file with a passphrase that is to open the image no more")
	flags.IntSliceVar(&slots, "remove-key-slot", nil, "number of a key slot to be emptied")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := list.mustBeOf(amendOptions, amendHints); err != nil {
			return err
		}
		if len(list) == 0 && added == "" && removed == "" && len(slots) == 0 {
			return errors.New("nothing to change")
		}
		m, err := progress.meter(cmd, false)
		if err != nil {
			return err
		}
		defer m.stop()
		o, err := amendment(list)
		if err != nil {
			return err
		}
		for file, into := range map[*passphraseFile]*[]byte{&passphrase: &o.Passphrase, &added: &o.AddPassphrase, &removed: &o.RemovePassphrase} {
			if *into, err = file.read(); err != nil {
				return err
			}
		}
		o.RemoveKeySlots, o.Progress = slots, m.update
		err = (&access{}).withFile(args[0], false, func(f *storage.OSFile) error { return qcow.Amend(cmd.Context(), f, o) })
		if err != nil {
			return err
		}
		m.finish()
		return sayMade(cmd, output, "Amended", args[0], formatQcow2)
	}
	return cmd
}

// amendment returns what the options ask for.
func amendment(list optionList) (qcow.AmendOptions, error) {
	r := optionReader{list: list}
	o := qcow.AmendOptions{
		Version:      r.version(),
		RefcountBits: r.number("refcount_bits"),
		DataFileName: list["data_file"],
		KeyOptions:   luks.KeyOptions{IterTime: r.iterTime()},
	}
	if set := r.flag("lazy_refcounts"); r.has("lazy_refcounts") {
		o.LazyRefcounts = &set
	}
	if set := r.flag("data_file_raw"); r.has("data_file_raw") {
		o.DataFileRaw = &set
	}
	return o, r.err
}
