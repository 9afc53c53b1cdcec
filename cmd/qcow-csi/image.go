package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// newImageCommand returns the commands that work on image files at rest. Their output and exit status are those of
// qemu-img where it has the same command.
func newImageCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "image",
		Short: "Create, inspect, check and grow qcow2 images",
		Long: `Create, inspect, check and grow qcow2 images.

An image that is in use, here or by QEMU, can't be opened in a way that conflicts: reading it excludes
writers, growing it excludes everybody.

Sizes are in bytes; the suffixes K, M, G, T, P and E stand for powers of 1024.`,
		Example: `  qcow-csi image create disk.qcow2 10G
  qcow-csi image info disk.qcow2
  qcow-csi image check --output json disk.qcow2
  qcow-csi image resize disk.qcow2 +5G`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newImageCreateCommand(), newImageInfoCommand(), newImageCheckCommand(), newImageMapCommand(), newImageResizeCommand())
	for _, sub := range cmd.Commands() {
		sub.DisableFlagsInUseLine = true
		sub.SilenceUsage = true // what fails once the arguments are understood is no matter of usage
	}
	return cmd
}

// outputFormat is the value of --output.
type outputFormat string

const (
	outputHuman outputFormat = "human"
	outputJSON  outputFormat = "json"
)

func (o *outputFormat) String() string { return string(*o) }
func (o *outputFormat) Type() string   { return "human|json" }

// Set implements pflag.Value.
func (o *outputFormat) Set(s string) error {
	switch f := outputFormat(s); f {
	case outputHuman, outputJSON:
		*o = f
		return nil
	}
	return errors.New(`must be "human" or "json"`)
}

func addOutputFlag(cmd *cobra.Command) *outputFormat {
	o := outputHuman
	cmd.Flags().Var(&o, "output", "format of the output")
	return &o
}

// openFile opens and locks the file at path. Unlike the driver, which opens only files that it has made, it follows
// symbolic links: the operator named it.
func openFile(path string, mode storage.Mode) (*storage.OSFile, error) {
	resolved, err := filepath.EvalSymlinks(path)
	if err != nil {
		return nil, err
	}
	return storage.Open(resolved, mode)
}

// withImage runs do on the image at path, and closes it.
func withImage(path string, mode storage.Mode, do func(f *storage.OSFile, img *qcow.Image) error) (err error) {
	f, err := openFile(path, mode)
	if err != nil {
		return err
	}
	img, err := qcow.Open(f, qcow.Options{ReadOnly: mode == storage.ReadOnly})
	if err != nil {
		return fmt.Errorf("%s: %w", path, errors.Join(err, f.Close()))
	}
	if err := errors.Join(do(f, img), img.Close()); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

// writeJSON writes v, indented.
func writeJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "    ")
	enc.SetEscapeHTML(false)
	return enc.Encode(v)
}
