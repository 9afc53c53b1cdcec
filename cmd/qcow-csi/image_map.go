package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

func newImageMapCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "map IMAGE [--output human|json]",
		Short: "Show which parts of the virtual disk have data, and where in the file",
		Long: `Show which parts of the virtual disk have data, and where in the file it is. For people only those are listed; in JSON
the whole disk is, with the names of qemu-img map: "present" is false where no cluster was ever allocated, "zero" is true where
the disk reads as zeroes, "data" where it is stored in the file, "offset" bytes from its beginning.`,
		Example: `  qcow-csi image map disk.qcow2
  qcow-csi image map --output json disk.qcow2 | jq 'map(select(.data).length) | add'`,
		Args: cobra.ExactArgs(1),
	}
	output := addOutputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return withImage(args[0], storage.ReadOnly, func(_ *storage.OSFile, img *qcow.Image) error {
			w := bufio.NewWriter(cmd.OutOrStdout())
			write := writeMap
			if *output == outputJSON {
				write = writeMapJSON
			}
			return errors.Join(write(w, args[0], img), w.Flush())
		})
	}
	return cmd
}

func writeMap(w io.Writer, path string, img *qcow.Image) error {
	const columns = "%-15s %-15s %-15s %s\n"
	if _, err := fmt.Fprintf(w, columns, "Offset", "Length", "Mapped to", "File"); err != nil {
		return err
	}
	for e, err := range img.Extents(0, img.Size()) {
		if err != nil {
			return err
		}
		if e.Kind != qcow.ExtentData {
			continue
		}
		_, err := fmt.Fprintf(w, columns, fmt.Sprintf("%#x", e.Offset), fmt.Sprintf("%#x", e.Length), fmt.Sprintf("%#x", uint64(e.Host)), path)
		if err != nil {
			return err
		}
	}
	return nil
}

// mapEntry is an element of what qemu-img map --output=json prints.
type mapEntry struct {
	Start   int64   `json:"start"`
	Length  int64   `json:"length"`
	Depth   int     `json:"depth"`
	Present bool    `json:"present"`
	Zero    bool    `json:"zero"`
	Data    bool    `json:"data"`
	Offset  *uint64 `json:"offset,omitempty"`
}

// writeMapJSON writes an element per line, as it finds them: the map of a large disk is long.
func writeMapJSON(w io.Writer, _ string, img *qcow.Image) error {
	separator := "["
	for e, err := range img.Extents(0, img.Size()) {
		if err != nil {
			return err
		}
		entry := mapEntry{
			Start: e.Offset, Length: e.Length,
			Present: e.Kind != qcow.ExtentUnallocated, Zero: e.Kind != qcow.ExtentData, Data: e.Kind == qcow.ExtentData,
		}
		if e.Host != 0 {
			entry.Offset = (*uint64)(&e.Host)
		}
		line, err := json.Marshal(entry)
		if err != nil {
			return err
		}
		if _, err := fmt.Fprintf(w, "%s%s", separator, line); err != nil {
			return err
		}
		separator = ",\n"
	}
	if separator == "[" { // an empty disk
		_, err := io.WriteString(w, "[]\n")
		return err
	}
	_, err := io.WriteString(w, "]\n")
	return err
}
