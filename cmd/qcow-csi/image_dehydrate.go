package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/qcow-csi/qcow-csi/qcow/dehydrate"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

func newImageDehydrateCommand() *cobra.Command {
	var o dehydrate.Options
	cmd := &cobra.Command{
		Use:   "dehydrate IMAGE FILE [--key-material] [--redact-names] [--ambiguous] [-U] [--force] [--output human|json]",
		Short: "Take the metadata out of an image, without guest data",
		Long: `Write the metadata of an image, every table of it and no guest data, to a small file that can go with a report of damage. "image
rehydrate" makes an image of it again, in which "image check" finds what it finds in the original.

Names of snapshots and bitmaps are in the file; those of the backing file and the data file too, without --redact-names. Key
material of an encrypted image is not, without --key-material.`,
		Example: `  qcow-csi image dehydrate --redact-names damaged.qcow2 report.dump
  qcow-csi image dehydrate -U running.qcow2 report.dump`,
		Args: cobra.ExactArgs(2),
	}
	output := addOutputFlag(cmd)
	var a access
	addShareFlag(cmd, &a)
	t := addTargetFlags(cmd)
	flags := cmd.Flags()
	flags.BoolVar(&o.KeyMaterial, "key-material", false, "keep the key material: with it, a passphrase opens the original")
	flags.BoolVar(&o.RedactNames, "redact-names", false, "replace the names of the backing file and the data file")
	flags.BoolVar(&o.Ambiguous, "ambiguous", false, "keep what damage makes look like a table and like guest data")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		var r *dehydrate.Result
		err := a.withFile(args[0], true, func(f *storage.OSFile) error {
			return t.create(args[1], func(dump *storage.OSFile) (err error) {
				r, err = dehydrate.Dehydrate(cmd.Context(), f, io.NewOffsetWriter(dump, 0), o)
				return errors.Join(err, dump.Sync())
			})
		})
		if err != nil {
			return err
		}
		return output.say(cmd, describeDump(args[0], args[1], r), "%s", dumpText("Dehydrated", args[0], args[1], r))
	}
	return cmd
}

func newImageRehydrateCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "rehydrate FILE IMAGE [--force] [--output human|json]",
		Short: "Make an image of dehydrated metadata",
		Long: `Make an image of what "image dehydrate" has written. It is a sparse file as long as the original, with its tables and zeroes in place of
guest data: for looking at, not for use.`,
		Example: `  qcow-csi image rehydrate report.dump damaged.qcow2`,
		Args:    cobra.ExactArgs(2),
	}
	output := addOutputFlag(cmd)
	t := addTargetFlags(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		dump, err := os.Open(args[0])
		if err != nil {
			return err
		}
		defer dump.Close() //nolint:errcheck // it was only read
		var r *dehydrate.Result
		err = t.create(args[1], func(f *storage.OSFile) (err error) {
			if r, err = dehydrate.Rehydrate(cmd.Context(), dump, f); err != nil {
				err = fmt.Errorf("%s: %w", args[0], err)
			}
			return err
		})
		if err != nil {
			return err
		}
		return output.say(cmd, describeDump(args[0], args[1], r), "%s", dumpText("Rehydrated", args[0], args[1], r))
	}
	return cmd
}

// dumpInfo is what dehydrate and rehydrate print in JSON.
type dumpInfo struct {
	Source        string    `json:"source"`
	Filename      string    `json:"filename"`
	Length        int64     `json:"length"`   // of the image in bytes
	Metadata      int64     `json:"metadata"` // bytes of it that are in the dump
	KeysZeroed    bool      `json:"keys-zeroed"`
	NamesRedacted bool      `json:"names-redacted"`
	Incomplete    bool      `json:"incomplete"`
	LeftOut       []leftOut `json:"left-out,omitempty"`
}

// leftOut is something that could be metadata, and is not in a dump.
type leftOut struct {
	Table  string `json:"table"`
	Offset uint64 `json:"offset"`
	Reason string `json:"reason"`
}

func describeDump(source, path string, r *dehydrate.Result) dumpInfo {
	i := dumpInfo{source, path, r.Length, r.Metadata, r.KeysZeroed, r.NamesRedacted, r.Incomplete, nil}
	for _, o := range r.Omissions {
		i.LeftOut = append(i.LeftOut, leftOut{o.Table, uint64(o.Offset), o.Reason})
	}
	return i
}

// dumpText says the same to people.
func dumpText(verb, source, path string, r *dehydrate.Result) string {
	text := []string{fmt.Sprintf("%s %s to %s: %s of metadata, of a file of %s", verb, source, path, humanSize(r.Metadata), humanSize(r.Length))}
	if r.KeysZeroed {
		text = append(text, "The key material of the encryption is not in it.")
	}
	if r.NamesRedacted {
		text = append(text, "The names of other files are not in it.")
	}
	for _, o := range r.Omissions {
		text = append(text, fmt.Sprintf("Left out: %v", o))
	}
	if rest := r.LeftOut - len(r.Omissions); rest > 0 {
		text = append(text, fmt.Sprintf("and %d more", rest))
	} else if r.Incomplete && r.LeftOut == 0 {
		text = append(text, "Something that could be metadata was left out.")
	}
	return strings.Join(text, "\n")
}
